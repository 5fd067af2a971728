import copy
import dataclasses
import importlib
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kpflow_dyn as kp
from kpflow_dyn.tasks import (
    ContextIntegration,
    DelayAnti,
    DelayPro,
    EvidenceIntegration,
    FlipFlop,
    FourTasks,
    Lag,
    LowRankForecast,
    MemoryAnti,
    MemoryPro,
    Neurogym,
    Reaching,
    Romo,
    Sine,
    TaskData,
    make_task,
)
from kpflow_dyn.tasks._named import BUILT_IN

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


@pytest.mark.parametrize(
    ("pro", "anti"), [(MemoryPro(noise=0.1), MemoryAnti(noise=0.1)), (DelayPro(noise=0.1), DelayAnti(noise=0.1))]
)
def test_anti_is_pro_turned_by_pi(pro, anti):
    pro, anti = pro.sample(trials=6, seed=2), anti.sample(trials=6, seed=2)
    np.testing.assert_array_equal(pro.inputs, anti.inputs)
    np.testing.assert_array_equal(pro.targets[..., 0], anti.targets[..., 0])
    cosine, sine = np.moveaxis(anti.targets[:, -1, 1:], -1, 0)
    turn = np.exp(1j * np.pi)
    np.testing.assert_allclose(cosine + 1j * sine, np.exp(1j * pro.labels["angle"]) * turn, atol=1e-15)
    np.testing.assert_array_equal(anti.targets[..., 1:], -pro.targets[..., 1:])


def test_delaypro_is_memorypro_whose_stimulus_stays():
    memory = MemoryPro(fixation=3, stimulus=4, memory=5, response=2).sample(trials=6, seed=1)
    delay = DelayPro(fixation=3, stimulus=9, response=2).sample(trials=6, seed=1)
    np.testing.assert_array_equal(memory.targets, delay.targets)
    np.testing.assert_array_equal(memory.inputs[:, :7], delay.inputs[:, :7])
    np.testing.assert_array_equal(memory.inputs[..., 0], delay.inputs[..., 0])
    assert not memory.inputs[:, 7:, 1:].any()
    np.testing.assert_array_equal(delay.inputs[:, 3:, 1:], np.repeat(delay.inputs[:, 3:4, 1:], 11, axis=1))


def test_the_four_tasks_are_those_that_the_rule_says():
    data = FourTasks(fixation=3, stimulus=4, memory=5, response=2).sample(trials=10, seed=1)
    alone = [MemoryPro(3, 4, 5, 2), MemoryAnti(3, 4, 5, 2), DelayPro(3, 9, 2), DelayAnti(3, 9, 2)]
    assert sorted(np.bincount(data.labels["rule"])) == [2, 2, 3, 3]
    for trial, rule in enumerate(data.labels["rule"]):
        single = alone[rule].sample(trials=10, seed=1)  # whose angles are drawn first, and so are the same
        assert data.labels["angle"][trial] == single.labels["angle"][trial]
        np.testing.assert_array_equal(data.inputs[trial, :, :3], single.inputs[trial])
        np.testing.assert_array_equal(data.targets[trial], single.targets[trial])
        np.testing.assert_array_equal(data.inputs[trial, :, 3:], np.tile(np.arange(4) == rule, (14, 1)))


