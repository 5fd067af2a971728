"""The standard analysis of a flow: spectra, modes, effective ranks and state PCA, as one labelled dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, to_numpy
from kpflow_dyn._flows.flow import Flow, check_flow
from kpflow_dyn._flows.places import said_of_targets, said_of_weights
from kpflow_dyn._implicit.solutions import NetworkSolution
from kpflow_dyn._learning.losses import Loss, loss_of_task
from kpflow_dyn._learning.parts import learning_of
from kpflow_dyn._numbers.reductions import PartialTrace
from kpflow_dyn._numbers.spectra import Modes, eigs
from kpflow_dyn._numbers.summary import KERNELS, Summary, summary
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.problems import ImplicitProblem
from kpflow_dyn._problems.solutions import ODESolution, Solution
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._problems.stochastic import SDEProblem
from kpflow_dyn._problems.versions import versions_behind
from kpflow_dyn._progress import Progress
from kpflow_dyn._shown import plural
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.dynamics._components import participation_ratio, pca
from kpflow_dyn.solvers import BlockLanczos, Estimate

if TYPE_CHECKING:
    import xarray as xr

    from kpflow_dyn.models._laws import Law
    from kpflow_dyn.tasks import TaskData

SOLVER = BlockLanczos(tol=1e-3, maxiter=800)
OF_ALIKE = BlockLanczos(block=4, tol=1e-3, maxiter=200)  # where units are alike: of K, two or three values often agree
COMPONENTS = 10
AXES = ("trial", "time", "unit")

WORDS = {
    "temporal_effective_rank": (
        "Effective temporal rank",
        "How many time courses learning can use: 1 if it can only scale one, the number of times if each is free.",
    ),
    "spatial_effective_rank": (
        "Effective spatial rank",
        "Along how many directions of unit space learning can move the state.",
    ),
    "trial_effective_rank": (
        "Effective trial rank",
        "How many patterns across trials learning can make; if few, changing one trial drags the others along.",
    ),
    "state_effective_rank": (
        "Effective rank of the state",
        "How many principal components the state itself fills (its participation ratio); compare the spatial rank.",
    ),
    "core_effective_rank": (
        "Effective rank of the core",
        "How many directions the data at the weights offer to learning, each plural for every unit that it reaches.",
    ),
    "K_effective_rank": (
        "Effective rank of K",
        "How many directions a change of the parameters can kick directly, before the dynamics pass a kick on.",
    ),
    "ntk_effective_rank": (
        "Effective rank of the NTK",
        "How many directions of the whole trajectory [trial, time, unit] gradient descent can move appreciably.",
    ),
    "K_ntk_alignment": (
        "Alignment of K and the NTK",
        "1 if the dynamics only scale what the parameters can kick directly, near 0 if they reshape it entirely.",
    ),
    "core_trace": ("Trace of the core", "Total squared size of the data that the weights see, plural for every unit."),
    "K_trace": (
        "Trace of K",
        "Total squared sensitivity to the parameters of the equation of motion itself, a step or the field of an ODE.",
    ),
    "ntk_trace": (
        "Trace of the NTK",
        "Total squared sensitivity of the trajectory to the parameters; over the trace of K, the gain of the dynamics.",
    ),
    "core_norm": ("Norm of the core", "Frobenius norm: the size of the core as its largest eigenvalues set it."),
    "K_norm": ("Norm of K", "Frobenius norm: the size of K as its largest eigenvalues set it."),
    "ntk_norm": (
        "Norm of the NTK",
        "Frobenius norm: the size of the NTK along the directions that are easiest to learn.",
    ),
}
"""What each number is called, and what it means."""


def analyze(
    flow: Flow,
    *,
    k: int = 8,
    samples: int = 40,
    seed: int = 0,
    task: TaskData | None = None,
    readout: Any = None,
    loss: Loss | None = None,
    mask: Any = None,
    all_steps: bool = False,
    init: Law | None = None,
    optimizer: Any = None,
    lr: float | None = None,
    clip: float | None = None,
    steps: int = 1000,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Find where, when and in which trials gradient descent can move the state, with error bars.

    S is the state, T_axis the partial trace of the NTK that keeps one axis, and er(A) = (tr A)^2 / |A|_F^2. All use the
    inner product of the flow's measure. (For an ODE this is by default quadrature over its times: modes are functions.)

        core_eigenvalue, core_multiplicity      all of the core, if V gives them; else the leading ones
        {K,ntk}_{eigenvalue,residual,converged} the k leading ones, |A v - l v| / l_1, and whether that is small enough
        ntk_mode                                the NTK's eigenvectors [rank, trial, time, unit]
        {temporal,spatial,trial}_kernel         T_time, T_unit and T_trial
        {temporal,spatial,trial}_{eigenvalue,eigenvalue_stderr,mode}    their spectra and eigenvectors. Unless
            exact, eigenvalues measure modes of one half of the probes on the other half: noise does not pass for modes
        {core,K,ntk}_{trace,norm,effective_rank}, {temporal,spatial,trial,state}_effective_rank, K_ntk_alignment
        pc_{variance,projection,direction}      principal components of S over trials and times, by `measure`
        measure                                 how much each trial and time counts: <a, b> = sum measure a b
        {temporal,spatial,trial}_measure        the same on one axis, where the modes are orthonormal; kernels act on
            values, so that diag(measure) kernel is symmetric

    With a task that has targets, and a readout, which learns with the model, it first predicts the learning:

        loss, accuracy                          now
        part_{loss,share,accuracy}              a part is the whole, an output or class by name, or a principal
            component of the error: its loss, its share of the whole, its accuracy
        part_{half,tenth}, part_curve           tau = learning rate x steps until its loss is half or a tenth of the
            first one, and its loss at `tau` over the first one; all is trained, under the kernel as it is now, as in
            `forecast`. inf: never; NaN: later than the attribute `followed`. Descent is stable below a learning rate
            of 2 over the attribute `largest_rate`
        part_{alone,unreached}                  tau to its half if it were the only part; how much is out of reach
        part_{rate,reach}                       how fast the outputs move along its error, and at which [trial, time]
        part_{factors,kept,own,relative,words}  its obstacles, with `factor_typical`: see `obstacles`

    The loss of a part is the loss of one output. For a cross-entropy it is the loss at the places where this class is
    right. Along a principal component it is the loss at each place, times the share of its error along the component,
    in the metric of the loss, h^{-1}. So the losses of all outputs add up to the whole at any time, and so do those of
    all classes, and of all components.

    With an optimizer, it also gives the optimiser's own steps at which training has come so far, as `gradient_flow` has
    it:

        optimizer_{steps,earliest,latest}       to a half, a fifth and a tenth of the whole loss [fraction], and the
            first and last step that it may be; NaN if it takes more steps than were made
        optimizer_{half,tenth}, optimizer_curve the step from which each part stays there, and its loss over the first
            one at each `step`, interpolated between some 60 of them

    If the mask of a task, or of `flow.where`, leaves steps out, these have the measure 0. Modes, kernels and
    projections are NaN there.

    The numbers have attributes: `stderr` (0 if exact), `method`, `long_name`, `description`; `applications` if these
    were counted; and for effective ranks `dimension`, their largest possible value.

    Args:
        flow: the result of `linearize`.
        k: how many leading eigenvalues of K and of the NTK to find.
        samples: random probes for each estimate.
        seed: the same int gives the same dataset.
        task: the task that the inputs came from. It gives the time axis in milliseconds (for a discrete problem; an ODE
            keeps its own times), coordinates `label_...` of the trials, and its mask. Steps after the end of their
            trial, and other steps without a target, are left out as by `flow.where(task.mask)`. The attribute "steps"
            says so.
        readout: a Linear layer of torch or equinox on the states, or a matrix [out, unit].
        loss: the loss of the readout's outputs for the task's targets: "squared_error", "cross_entropy" or a function,
            as in `forecast`. By default the cross-entropy if the task has right classes (a label "class", or targets
            that are class indices), else the squared error.
        mask: how much each place counts in the loss, m >= 0 [trial, time]; by default the mask of the task.
        all_steps: keep steps that have no target.
        init: the distribution that the model's recurrent weights were drawn from (`kp.models.Gaussian(g=1.5)`). Its
            description is written into the attribute "init" and the settings of the page; nothing is computed from it.
        optimizer, lr, clip: how you train, as in `gradient_flow`, such as "adam", 1e-3. Each step sees all trials.
        steps: the largest number of its steps; it ends at a twentieth of the loss. The price is at most 1.1 times as
            many gradients, and some 60 forward passes; `progress` says it beforehand. The attribute "optimizer_road"
            says what the price was, and whether this is a forecast or a training.
        progress: called while the work goes on.

    Raises:
        TypeError: an init that is not a distribution of weights.
        ValueError: k < 1; samples < 40; states without time; a task with other trials or times than the flow; a readout
            that does not fit the states or the targets; a readout, loss or optimizer without targets; or a metric
            together with an optimizer.

    Warns:
        UserWarning: some eigenpairs did not converge. The dataset flags them.
    Source: docs/theory.md, "Modes: when, where and in which trials".

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(4, 5, 3))))
    >>> kp.analyze(flow, k=2).ntk_eigenvalue.shape
    (2,)
    """

    _check(flow, task, init)
    if task is not None and task.mask is not None and not all_steps:
        flow = flow.where(task.mask != 0)
    rng, report = Random(seed), progress or (lambda stage, done, total: None)
    training = training_of(optimizer, lr=lr, clip=clip, steps=steps, progress=report)
    dataset = _learning(flow, task, readout, loss, mask, seed, training, report)
    found = summary(flow, k, samples, rng, SOLVER, report)
    state, measure = _double(flow.solution.state), _measure_of(flow.ntk.domain)
    weights = measure[..., 0]
    numbers = found.numbers() | {"state_effective_rank": participation_ratio(state, weights=weights)}
    dataset = dataset.assign({name: _variable(name, numbers[name], flow) for name in WORDS})
    dataset = dataset.assign_coords(_coordinates(flow, task))
    for name, axis in KERNELS.items():
        dataset = dataset.assign(_kernel_modes(name, axis, found.kernels[name], getattr(found, name)))
    dataset = dataset.assign(measure=(("trial", "time"), weights)).assign(_components(state, weights, flow.mask))
    dataset = dataset.assign(_core_spectrum(flow, k, rng, report)).assign(_spectra(flow, found, k, rng, report))
    return dataset.assign_attrs(_attributes(flow, k, samples, seed, task, init))


