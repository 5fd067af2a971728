"""Training by a learning rule: each step moves the weights as the rule's operator says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse.linalg import lsmr

from kpflow_dyn._arrays import Array, eps_of, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._learning.losses import Loss, OutputLoss, gradient_in
from kpflow_dyn._linearize import linearize
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._shown import type_name
from kpflow_dyn._solve import solve
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.rows import CHEAP, euclidean_matrix
from kpflow_dyn.learning_rules._known import MakeRule, made, rule_of
from kpflow_dyn.learning_rules._rule import gradient_of
from kpflow_dyn.tasks._data import TaskData
from kpflow_dyn.train import Training, trained

OUT_OF_STEPS = 7  # of lsmr


def train(
    rule: str | MakeRule,
    model: Any,
    task: TaskData,
    readout: Any,
    *,
    steps: int,
    lr: float,
    loss: Loss | None = None,
    feedback: Any = None,
    batch: int | None = None,
    seed: int = 0,
    z0: Any = None,
    progress: bool = False,
    **options: Any,
) -> Training:
    """Train a recurrent model by a learning rule: each step linearises it, and moves its weights by -lr G q.

        q = C^T grad_y L, the gradient of the loss in the states; A = J G is the rule, so that dS = -lr A q + O(lr^2)

    The readout y = C z + c learns by its own gradient. With "bptt" this is `kp.train.fit` with optimizer="sgd". A rule
    that does not say how weights move (`functional_gradient_descent`, any other operator A on the states) moves them by
    the least-squares change, the smallest with J dtheta nearest to -lr A q.

    Args:
        rule: a function of `kp.learning_rules`, its name, or your own one, flow -> `Rule`. What it takes besides the
            flow by these names it gets: q; seed, another one in each step; previous, its result in the step before
            (`shampoo` goes on with its sums, `feedback_alignment` keeps its matrices); readout; and loss, a function of
            the outputs, where this is no squared error.
        model, task, readout, steps, lr, loss, batch, progress: as in `kp.train.fit`.
        z0: as in `kp.train.fit`; with a batch one array [trial, unit] or [unit].
        feedback: B in q = B grad_y L in the place of the readout's transpose, as in RFLO and e-prop with random
            feedback: [unit, out], or "random" for independent normal entries of the mean square of C's.
        seed: for the draws of trials, of feedback, and of the rule.
        options: of the rule, such as k=2 or damping=0.1.

    Raises:
        TypeError, ValueError: an unknown rule or option, feedback of another shape; else as `kp.train.fit` and the
            rule.

    Warns:
        UserWarning: a loss that leaves the finite numbers, which ends the training with `success=False`; or a
            least-squares change that did not converge.
    Source: docs/theory.md, "Learning rules and optimisers".

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> task = kp.tasks.FlipFlop(bits=1).sample(trials=8, seed=0)
    >>> cell, readout = torch.nn.RNNCell(1, 8), torch.nn.Linear(8, 1)
    >>> training = kp.learning_rules.train("truncated_bptt", cell, task, readout, steps=5, lr=0.05, k=2)
    >>> bool(training.losses[-1] < training.losses[0])
    True
    """
    follower = _Follower(rule_of(rule), options, feedback, z0, seed)
    return trained(
        model,
        task,
        readout,
        steps=steps,
        lr=lr,
        batch=batch,
        loss=loss,
        z0=z0,
        seed=seed,
        progress=progress,
        gradient=follower.gradient,
    )


class _Follower:
    """What a rule says, step after step."""

    def __init__(self, make: MakeRule, options: Mapping[str, Any], feedback: Any, z0: Any, seed: int) -> None:
        self._make, self._options, self._feedback, self._z0 = make, options, feedback, z0
        self._seed = seed
        self._rule: Operator | None = None
        self._steps = 0

    def gradient(self, model: Any, readout: Any, x: Array, trials: Any, loss: OutputLoss) -> dict[str, Array]:
        """G q of the model's parameters, by name, on these trials."""
        flow = linearize(solve(DiscreteProblem(model, x, _of_trials(self._z0, trials))))
        y = flow.output(readout)
        error = gradient_in(y.values, loss, flow.solution.problem.backend.transforms)
        q = flow.output(self._back(y.weight, readout)).C.T.mv(error)
        self._rule = self._made(flow, q, readout, loss)
        self._steps += 1
        return flow.as_parameters(_changes(self._rule, flow, q))

    def _back(self, weight: Array, readout: Any) -> Any:
        """The matrix through whose transpose errors reach the states."""
        if self._feedback is None:
            return readout
        if isinstance(self._feedback, str):
            self._feedback = _random_feedback(self._feedback, to_numpy(weight), self._seed)
        B, expected = to_numpy(self._feedback), tuple(weight.shape[::-1])
        if B.shape != expected:
            raise ValueError(f"feedback has shape {B.shape}, expected [unit, out] = {list(expected)}")
        return B.T

    def _made(self, flow: Flow, q: Array, readout: Any, loss: OutputLoss) -> Operator:
        of_training = {"q": q, "seed": int(np.random.default_rng([self._seed, self._steps]).integers(2**31))}
        of_training |= {"previous": self._rule, "readout": readout}
        of_training |= {} if loss.quadratic else {"loss": loss}
        found = made(self._make, flow, of_training, self._options)
        if not isinstance(found, Operator):
            raise TypeError(f"the rule gave {type_name(found)}, expected a kp.learning_rules.Rule or another operator")
        return found


def _of_trials(z0: Any, trials: Any) -> Any:
    """The start of some trials."""
    if z0 is None or isinstance(trials, slice):
        return z0
    if getattr(z0, "ndim", 0) == 1:
        return z0
    if getattr(z0, "ndim", 0) != 2:
        raise ValueError(
            "with a batch, z0 must be one array [trial, unit] or [unit]; train on all trials, or lay it out so"
        )
    return z0[trials]


def _random_feedback(word: str, weight: np.ndarray, seed: int) -> np.ndarray:
    if word != "random":
        raise ValueError(
            f"feedback is {word!r}, expected 'random', a matrix [unit, out], or None for the readout's own"
        )
    return np.random.default_rng(seed).normal(size=weight.shape[::-1]) * np.mean(weight**2) ** 0.5


def _changes(rule: Operator, flow: Flow, q: Array) -> Array:
    """G q, or the least-squares changes of the weights for A q."""
    G = gradient_of(rule, flow)
    if G is not None:
        return G.mv(q)
    J, space = flow.J, flow.J.codomain
    wanted = to_numpy(space.to_euclidean(rule.mv(q))).reshape(-1)
    if min(J.domain.size, space.size) <= CHEAP:
        found = np.linalg.lstsq(to_numpy(euclidean_matrix(J)), wanted)[0]
    else:
        tolerance = 10 * eps_of(q)
        found, stopped = lsmr(J.to_scipy(), wanted, atol=tolerance, btol=tolerance, conlim=0)[:2]
        if stopped == OUT_OF_STEPS:
            warnings.warn(
                "the least-squares change of the weights did not converge, so the step is not quite the rule's; take a "
                "smaller network, fewer trials, or a rule with a gradient of its own",
                stacklevel=2,
            )
    return like_numpy(found.astype(wanted.dtype), q)