@given(st.integers(0, 8), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_lag_asks_for_the_shifted_input(lag, more, channels, seed):
    data = Lag(lag=lag, steps=lag + more, channels=channels).sample(3, seed)
    np.testing.assert_array_equal(data.targets[:, lag:], data.inputs[:, :more])
    np.testing.assert_array_equal(data.mask, np.tile(np.arange(lag + more) >= lag, (3, 1)))


def test_evidence_adds_up_to_its_sign():
    data = EvidenceIntegration(fixation=2, stimulus=400, response=3, noise=0.1).sample(200, seed=0)
    coherence, evidence = data.labels["coherence"], data.inputs[:, 2:402, 0]
    np.testing.assert_allclose(evidence.mean(axis=1), coherence, atol=5 * 0.1 / np.sqrt(400))
    assert np.std(evidence - coherence[:, None]) == pytest.approx(0.1, rel=0.02)
    np.testing.assert_array_equal(data.targets[:, 402:, 0], np.tile(np.sign(coherence)[:, None], 3))
    assert not data.targets[:, :402].any() and np.abs(coherence).max() <= 0.2
    np.testing.assert_array_equal(data.mask[0], [True] * 2 + [False] * 400 + [True] * 3)


def test_the_context_says_which_evidence_counts():
    data = ContextIntegration(fixation=2, stimulus=5, response=3, noise=0).sample(31, seed=0)
    assert sorted(np.bincount(data.labels["context"])) == [15, 16]
    for trial, context in enumerate(data.labels["context"]):
        streams = [data.labels["motion"][trial], data.labels["colour"][trial]]
        np.testing.assert_array_equal(data.inputs[trial, 2:7, :2], np.tile(streams, (5, 1)))
        assert not data.inputs[trial, [0, 1, 7, 8, 9], :2].any()
        np.testing.assert_array_equal(data.inputs[trial, :, 2:], np.tile(np.arange(2) == context, (10, 1)))
        np.testing.assert_array_equal(data.targets[trial, :, 0], [0] * 7 + [np.sign(streams[context])] * 3)
    np.testing.assert_array_equal(data.mask[0], [True] * 2 + [False] * 5 + [True] * 3)


def test_romo_compares_two_frequencies():
    data = Romo(fixation=1, first=2, delay=3, second=4, response=5).sample(300, seed=0)
    first, second = data.labels["first"], data.labels["second"]
    assert set(np.abs(first - second)) == {8.0} and {*first, *second} == {10.0, 14, 18, 22, 26, 30, 34}
    for trial in range(300):
        periods = [0] + [first[trial] / 34] * 2 + [0] * 3 + [second[trial] / 34] * 4 + [0] * 5
        np.testing.assert_array_equal(data.inputs[trial, :, 0], periods)
        answer = 1 if first[trial] > second[trial] else -1
        np.testing.assert_array_equal(data.targets[trial, :, 0], [0] * 10 + [answer] * 5)


@pytest.mark.parametrize("rank", [2, 3, 6])
def test_a_forecast_is_the_same_linear_map_of_few_dimensions_in_all_trials(rank):
    task = LowRankForecast(channels=7, rank=rank, steps=30, horizon=4)
    data, others = task.sample(200, seed=0), task.sample(5, seed=1)
    x, y = data.inputs.reshape(-1, 7), data.targets.reshape(-1, 7)
    assert np.linalg.matrix_rank(x) == np.linalg.matrix_rank(y) == rank
    assert np.mean(x**2) == pytest.approx(1, rel=0.1)
    np.testing.assert_array_equal(data.targets[:, :-4], data.inputs[:, 4:])
    forecast = np.linalg.pinv(x, rcond=1e-10) @ y
    np.testing.assert_allclose(others.inputs @ forecast, others.targets, atol=1e-12)
    fastest = np.abs(np.angle(np.linalg.eigvals(task._system()[0]))).max()
    assert fastest == pytest.approx(2 * np.pi / 20)


def test_another_system_is_another_task():
    first, second = LowRankForecast().sample(4, seed=0), LowRankForecast(system=1).sample(4, seed=0)
    assert not np.allclose(first.inputs, second.inputs)


def test_a_sine_has_the_frequency_that_its_input_stands_for():
    data = Sine(frequencies=5, slowest=50, fastest=10, steps=41).sample(40, seed=0)
    level, omega = data.inputs[:, 0, 0], data.labels["omega"]
    np.testing.assert_array_equal(data.inputs, np.broadcast_to(level[:, None, None], data.inputs.shape))
    number = np.rint((level - 0.25) * 5)
    assert set(number) == {1, 2, 3, 4, 5}
    np.testing.assert_allclose(omega, 2 * np.pi * (0.02 + (number - 1) / 4 * 0.08), rtol=1e-14)
    s = data.targets[..., 0]  # the recurrence of a sine: s(t + 1) + s(t - 1) = 2 cos(w) s(t)
    np.testing.assert_allclose(s[:, 2:] + s[:, :-2], 2 * np.cos(omega)[:, None] * s[:, 1:-1], atol=1e-13)
    np.testing.assert_array_equal(s[:, 0], 0)
    np.testing.assert_allclose(s[:, 1], np.sin(omega))


def test_a_reach_takes_the_path_of_least_jerk():
    data = Reaching(hold=3, preparation=4, movement=40, rest=2, directions=6).sample(12, seed=0)
    there = np.stack([np.cos(data.labels["angle"]), np.sin(data.labels["angle"])], axis=-1)
    np.testing.assert_array_equal(data.inputs[:, 3:, :2], np.repeat(there[:, None], 46, axis=1))
    assert not data.inputs[:, :3, :2].any()
    np.testing.assert_array_equal(data.inputs[:, :, 2], np.tile(np.arange(49) < 7, (12, 1)))
    assert not data.targets[:, :7].any()
    np.testing.assert_allclose(data.targets[:, 46:], np.repeat(there[:, None], 3, axis=1), rtol=1e-14)
    path = (data.targets[:, 6:47] * there[:, None]).sum(axis=-1)  # [trial, 0 ... movement], along the target
    np.testing.assert_allclose(path + path[:, ::-1], 1, rtol=1e-13)
    np.testing.assert_allclose(np.diff(path, n=5), 6 * 120 / 40**5, rtol=1e-6)
    np.testing.assert_allclose(np.diff(path, n=6), 0, atol=1e-13)  # no sixth derivative: least jerk
    fitted = np.polynomial.Polynomial.fit(np.linspace(0, 1, 41), path[0], 5, domain=[0, 1], window=[0, 1])
    np.testing.assert_allclose(fitted.coef[:3], 0, atol=1e-10)  # at rest at both ends, by the symmetry above


def test_flipflop_pulses_come_at_the_rate_asked_for():
    later = FlipFlop(steps=200, rate=0.25).sample(200, seed=0).inputs[:, 1:]
    assert np.mean(later != 0) == pytest.approx(0.25, abs=0.01)
    assert np.mean(later) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("spec", [*BUILT_IN, *(f"neurogym:{name}" for name in SUPERVISED)])
def test_a_seed_fixes_the_trials(spec):
    first = make_task(spec, trials=6, seed=1)
    other = make_task(spec, trials=6, seed=2)
    assert_same(first, make_task(spec, trials=6, seed=1))
    assert first.inputs.shape != other.inputs.shape or not np.array_equal(first.inputs, other.inputs)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_tasks_are_well_formed(name):
    quiet, noisy = make_task(name, trials=64, noise=0.0), make_task(name, trials=64, noise=0.3)
    assert (noisy.name, noisy.dt, len(noisy.inputs)) == (name, 20.0, 64)
    assert noisy.inputs.dtype == noisy.targets.dtype == np.float64
    assert all(len(label) == 64 for label in noisy.labels.values())
    np.testing.assert_array_equal(quiet.targets, noisy.targets)
    assert np.std(noisy.inputs - quiet.inputs) == pytest.approx(0.3, rel=0.05)
    assert noisy.mask is None or (noisy.mask.dtype == bool and noisy.mask.any(axis=1).all())


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


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPERVISED)
def test_every_supervised_neurogym_task_goes_through_analyze(name):
    data = make_task(f"neurogym:{name}", trials=3, seed=1)
    cell, _readout = kp.models.make_model("rnn", data.inputs.shape[2], 8, data.targets.shape[2], dtype="float64")
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(data.inputs))))
    found = kp.analyze(flow, k=2, samples=40, task=data)
    assert float(found.ntk_effective_rank) >= 1 and found.sizes["trial"] == 3
    assert all(np.isfinite(found[name].values).all() for name in found.data_vars)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(registration.ALL_EXTENDED_ENVS) - set(SUPERVISED)))