def training_of(optimizer: Any, **options: Any) -> dict[str, Any] | None:
    """The options of a training by an optimizer, or None where there is none."""
    if optimizer is not None:
        return {"optimizer": optimizer} | options
    if given := [name for name in ("lr", "clip") if options[name] is not None]:
        raise ValueError(f"{', '.join(given)} is for an optimizer; say which, or leave it out")
    return None


def _learning(
    flow: Flow,
    task: TaskData | None,
    readout: Any,
    loss: Loss | None,
    mask: Any,
    seed: int,
    training: dict[str, Any] | None,
    progress: Progress,
) -> xr.Dataset:
    """What will be learnt of the task; nothing where that was not asked for."""
    import xarray as xr

    if readout is None and loss is None and mask is None and training is None:
        return xr.Dataset()
    if task is None or task.targets is None or readout is None:
        raise ValueError("what will be learnt needs both a readout and a task with targets; give them, or neither")
    progress("what will be learnt", 0, None)
    output = flow.output(readout, learn=True)
    loss = loss_of_task(task, output.values.shape) if loss is None else loss
    mask = task.mask if mask is None and not callable(loss) else mask
    found = learning_of(output, loss, task.targets, mask, task.outputs, seed, training)
    return found.assign_attrs(said_of_weights(mask))


