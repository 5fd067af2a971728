"""What users of other libraries write, understood or told what it is called here; and errors of JAX in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._problems import translations

pytestmark = pytest.mark.usefixtures("x64")

GRID = [0.0, 0.1, 0.3]


def rate(p: dict, t: Any, y: Any, args: Any) -> Any:
    return -p["a"] * y


def parameters(*values: float) -> dict:
    return {"a": jnp.asarray(values)}


def field(*values: float) -> Any:
    return jax.tree_util.Partial(rate, parameters(*values))


Z0 = np.ones((3, 2))


def posed(f: Any, **more: Any) -> kp.ODEProblem:
    return kp.ODEProblem(f, jnp.asarray(Z0), GRID, **more)


class TorchField(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(2).double())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.a * y


IN_TORCH = kp.ODEProblem(TorchField(), torch.tensor(Z0), GRID)


def far(a: Any, b: Any) -> float:
    return float(np.abs(to_numpy(a) - to_numpy(b)).max())


def test_terms_of_diffrax() -> None:
    plain = kp.solve(posed(field(1.0, 3.0)))
    assert far(kp.solve(posed(diffrax.ODETerm(field(1.0, 3.0)))).state, plain.state) == 0
    parts = diffrax.MultiTerm(diffrax.ODETerm(field(0.4, 1.0)), diffrax.ODETerm(field(0.6, 2.0)))
    both = posed(parts)
    assert far(kp.solve(both).state, plain.state) < 1e-12
    assert len(both.backend.models.parameters_of(both.f)) == 2
    path = diffrax.LinearInterpolation(jnp.asarray(GRID), jnp.ones((3, 1)))
    with pytest.raises(TypeError, match=r"ControlTerm, expected a field.*kp.SDEProblem.*kp.CDEProblem"):
        posed(diffrax.ControlTerm(field(1.0, 3.0), path))
    with pytest.raises(TypeError, match="solves fields that are split"):
        kp.solve(posed(field(1.0, 3.0)), diffrax.KenCarp4())
    with pytest.raises(ValueError, match=r"moves the parts of a pair \(q, v\) in turn"):
        kp.solve(posed(field(1.0, 3.0)), diffrax.SemiImplicitEuler())


def test_controllers_of_diffrax() -> None:
    problem, alg = posed(field(1.0, 3.0)), diffrax.Dopri5()
    constant = kp.solve(problem, alg, stepsize_controller=diffrax.ConstantStepSize(), dt0=0.05)
    assert far(constant.state, kp.solve(problem, alg, steps=0.05).state) == 0
    given = kp.solve(problem, alg, stepsize_controller=diffrax.StepTo(jnp.asarray([0.0, 0.1, 0.2, 0.3])))
    assert given.stats["steps"] == 3
    chosen = diffrax.PIDController(rtol=1e-9, atol=1e-9, pcoeff=0.2, icoeff=0.4, dtmax=0.02)
    found = kp.solve(problem, alg, stepsize_controller=chosen)
    assert found.options["rtol"] == 1e-9 and found.steps.dt.max() <= 0.02 + 1e-12
    again = kp.solve(problem, alg, **found.options)  # as a gradient flow does
    assert again.stats == found.stats and far(again.state, found.state) == 0
    for controller, message in [
        (diffrax.ConstantStepSize(), "needs dt0="),
        (diffrax.ClipStepSizeController(chosen, jump_ts=jnp.asarray([0.1])), r"x\.jumps"),
        ("fast", "give rtol=, atol="),
    ]:
        with pytest.raises(TypeError, match=message):
            kp.solve(problem, alg, stepsize_controller=controller)


def test_options_of_torchdiffeq() -> None:
    found = kp.solve(IN_TORCH, "rk4", options={"step_size": 0.1, "max_num_steps": 50})
    assert found.stats["steps"] == 3 and found.options["max_steps"] == 50
    with pytest.raises(TypeError, match=r"options has .*jump_t.*jump_t= is here the attribute `jumps`"):
        kp.solve(IN_TORCH, options={"jump_t": [0.1]})


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("event", "kp.models.Hybrid"),
        ("callback", "kp.models.Hybrid"),
        ("delays", "kp.DDEProblem"),
        ("saveat", "times `t`, a grid"),
        ("t_eval", "times `t`, a grid"),
        ("dense_output", r"`solution\(t\)`"),
        ("method", "the algorithm `alg`"),
        ("reltol", "`rtol=`"),
        ("max_num_steps", "`max_steps="),
        ("adjoint", "`sensealg=` of `kp.linearize`"),
        ("adjoint_params", "`sensealg=`"),
        ("first_step", "the method chooses its steps"),
        ("throw", "kp.SolveError"),
        ("progress_meter", "draws no bar"),
        ("pcoeff", "stepsize_controller=diffrax.PIDController"),
        ("made_jump", "problem.remake"),
        ("save_idxs", "a part of `solution.state`"),
        ("jac", "by autograd"),
        ("noise_type", "output of the diffusion g"),
        ("bm", "`brownian=`"),
        ("seed", "`brownian=`"),
    ],
)
def test_what_a_solve_is_given_elsewhere(name: str, here: str) -> None:
    for problem in (IN_TORCH, posed(field(1.0, 3.0))):
        with pytest.raises(TypeError, match=here):
            kp.solve(problem, **{name: 1})


def test_methods_by_other_names() -> None:
    for alg, torch_name, jax_name in [
        ("RK45", '"dopri5"', r"Dopri5\(\)"),
        ("LSODA", "scipy_solver", r"Kvaerno5\(\)"),
        ("tsit5", "torchode.Tsit5", r"Tsit5\(\)"),
    ]:
        with pytest.raises(ValueError, match=f"is here .*{torch_name}"):
            kp.solve(IN_TORCH, alg)
        with pytest.raises(TypeError, match=f"is here .*{jax_name}"):
            kp.solve(posed(field(1.0, 3.0)), alg)
    with pytest.raises(TypeError, match="dopri5 is here"):
        kp.solve(IN_TORCH, diffrax.Dopri5())


def test_dt0_alone_says_what_to_do() -> None:
    with pytest.raises(TypeError, match="dt0= is here `steps=`"):
        kp.solve(posed(field(1.0, 3.0)), dt0=0.1)


def test_what_a_problem_is_given_elsewhere() -> None:
    with pytest.raises(TypeError, match="p= is here its constants `args=`; tspan= is here its times"):
        kp.ODEProblem(TorchField(), torch.tensor(Z0), tspan=(0.0, 1.0), p=2.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"y0= is here its start `z0`"):
        kp.ODEProblem(f=TorchField(), y0=torch.tensor(Z0), t=GRID)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="constants of f are args="):
        kp.ODEProblem(TorchField(), torch.tensor(Z0), (0.0, 1.0), {"k": 2.0})  # the place of SciML's p
    with pytest.raises(TypeError, match=r"remake got .*u0= is here its start `z0`"):
        IN_TORCH.remake(u0=torch.tensor(Z0))


def test_the_guide_has_the_table() -> None:
    guide = Path(__file__).parents[1] / "docs" / "guides" / "neural_ode.md"
    assert translations.table() in guide.read_text()
    assert all(len(term.there) == len(translations.LIBRARIES) for term in translations.TERMS)
    keywords = [keyword for term in translations.TERMS for keyword in term.keywords]
    assert len(set(keywords)) == len(keywords)


# errors of JAX

BODIES = {
    "branch": (lambda z: z if z[0] > 0 else -z, "Python branch.*jnp.where.*lax.cond"),
    "float": (lambda z: z * float(z[0]), r"float\(\).*leave it an array"),
    "numpy": (lambda z: z + np.sin(z), r"numpy.*jnp.sin for np.sin"),
    "range": (lambda z: sum(z for _ in range(z.astype(int)[0])), "range.*lax.fori_loop"),
    "mask": (lambda z: z[z > 0].sum() * z, "jnp.where.mask, values, 0"),
}


class Model(eqx.Module):
    """Any of the bodies, of a state and what else comes."""

    w: jax.Array
    body: Any = eqx.field(static=True)
    state: int = eqx.field(static=True)

    def __call__(self, *given: Any) -> Any:
        return self.body(self.w * given[self.state])


def problems(body: Any) -> dict[str, kp.Solution]:
    """Each kind of problem, of a model with this body."""
    model, x = [Model(jnp.ones(2), body, n) for n in (0, 1)], jnp.ones((3, 2))
    return {
        "ode": kp.ODEProblem(model[1], x, GRID),
        "discrete": kp.DiscreteProblem(model[1], jnp.ones((3, 4, 2)), x),
        "static": kp.StaticProblem(model[0], x),
        "fixed point": kp.FixedPointProblem(model[1], x, x),
    }


@pytest.mark.parametrize("name", BODIES)
def test_what_jax_cannot_trace_is_said_in_words(name: str) -> None:
    body, message = BODIES[name]
    for problem in problems(body).values():
        with pytest.raises(ValueError, match=message) as caught:
            kp.solve(problem)
        assert "test_translations.py, line" in str(caught.value) and caught.value.__cause__ is not None


def test_a_model_of_all_trials_in_jax() -> None:
    def whole(z: Any) -> Any:
        return z / jnp.linalg.norm(z, axis=1)[:, None]

    for problem in problems(whole).values():
        with pytest.raises(ValueError, match=r"takes all trials at once: write it for one, without the axis"):
            kp.solve(problem)


def test_a_field_of_one_trial_in_torch() -> None:
    class OfOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(2, 2).double())

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.W @ z

    with pytest.raises(ValueError, match="takes one trial: write it for all at once"):
        kp.solve(kp.ODEProblem(OfOne(), torch.ones(3, 2).double(), GRID))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_internal_options_are_unknown(framework: str) -> None:
    like = torch.ones(1, 2).double() if framework == "torch" else jnp.ones((1, 2))
    f = kp.models.MLPField(2, 3).double() if framework == "torch" else eqx.nn.Linear(2, 2, key=jax.random.key(0))
    f = f if framework == "torch" else jax.tree_util.Partial(lambda net, t, z: net(z), f)
    with pytest.raises(TypeError, match="unknown options"):
        kp.solve(kp.ODEProblem(f, like, (0.0, 1.0)), controller=10)


def test_a_controller_has_its_own_tolerances() -> None:
    f = jax.tree_util.Partial(lambda net, t, z: net(z), eqx.nn.Linear(2, 2, key=jax.random.key(0)))
    problem, controller = kp.ODEProblem(f, jnp.ones((1, 2)), [0.0, 0.5, 1.0]), diffrax.PIDController(1e-4, 1e-5)
    with pytest.raises(TypeError, match="rtol of its own"):
        kp.solve(problem, stepsize_controller=controller, rtol=1e-9)
    found = kp.solve(problem, stepsize_controller=controller)
    assert found.options["rtol"] == 1e-4
    kp.solve(problem, **found.options)  # as gradient flows do


def test_options_of_torchdiffeq_are_a_dict() -> None:
    with pytest.raises(TypeError, match="dict"):
        kp.solve(kp.ODEProblem(kp.models.MLPField(2, 3).double(), torch.ones(1, 2).double(), (0.0, 1.0)), options=5)
