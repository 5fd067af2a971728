"""What other libraries call what a problem and its solve are given, and what it is called here.

One table: errors about unknown names read it, and docs/guides/neural_ode.md shows it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LIBRARIES = ("diffrax", "torchdiffeq", "torchode", "scipy", "SciML")


@dataclass(frozen=True)
class Term:
    """What one thing is called.

    Attributes:
        here: how it is given here.
        keywords: the names of arguments that stand for it, wherever they come from.
        there: what each of `LIBRARIES` calls it, "" where it has none.
    """

    here: str
    keywords: tuple[str, ...]
    there: tuple[str, ...] = ()


TERMS = (
    Term(
        "the field `f` of `kp.ODEProblem(f, z0, t)`",
        ("terms", "term", "func", "fun", "vector_field"),
        ("ODETerm(f), MultiTerm", "func", "ODETerm(f)", "fun", "f"),
    ),
    Term("its start `z0`", ("y0", "u0"), ("y0", "y0", "y0", "y0", "u0")),
    Term(
        "its times `t`, a grid [time]",
        ("ts", "t_eval", "saveat", "teval"),
        ("SaveAt(ts=t)", "t", "t_eval", "t_eval", "saveat"),
    ),
    Term(
        "its times `t`, a span (t0, t1), whose nodes follow the steps",
        ("t0", "t1", "t_span", "tspan", "t_start", "t_end", "save_everystep", "save_steps"),
        ("t0, t1, SaveAt(steps=True)", "", "t_start, t_end", "t_span", "tspan"),
    ),
    Term(
        "`solution(t)`, always there",
        ("dense", "dense_output", "interp", "calck"),
        ("SaveAt(dense=True)", "", "", "dense_output", "sol(t)"),
    ),
    Term(
        "a part of `solution.state` [trial, time, unit], which has t_0, the end and all units",
        ("save_start", "save_end", "save_on", "save_idxs", "subs", "fn"),
        ("SaveAt(t0, t1, subs)", "", "", "", "save_start, save_end, save_idxs"),
    ),
    Term("its constants `args=`", ("p", "params_of_f"), ("args", "", "args", "args", "p")),
    Term(
        "the algorithm `alg` of `kp.solve(problem, alg)`",
        ("solver", "method", "step_method", "algorithm"),
        ("solver", "method", "step_method", "method", "alg"),
    ),
    Term(
        "`rtol=`, `atol=` of `kp.solve`",
        ("reltol", "abstol"),
        ("PIDController(rtol, atol)", "rtol, atol", "PIDController(atol, rtol, ...)", "rtol, atol", "reltol, abstol"),
    ),
    Term(
        "`steps=` of `kp.solve`, a length or the times to step to",
        ("dt", "dt0", "step_size", "stepsize_controller", "controller", "adaptive", "grid_constructor", "grid_points"),
        (
            "ConstantStepSize(), dt0; StepTo(ts)",
            "options: step_size, grid_constructor",
            "FixedStepController, dt0",
            "",
            "dt",
        ),
    ),
    Term(
        "`max_steps=` of `kp.solve`",
        ("max_num_steps", "maxiters"),
        ("max_steps", "options: max_num_steps", "max_steps", "", "maxiters"),
    ),
    Term(
        "nothing: the method chooses its steps by the tolerances; give `steps=` to choose them yourself",
        ("first_step", "min_step", "max_step", "dtmin", "dtmax", "dt_min", "dt_max", "safety", "ifactor", "dfactor"),
        (
            "dt0, dtmin, dtmax",
            "options: first_step, min_step, max_step",
            "dt_min, dt_max",
            "first_step",
            "dtmin, dtmax",
        ),
    ),
    Term(
        "a part of `stepsize_controller=diffrax.PIDController(...)` in JAX, or of torchode's step size controller; "
        "that of torchdiffeq cannot be changed",
        (
            *("pcoeff", "icoeff", "dcoeff", "factormin", "factormax", "error_order", "norm", "internalnorm"),
            *("force_dtmin", "gamma", "beta1", "beta2", "qmax", "qmin", "qsteady_min", "qsteady_max", "qoldinit"),
        ),
        ("PIDController(pcoeff, icoeff, ...)", "options: norm", "PIDController(pcoeff, ...)", "", "beta1, qmax, gamma"),
    ),
    Term(
        "nothing: a solve that fails raises `kp.SolveError`, which names trials and holds the solution of the others",
        ("throw", "verbose", "unstable_check", "isoutofdomain"),
        ("throw", "", "", "", "verbose, isoutofdomain"),
    ),
    Term(
        "nothing: a solve draws no bar",
        ("progress_meter", "progress", "progress_steps", "progress_name", "progress_message"),
        ("progress_meter", "", "", "", "progress"),
    ),
    Term(
        "a new problem, `problem.remake(z0=..., t=...)`, which starts from a state and chooses its own steps",
        ("made_jump", "solver_state", "controller_state", "extra", "extra_solver_state"),
        ("solver_state, controller_state, made_jump", "", "", "", "init"),
    ),
    Term(
        "nothing: implicit methods take derivatives by autograd",
        (
            *("jac", "jac_sparsity", "jac_prototype", "lband", "uband", "tgrad", "linsolve", "nlsolve", "root_finder"),
            *("vectorized", "max_iters", "max_order"),
        ),
        ("root_finder", "options: max_iters", "", "jac, jac_sparsity, lband, uband", "jac, jac_prototype"),
    ),
    Term("the dtype of `z0`; its numbers stay as they are", ("dtype", "alias_u0"), ("", "", "", "", "")),
    Term(
        "the attribute `jumps` of a callable `x`; adaptive steps end where samples bend",
        ("jump_t", "step_t", "jump_ts", "step_ts", "tstops", "d_discontinuities", "perturb"),
        ("ClipStepSizeController", "options: jump_t, step_t", "", "", "tstops"),
    ),
    Term(
        "`sensealg=` of `kp.linearize`: `DiscreteAdjoint()`, or `InterpolatingAdjoint()` for that of the equation",
        ("adjoint", "sensealg", "adjoint_method", "adjoint_rtol", "adjoint_atol", "adjoint_params", "adjoint_options"),
        ("adjoint", "odeint_adjoint", "AutoDiffAdjoint", "", "sensealg"),
    ),
    Term(
        "`kp.SecondOrderProblem(f, z0, v0, t)`",
        ("du0", "v0"),
        ("", "", "", "", "SecondOrderODEProblem"),
    ),
    Term(
        "`kp.models.Hybrid`, a field with events and their resets",
        ("event", "events", "event_fn", "callback", "discrete_terminating_event", "merge_callbacks"),
        ("event", "odeint_event", "", "events", "callback"),
    ),
    Term(
        "`kp.SDEProblem(f, g, z0, t)`",
        ("control", "sde", "drift", "diffusion"),
        ("ControlTerm", "", "", "", "SDEProblem"),
    ),
    Term(
        "`brownian=` of `kp.SDEProblem`, a seed or the path",
        ("noise", "bm", "seed", "entropy", "levy_area", "levy_area_approximation"),
        ("VirtualBrownianTree", "", "", "", "noise, seed"),
    ),
    Term(
        "the output of the diffusion g of a `kp.SDEProblem`: [unit] for diagonal noise, else [unit, noise]",
        ("noise_type", "noise_rate_prototype"),
        ("", "", "", "", "noise_rate_prototype"),
    ),
    Term("one more unit of the state, with this integrand as its drift", ("logqp",), ("", "", "", "", "")),
    Term("methods called `f` and `g` of the module", ("names",), ("", "", "", "", "")),
    Term("`kp.CDEProblem(f, z0, t, path)`", ("path", "coeffs"), ("ControlTerm(f, path)", "", "", "", "")),
    Term(
        "`kp.DDEProblem(f, history, t, delays)`",
        ("delays", "lags", "constant_lags", "dependent_lags", "h", "history", "neutral", "order_discontinuity_t0"),
        ("", "", "", "", "DDEProblem"),
    ),
)


OF = {  # what others call the arguments of one thing of this package, where that is not said above or is otherwise
    "Event": (
        Term("`condition`, a function of (t, z)", ("cond_fn", "event_fn", "event", "fun", "guard", "surface")),
        Term(
            "`reset`, a function of (t, z) that gives the state behind the event",
            ("affect", "affect!", "callback", "jump", "jump_map", "effect", "reset_fn", "action"),
        ),
        Term(
            "`direction=1` (from below), -1 (from above) or 0, with an event for each where their resets differ",
            ("affect_neg", "is_upcrossing", "rising", "upcrossing"),
        ),
        Term(
            "nothing: a solve goes on behind an event, and `solution.events` says when it was",
            ("terminal", "terminate", "terminates"),
        ),
        Term("`at=`, given times, or `every=`", ("times", "tstops", "t", "period", "dt", "interval")),
        Term("`offset=`", ("phase", "start", "initial_affect", "t0")),
        Term(
            "nothing: an event is located to round-off",
            ("root_finder", "rootfind", "abstol", "reltol", "atol", "rtol", "interp_points"),
        ),
    ),
    "Hybrid": (
        Term(
            "given behind the flow: Hybrid(flow, event, ...)",
            ("event", "events", "callback", "callbacks", "reset", "resets"),
        ),
        Term("the field `flow`", ("f", "func", "term", "terms", "vector_field", "field")),
        Term("`max_events=`, how many may happen in a trial", ("max_jumps", "max_steps")),
    ),
    "ClosedLoop": (
        Term(
            "`every=`, the time between samples",
            (
                "dt",
                "Ts",
                "ts",
                "h",
                "period",
                "sample_time",
                "sampling_time",
                "sampling_period",
                "interval",
                "timestep",
            ),
        ),
        Term(
            "an input `x` of the problem: the policy sees [z, x_t], one sample of x at each sampling time",
            ("noise", "measurement_noise", "reference", "setpoint", "disturbance", "x", "inputs"),
        ),
        Term(
            "`delay=`; that of a measurement, too: the control that answers it acts so much later",
            ("measurement_delay", "sensor_delay", "input_delay", "actuator_delay", "latency", "dead_time", "tau"),
        ),
        Term("nothing: with `every=` the control is held between samples (zero-order)", ("hold", "method", "zoh")),
        Term(
            "`saturation=(low, high)`",
            ("bounds", "limits", "clip", "u_max", "umax", "control_limits", "input_limits", "control_bounds"),
        ),
        Term("`rate_limit=`", ("slew_rate", "slew", "rate", "max_rate", "du_max")),
        Term("`memory=`", ("hidden_size", "hidden", "memory_size", "state_dim")),
        Term("`readout=`", ("output", "decoder", "head", "out")),
        Term(
            "part of the policy: a module that takes y = C z, or what else it measures, out of its argument",
            ("C", "observe", "observation", "measurement", "output_matrix", "outputs"),
        ),
        Term("`kp.models.Hybrid(loop, event, ...)`", ("event", "events", "contacts", "impact")),
    ),
    "DDEProblem": (
        Term(
            "`delays=`, numbers",
            ("tau", "taus", "lag", "lags", "delay", "constant_lags", "constant_delays", "dde_lags"),
        ),
        Term("`history=`, a state or a function of t", ("z0", "y0", "u0", "h", "h0", "phi", "past", "initial")),
        Term("missing: a delay is a constant number", ("dependent_lags", "order_discontinuity_t0", "neutral")),
    ),
    "SDEProblem": (
        Term("`brownian=`, a seed or a path", ("key", "rng", "brownian_motion", "W", "increments")),
        Term("the drift `f`", ("drift", "terms", "sde", "func")),
        Term("the diffusion `g`", ("diffusion", "noise_fn", "sigma")),
        Term('`sde_type=`, "ito" or "stratonovich"', ("interpretation", "calculus", "alg_hints")),
        Term("`paths=`", ("trajectories", "samples", "n_paths", "num_paths", "batch")),
    ),
    "CDEProblem": (Term("the path `path`", ("X", "x", "coeffs", "coefficients", "control", "spline", "data")),),
}


METHODS = {  # what others call a method, in small letters: its name here in torch, and in JAX
    "rk45": ('"dopri5"', "diffrax.Dopri5()"),
    "dp5": ('"dopri5"', "diffrax.Dopri5()"),
    "dopri5": ('"dopri5"', "diffrax.Dopri5()"),
    "rk23": ('"bosh3"', "diffrax.Bosh3()"),
    "bosh3": ('"bosh3"', "diffrax.Bosh3()"),
    "bs3": ('"bosh3"', "diffrax.Bosh3()"),
    "dop853": ('"dopri8"', "diffrax.Dopri8()"),
    "dopri8": ('"dopri8"', "diffrax.Dopri8()"),
    "tsit5": ('torchode.Tsit5(), or "dopri5"', "diffrax.Tsit5()"),
    "euler": ('"euler"', "diffrax.Euler()"),
    "midpoint": ('"midpoint"', "diffrax.Midpoint()"),
    "heun": ('"heun2"', "diffrax.Heun()"),
    "heun2": ('"heun2"', "diffrax.Heun()"),
    "ralston": ('"heun2"', "diffrax.Ralston()"),
    "rk4": ('"rk4"', "diffrax.Tsit5() with steps="),
    **dict.fromkeys(
        ("radau", "bdf", "lsoda", "rodas5", "rosenbrock23", "kvaerno5", "trbdf2"),
        (
            'the problem in JAX, as torchdiffeq has no implicit method with derivatives, or "scipy_solver"',
            "diffrax.Kvaerno5()",
        ),
    ),
}


def method_here(alg: object, framework: str) -> str:
    """What an algorithm of another library is called here, "" where that is not known."""
    name = (alg if isinstance(alg, str) else alg.__name__ if isinstance(alg, type) else type(alg).__name__).lower()
    found = METHODS.get(name.removesuffix("()"))
    return f"; {name} is here {found[framework == 'jax']}" if found else ""


def refuse_unknown(given: Iterable[str], known: Sequence[str], who: str, of: str) -> None:
    """Raise for names that are not known to what is called `of` in `OF`, by what they are called here."""
    if unknown := set(given) - set(known):
        raise TypeError(f"{who} got {sorted(unknown)}, expected some of {', '.join(known)}{advice_on(unknown, of)}")


def advice_on(names: Iterable[str], of: str = "") -> str:
    """What unknown arguments are called here, one clause for each that is known elsewhere."""
    known = {keyword: term.here for term in (*TERMS, *OF.get(of, ())) for keyword in term.keywords}
    return "".join(f"; {name}= is here {known[name]}" for name in sorted(names) if name in known)


def table() -> str:
    """The table in Markdown."""
    rows = [["here", *LIBRARIES], ["---"] * (1 + len(LIBRARIES))]
    rows += [[term.here, *(f"`{name}`" if name else "" for name in term.there)] for term in TERMS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