def _core_spectrum(flow: Flow, k: int, rng: Random, progress: Progress) -> dict[str, Any]:
    """The core's eigenvalues and their multiplicities: all, or the leading ones where V does not give them."""
    spectrum = flow.core.spectrum()
    if spectrum is None:
        values = to_numpy(_leading(flow, "core", k, rng, progress).values)
        spectrum = values, np.ones(len(values), int)
    order = np.argsort(-spectrum[0], kind="stable")
    names = ("core_eigenvalue", "core_multiplicity")
    return {name: ("core_rank", entry[order]) for name, entry in zip(names, spectrum, strict=True)}


def _spectra(flow: Flow, found: Summary, k: int, rng: Random, progress: Progress) -> dict[str, Any]:
    """The leading eigenvalues of K and of the NTK, how good they are, and the modes of the NTK."""
    pairs = {"K": _leading(flow, "K", k, rng, progress), "ntk": found.modes}
    vectors = _blank(to_numpy(found.modes.vectors), flow.ntk.domain)
    variables: dict[str, Any] = {"ntk_mode": (("rank", "trial", "time", "unit"), vectors)}
    for name, modes in pairs.items():
        attributes = {"applications": modes.applications, "method": f"block Lanczos, tol {SOLVER.tol:g}"}
        for what in ("eigenvalue", "residual", "converged"):
            values = getattr(modes, what if what == "converged" else f"{what.removeprefix('eigen')}s")
            variables[f"{name}_{what}"] = ("rank", to_numpy(values), attributes)
    return variables


