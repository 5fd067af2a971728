import copy
import dataclasses
import importlib
import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpflow_dyn.tasks import FlipFlop, MemoryPro, Neurogym, TaskData, make_task

neurogym = pytest.importorskip("neurogym")
registration = importlib.import_module("neurogym.envs.registration")
SUPERVISED = registration.all_envs(tag="supervised")
DECISION = "neurogym:PerceptualDecisionMaking-v0"


def assert_same(a: TaskData, b: TaskData):
    for name in ("inputs", "targets", "mask"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.labels.keys() == b.labels.keys()
    for name in a.labels:
        np.testing.assert_array_equal(a.labels[name], b.labels[name])


def environment(name, seed=None, **options):
    """The environment itself, as neurogym's own users would build it."""
    module, attribute = registration.ALL_EXTENDED_ENVS[name].split(":")
    env = getattr(importlib.import_module(module), attribute)(**options)
    env.seed(seed)
    return env


def test_memorypro_answers_with_the_angle_that_was_shown():
    data = MemoryPro(fixation=3, stimulus=4, memory=5, response=2).sample(trials=6, seed=1)
    assert data.inputs.shape == data.targets.shape == (6, 14, 3)
    for trial, angle in enumerate(data.labels["angle"]):
        for time in range(14):
            shown, answered, fixate = 3 <= time < 7, time >= 12, time < 12
            direction = np.array([np.cos(angle), np.sin(angle)])
            np.testing.assert_array_equal(data.inputs[trial, time], [fixate, *(direction * shown)])
            np.testing.assert_array_equal(data.targets[trial, time], [fixate, *(direction * answered)])


def test_memorypro_angles_cover_the_circle():
    angle = MemoryPro().sample(trials=4000, seed=0).labels["angle"]
    assert angle.min() >= 0 and angle.max() < 2 * np.pi
    counts = np.histogram(angle, bins=8, range=(0, 2 * np.pi))[0]
    assert counts.min() > 400


def test_memorypro_noise_is_on_the_inputs_only():
    quiet, noisy = MemoryPro().sample(64, seed=3), MemoryPro(noise=0.2).sample(64, seed=3)
    np.testing.assert_array_equal(quiet.targets, noisy.targets)
    assert np.std(noisy.inputs - quiet.inputs) == pytest.approx(0.2, rel=0.05)


@given(st.integers(1, 4), st.integers(1, 30), st.floats(0, 1), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_flipflop_remembers_the_last_pulse(bits, steps, rate, trials, seed):
    data = FlipFlop(bits=bits, steps=steps, rate=rate).sample(trials, seed)
    assert data.inputs.shape == data.targets.shape == (trials, steps, bits)
    for trial in range(trials):
        memory = np.zeros(bits)
        for pulse, target in zip(data.inputs[trial], data.targets[trial], strict=True):
            memory = np.where(pulse == 0, memory, pulse)
            np.testing.assert_array_equal(target, memory)
    assert set(np.unique(data.inputs)) <= {-1.0, 0.0, 1.0}
    assert set(np.unique(data.targets)) <= {-1.0, 1.0}


def test_flipflop_pulses_come_at_the_rate_asked_for():
    later = FlipFlop(steps=200, rate=0.25).sample(200, seed=0).inputs[:, 1:]
    assert np.mean(later != 0) == pytest.approx(0.25, abs=0.01)
    assert np.mean(later) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("spec", ["memorypro", "flipflop", *(f"neurogym:{name}" for name in SUPERVISED)])
def test_a_seed_fixes_the_trials(spec):
    first = make_task(spec, trials=6, seed=1)
    other = make_task(spec, trials=6, seed=2)
    assert_same(first, make_task(spec, trials=6, seed=1))
    assert first.inputs.shape != other.inputs.shape or not np.array_equal(first.inputs, other.inputs)


def test_neurogym_has_supervised_tasks():
    assert len(SUPERVISED) >= 20


@pytest.mark.parametrize("name", SUPERVISED)
def test_every_supervised_neurogym_task_is_well_formed(name):
    data = make_task(f"neurogym:{name}", trials=6, seed=1)
    assert data.inputs.dtype == data.targets.dtype == np.float64
    assert data.inputs.shape[:2] == data.targets.shape[:2] == data.mask.shape
    assert np.isfinite(data.inputs).all() and np.isfinite(data.targets).all()
    assert not data.inputs[~data.mask].any() and not data.targets[~data.mask].any()
    assert data.mask.all(axis=1).any(), "the longest trial needs no padding"
    assert all(len(label) == 6 for label in data.labels.values())
    if "class" in data.labels:
        np.testing.assert_array_equal(data.targets.sum(axis=2), data.mask)
        np.testing.assert_array_equal(data.targets.argmax(axis=2)[data.mask], data.labels["class"][data.mask])


@pytest.mark.parametrize(
    "name", ["PerceptualDecisionMaking-v0", "ContextDecisionMaking-v0", "ReachingDelayResponse-v0"]
)
def test_neurogym_trials_are_the_environments_own(name):
    data, env = make_task(f"neurogym:{name}", trials=8, seed=5), environment(name, seed=5)
    for trial in range(8):
        record = env.new_trial()
        length = len(env.ob)
        assert data.mask[trial].sum() == length and data.mask[trial, :length].all()
        np.testing.assert_array_equal(data.inputs[trial, :length], env.ob)
        answer = data.labels["class"] if env.gt.ndim == 1 else data.targets
        np.testing.assert_array_equal(answer[trial, :length], env.gt)
        assert data.labels["ground_truth"][trial] == record["ground_truth"]
    assert data.dt == env.dt


def test_neurogym_datasets_are_time_major_and_ours_are_not():
    env = environment("PerceptualDecisionMaking-v0")
    dataset = neurogym.Dataset(env, batch_size=2, seq_len=22, cache_len=22)
    dataset.seed(3)  # environment i gets seed 3 + i
    dataset()  # the rest of what was cached before the seed
    inputs, classes = dataset()  # [time, trial, channel], [time, trial]
    for trial in range(2):
        ours = make_task(DECISION, trials=1, seed=3 + trial)
        np.testing.assert_array_equal(ours.inputs[0], inputs[:, trial])
        np.testing.assert_array_equal(ours.labels["class"][0], classes[:, trial])


def test_neurogym_leaves_global_random_state_and_options_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    options = {"session": {"v": 0.3, "a": 0.7}, "catch_prob": 0.2}
    before = copy.deepcopy(options)
    make_task("neurogym:AnnubesEnv-v0", trials=5, **options)
    assert options == before
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_neurogym_options_reach_the_environment():
    assert make_task(DECISION, trials=2, dt=50, dim_ring=4).inputs.shape == (2, 44, 5)
    quiet = make_task(DECISION, trials=50, sigma=0, cohs=[51.2])
    larger = quiet.inputs[..., 1:].sum(axis=1).argmax(axis=-1)
    np.testing.assert_array_equal(larger, quiet.labels["ground_truth"])


def test_neurogym_collections_work_too():
    data = make_task("neurogym:yang19.dms-v0", trials=4)
    assert data.inputs.shape[2] == 33 and data.targets.shape[2] == 17


def test_tasks_are_immutable_and_do_not_share_options():
    assert Neurogym("X-v0").options is not Neurogym("X-v0").options
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryPro().memory = 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("memorypr", "unknown task 'memorypr'.*Nearest: memorypro"),
        ("PerceptualDecisionMaking-v0", "Nearest: neurogym:PerceptualDecisionMaking-v0"),
        ("neurogym:GoNoGo-v0", "unknown task 'neurogym:GoNoGo-v0'.*Nearest: neurogym:GoNogo-v0"),
        ("xyzzyx", "unknown task 'xyzzyx'. Known: memorypro, flipflop"),
        ("neurogym:Bandit-v0", "take a supervised task"),
        ("neurogym:Reaching1D-v0", "not one of the environment's 3 actions"),
    ],
)
def test_unknown_and_unusable_tasks_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        make_task(spec)