def test_what_neurogym_does_not_call_supervised_works_or_says_why_not(name):
    try:
        data = make_task(f"neurogym:{name}", trials=6, seed=1)
    except ValueError as error:
        assert "take a supervised task" in str(error) or "is not one of the environment's" in str(error)
        assert name in ("Bandit-v0", "DawTwoStep-v0", "EconomicDecisionMaking-v0", "Null-v0") or "Reaching1D" in name
    else:
        assert data.inputs.shape[:2] == data.targets.shape[:2] == data.mask.shape


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
    assert make_task(DECISION, trials=2, timing={"stimulus": 500}).inputs.shape == (2, 7, 3)
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
        ("four-tsks", "Nearest: fourtasks"),
        ("neurogym:Bandit-v0", "take a supervised task"),
        ("neurogym:Reaching1D-v0", "not one of the environment's 3 actions"),
    ],
)
def test_unknown_and_unusable_tasks_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        make_task(spec)


@pytest.mark.parametrize("spec", [*BUILT_IN, DECISION])
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
        ("flipflop", {"noise": np.nan}, "noise must be at least 0, got nan"),
        ("delayanti", {"response": 0}, "response must be at least 1, got 0"),
        ("fourtasks", {"memory": -1}, "memory must be at least 0, got -1"),
        ("lag", {"lag": 60}, "lag must be less than steps = 60"),
        ("romo", {"second": 0}, "second must be at least 1, got 0"),
        ("evidenceintegration", {"coherence": 0}, "coherence must be positive, got 0"),
        ("contextintegration", {"stimulus": 0}, "stimulus must be at least 1, got 0"),
        ("lowrankforecast", {"rank": 11}, "rank must be at most channels = 10, got 11"),
        ("lowrankforecast", {"period": 1}, "period must be at least 2, got 1"),
        ("sine", {"slowest": 10}, "slowest must be at least 20.0, got 10"),
        ("reaching", {"movement": 0}, "movement must be at least 1, got 0"),
        (DECISION, {"delay": 3}, "Making-v0 has no option delay; it has: dt, dim_ring, rewards, timing, cohs, sigma"),
        (DECISION, {"timing": {"wait": 3}}, "no option wait; it has: fixation, stimulus, delay, decision"),
        ("neurogym:yang19.dms-v0", {"wait": 3}, "with wait=3 failed: .*'wait'.*; check these options"),
        (DECISION, {"dt": "5o"}, f"{DECISION} with dt='5o' failed: .*; check these options"),
        (DECISION, {"dt": 0}, f"{DECISION} with dt=0 failed: .*; check these options"),
        (DECISION, {"dt": -50}, f"{DECISION} with dt=-50 failed: .*; check these options"),
        ("x.npz", {"delay": 3}, "has no option delay; it has: none"),
    ],
)
def test_bad_options_are_explained(spec, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(spec, **options)


@pytest.mark.parametrize(("options", "got"), [({"stimulus": 2.5}, "2.5"), ({"memory": True}, "True")])
def test_steps_are_whole_numbers(options, got):
    with pytest.raises(TypeError, match=f"must be a whole number, got {got}"):
        MemoryPro(**options)
    with pytest.raises(TypeError, match=r"trials must be a whole number, got 2\.5"):
        MemoryPro().sample(2.5)


@pytest.mark.parametrize(
    ("arrays", "kind", "message"),
    [
        ({"inputs": [[1.0]]}, TypeError, "inputs in the task task is list, expected a numpy array"),
        ({"inputs": np.zeros((2, 3))}, ValueError, r"inputs in the task task must be \[trial, time, channel\]"),
        ({"targets": np.zeros((2, 4, 1))}, ValueError, "targets in the task task must be"),
        ({"mask": np.ones((2, 3, 1))}, ValueError, "mask in the task task must be"),
        ({"targets": np.full((2, 3, 1), np.nan)}, ValueError, "has a NaN or infinity"),
    ],
)
def test_trials_of_ones_own_are_checked(arrays, kind, message):
    with pytest.raises(kind, match=message):
        TaskData(**({"inputs": np.zeros((2, 3, 1))} | arrays))


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


def test_outputs_have_names():
    assert MemoryPro().sample(trials=2).outputs == ("fixation", "cos(angle)", "sin(angle)")
    assert make_task("flipflop", trials=2, bits=2).outputs == ("bit 1", "bit 2")
    assert make_task("lag", trials=2).outputs == ()
    with pytest.raises(ValueError, match="expected 2 names, or none"):
        TaskData(np.zeros((2, 3, 1)), targets=np.zeros((2, 3, 2)), outputs=("one",))


def test_actions_of_neurogym_name_the_outputs():
    assert make_task("neurogym:PerceptualDecisionMaking-v0", trials=2).outputs == ("fixation", "choice 1", "choice 2")
    assert make_task("neurogym:MotorTiming-v0", trials=2).outputs == ()


@pytest.mark.parametrize("kind", ["int64", "uint8", "bool"])
def test_targets_may_be_class_indices(tmp_path, arrays, kind):
    right = (np.arange(20).reshape(5, 4) % 3).astype(kind)
    for targets in (right, right[..., None]):
        data = make_task(str(save(tmp_path, arrays | {"targets": targets})))
        np.testing.assert_array_equal(data.targets, targets)
        most = int(right[arrays["mask"]].max()) + 1
        assert data.targets.dtype.kind == "i" and data.classes == most
        assert data.fits(most) and data.fits(5) and data.fits(1) == (targets.ndim == 3)
    named = TaskData(arrays["inputs"], right.astype(int) - 1, outputs=("left", "right"))
    assert named.classes == int(right.max()) and not named.fits(0)
    with pytest.raises(ValueError, match=r"expected at least 3 of classes names, or none"):
        TaskData(arrays["inputs"], np.arange(20).reshape(5, 4) % 3, outputs=("left", "right"))
    with pytest.raises(ValueError, match=r"or class indices, integers \[trial, time\]"):
        TaskData(arrays["inputs"], right.astype(float))