def _leading(flow: Flow, name: str, k: int, rng: Random, progress: Progress) -> Modes:
    op, stage = getattr(flow, name), f"leading eigenvalues of {name}"
    progress(stage, 0, None)
    most = min(k, op.domain.dimension, op.factor.domain.size)
    return eigs(op, most, OF_ALIKE, rng, callback=lambda calls, _residuals: progress(stage, calls, None))


def _check(flow: Flow, task: TaskData | None, init: Law | None) -> None:
    check_flow(flow)
    if init is not None and not hasattr(init, "matrix"):
        raise TypeError(f"init is {init!r}, expected the law of the weights, such as kp.models.Gaussian(g=1.5)")
    axes = flow.ntk.domain.axes
    if axes != AXES:
        lacks = sorted({*AXES} - {*axes})
        how = f"lacks {lacks}" if lacks else f"has the axes {axes}"
        raise ValueError(
            f"analyze takes states [trial, time, unit], and {flow.ntk.domain} {how}; take kp.summary, or name the axes "
            'of a sequence model in StaticProblem(..., axes=("trial", "time", "unit"))'
        )
    shape = flow.ntk.domain.shape[:2]
    if task is not None and task.inputs.shape[:2] != shape:
        raise ValueError(f"the task has [trial, time] {task.inputs.shape[:2]}, expected those of the flow, {shape}")


def _coordinates(flow: Flow, task: TaskData | None) -> dict[str, Any]:
    trials, _times, units = flow.ntk.domain.shape
    coordinates = {"trial": np.arange(trials), "time": ("time", *_times_of(flow, task)), "unit": np.arange(units)}
    labels = {} if task is None else {name: own for name, own in task.labels.items() if own.shape == (trials,)}
    return coordinates | {f"label_{name}": ("trial", values) for name, values in labels.items()}


def _times_of(flow: Flow, task: TaskData | None) -> tuple[np.ndarray, dict[str, str]]:
    """The times and what is known of their unit: nothing for an ODE, whose times are those of its own equation."""
    times = _double(flow.solution.t)
    if isinstance(flow.solution, ODESolution | SteppedSolution):
        return times, {}
    if task is None or task.dt is None:
        return times, {"units": "step"}
    return times * task.dt, {"units": "ms"}


def _attributes(flow: Flow, k: int, samples: int, seed: int, task: TaskData | None, init: Law | None) -> dict[str, Any]:
    trials, times, units = flow.ntk.domain.shape
    problem = flow.solution.problem
    model = problem if isinstance(problem, ImplicitProblem) else problem.model
    return {
        "title": f"Analysis of {_name_of(model)}",
        "model": problem.backend.models.describe(model),
        **({} if init is None else {"init": init.describe() if hasattr(init, "describe") else repr(init)}),
        **_equation(flow.solution),
        "state": f"{plural(trials, 'trial')} x {plural(times, 'time')} x {plural(units, 'unit')}",
        "parameters": flow.J.domain.size,
        "weight_sites": "; ".join(site.name for site in flow.sites),
        "dtype": str(flow.ntk.domain.dtype).removeprefix("torch."),
        **_said_of_steps(flow, task),
        "k": k,
        "samples": samples,
        "seed": seed,
        **versions_behind(problem),
    }


def _name_of(model: Any) -> str:
    """The name of a model's class or function; of one that wraps another, as the field of a CDE, that of the other."""
    inner = vars(model).get("call", getattr(model, "field", model)) if hasattr(model, "__dict__") else model
    parts = [getattr(model, name) for name in ("f", "g")] if type(model).__name__ == "DriftAndDiffusion" else [inner]
    return " and ".join(getattr(getattr(part, "func", part), "__name__", type(part).__name__) for part in parts)


def _said_of_steps(flow: Flow, task: TaskData | None) -> dict[str, str]:
    """Which steps do not count, and whether they are left out."""
    of_task, of_flow = None if task is None else task.mask, flow.mask
    if of_task is not None:
        return said_of_targets(of_task if of_flow is None else of_task * of_flow, of_flow is not None)
    if of_flow is None or of_flow.all():
        return {}
    return {"steps": f"{1 - of_flow.mean():.0%} of the steps do not count; they are left out"}