@pytest.mark.parametrize("spec", ["memorypro", "flipflop", DECISION])
@pytest.mark.parametrize("trials", [0, -3])
def test_no_trials_are_refused(spec, trials):
    with pytest.raises(ValueError, match=f"trials must be at least 1, got {trials}"):
        make_task(spec, trials=trials)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("memorypro", {"delay": 3}, "memorypro has no option delay; it has: fixation, stimulus, memory"),
        ("memorypro", {"stimulus": 0}, "stimulus must be at least 1, got 0"),
        ("memorypro", {"noise": -1}, "noise must be at least 0, got -1"),
        ("flipflop", {"bits": 0}, "bits must be at least 1, got 0"),
        ("flipflop", {"rate": 1.5}, "between 0 and 1, got 1.5"),
        (DECISION, {"delay": 3}, "does not take these options.*'delay'"),
        ("x.npz", {"delay": 3}, "has no option delay; it has: none"),
    ],
)
def test_bad_options_are_explained(spec, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(spec, **options)


def test_without_neurogym_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kpflow-dyn\[neuro\]'"):
        make_task(DECISION)
    with pytest.raises(ValueError, match="Nearest: flipflop"):
        make_task("flipflo")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {"inputs": rng.normal(size=(5, 4, 3)), "targets": rng.integers(0, 2, (5, 4, 2)), "mask": np.eye(5, 4) < 1}


def save(folder, arrays):
    path = folder / "trials.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("form", ["{}", "npz:{}"])
def test_npz_gives_back_what_was_saved(tmp_path, arrays, form):
    data = make_task(form.format(save(tmp_path, arrays)))
    for name in arrays:
        np.testing.assert_array_equal(getattr(data, name), arrays[name])
    assert data.inputs.dtype == data.targets.dtype == np.float64 and data.mask.dtype == bool
    assert (data.name, data.dt) == ("trials", None)


def test_npz_takes_the_first_trials(tmp_path, arrays):
    path = save(tmp_path, arrays)
    data = make_task(str(path), trials=2)
    np.testing.assert_array_equal(data.inputs, arrays["inputs"][:2])
    assert len(data.targets) == len(data.mask) == 2
    with pytest.raises(ValueError, match=r"asked for 6 trials, but .* has 5"):
        make_task(str(path), trials=6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_task(str(path), trials=0)


def test_npz_of_inputs_alone(tmp_path, arrays):
    data = make_task(str(save(tmp_path, {"inputs": arrays["inputs"]})))
    assert data.targets is None and data.mask is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.zeros((4, 3))}, r"inputs in .* must be \[trial, time, channel\].*got \(4, 3\)"),
        ({"inputs": np.zeros((0, 4, 3))}, r"not empty.*got \(0, 4, 3\)"),
        ({"targets": np.zeros((5, 3, 2))}, r"targets in .* got \(5, 3, 2\) beside inputs \(5, 4, 3\)"),
        ({"mask": np.zeros((5, 4, 1))}, r"mask in .* must be \[trial, time\]"),
        ({"inputs": np.full((5, 4, 3), "a")}, "real numbers, got dtype <U1"),
        ({"inputs": np.full((5, 4, 3), 1j)}, "real numbers, got dtype complex128"),
        ({"inputs": np.full((5, 4, 3), None)}, "plain arrays of numbers"),
    ],
)
def test_bad_arrays_are_explained(tmp_path, arrays, change, message):
    with pytest.raises(ValueError, match=message):
        make_task(str(save(tmp_path, arrays | change)))


@pytest.mark.parametrize("name", ["inputs", "targets"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_nan_is_named(tmp_path, arrays, name, value):
    arrays[name] = arrays[name].astype(float)
    arrays[name][2, 1, 0] = arrays[name][3, 0, 0] = value
    with pytest.raises(ValueError, match=rf"{name} in .* first at \(2, 1, 0\)"):
        make_task(str(save(tmp_path, arrays)))


def test_files_that_are_no_npz_are_explained(tmp_path, arrays):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.npz"):
        make_task(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="no array named 'inputs'"):
        make_task(str(save(tmp_path, {"x": arrays["inputs"]})))
    text = tmp_path / "text.npz"
    text.write_text("not a zip")
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        make_task(str(text))


def test_a_truncated_member_is_explained(tmp_path, arrays):
    path = save(tmp_path, arrays)
    damaged = bytearray(path.read_bytes())
    damaged[150:200] = bytes(50)  # inside the first array, whose checksum no longer fits
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be read"):
        make_task(str(path))