def _equation(solution: Solution) -> dict[str, str]:
    """What kind of problem it is, and how an ODE was solved."""
    if isinstance(solution, SteppedSolution):
        kind = type(solution.problem).__name__.removesuffix("Problem")
        sense = f" ({solution.problem.sde_type})" if isinstance(solution.problem, SDEProblem) else ""
        return {"problem": kind + sense, "solver": f"{solution.alg}, {solution.stats['steps']} steps"}
    if not isinstance(solution, ODESolution | HybridSolution):
        return {"problem": "a network over sequences" if isinstance(solution, NetworkSolution) else "discrete time"}
    method = solution.alg if isinstance(solution.alg, str) else type(solution.alg).__name__
    options = solution.options
    how = "given steps" if options["steps"] is not None else f"rtol {options['rtol']:g}, atol {options['atol']:g}"
    kind = type(solution.problem).__name__.removesuffix("Problem")
    kind = f"hybrid: an {kind} with jumps" if isinstance(solution, HybridSolution) else kind
    return {"problem": kind, "solver": f"{method}, {how}"}


def _variable(name: str, estimate: Estimate, flow: Flow) -> Any:
    attributes: dict[str, Any] = dict(zip(("long_name", "description"), WORDS[name], strict=True))
    attributes |= {what: getattr(estimate, what) for what in ("stderr", "method", "applications")}
    if name.endswith("effective_rank"):
        attributes["dimension"] = _dimension(name.removesuffix("_effective_rank"), flow)
    return (), estimate.value, attributes


def _dimension(name: str, flow: Flow) -> int:
    """The most that an effective rank can be."""
    state = flow.ntk.domain
    if name in ("core", "K", "ntk"):
        op = getattr(flow, name)
        return min(op.domain.dimension, op.factor.domain.size)
    return state.keep((KERNELS.get(name, "unit"),)).dimension


def _kernel_modes(name: str, axis: str, kernel: PartialTrace, found: Modes) -> dict[str, Any]:
    """A partial trace [axis, axis_other], its eigenvalues with standard errors, and its eigenvectors."""
    rank = f"{name}_rank"
    how = {"measure": f"orthonormal in sum {name}_measure a b"}
    values, exact, space = to_numpy(found.values), found.stderr is None, kernel.domain
    matrix = _blank(_blank(_double(kernel.matrix), space).T, space).T
    return {
        f"{name}_kernel": ((axis, f"{axis}_other"), matrix, {"applications": kernel.applications}),
        f"{name}_eigenvalue": (rank, values, {"method": "exact" if exact else "cross-validated"}),
        f"{name}_eigenvalue_stderr": (rank, 0 * values if exact else to_numpy(found.stderr)),
        f"{name}_mode": ((rank, axis), _blank(_double(found.vectors), space), how),
        f"{name}_measure": (axis, _measure_of(space)),
    }


def _double(matrix: Array) -> np.ndarray:
    return to_numpy(matrix).astype(np.float64)


def _measure_of(space: Space) -> np.ndarray:
    """How much each entry counts [*shape], ones where all count alike, and zeros where none does."""
    measure = 1.0 if space.measure is None else _double(space.measure)
    return np.where(_counts(space), measure, np.zeros(space.shape))


def _counts(space: Space) -> np.ndarray:
    """Where entries count [*shape]."""
    return np.broadcast_to(True if space.mask is None else to_numpy(space.mask), space.shape)


def _blank(values: np.ndarray, space: Space) -> np.ndarray:
    """Vectors [..., *shape] with NaN where nothing counts."""
    return values if space.mask is None else np.where(_counts(space), values, np.nan)


def _components(state: np.ndarray, weights: np.ndarray, mask: np.ndarray | None) -> dict[str, Any]:
    """Shares of the variance, projections [trial, time, pc] and directions [pc, unit] of the leading components."""
    found = pca(state, min(COMPONENTS, state.shape[2]), weights=weights)
    variables = {"pc_variance": ("pc", found.explained), "pc_direction": (("pc", "unit"), found.components)}
    scores = found.scores if mask is None else np.where(mask[..., None], found.scores, np.nan)
    return variables | {"pc_projection": (("trial", "time", "pc"), scores)}
