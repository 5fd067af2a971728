"""Numbers of the neural tangent kernel as differentiable functions of the parameters, for a term of a loss.

From random vectors xi_i of the states, which a seed fixes, and g_i = J* xi_i alone,

    tr A = E |g_i|^2        |A|_F^2 = E (g_i . g_j)^2, i != j        tr A B = E g_i . J* B xi_i

so that one further backward pass gives their gradients. With `probes=None` the xi are all unit vectors, and the sums
are exact. Under a loss with Hessian h in the states, those of h^{1/2} A h^{1/2} are the same sums with J* h xi_i in the
place of one g_i: tr h A = E (J* h xi) . (J* xi).
"""

import math
from collections.abc import Callable

from kpflow_dyn._arrays import Array, Random, array_namespace, concretely, device
from kpflow_dyn._backend import Transforms
from kpflow_dyn._learning.losses import gradient_in
from kpflow_dyn._numbers.estimate import frobenius_norm
from kpflow_dyn._problems.problems import DiscreteProblem, StaticProblem
from kpflow_dyn._problems.starts import without_gradient
from kpflow_dyn._shown import type_name
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.rows import on_rows

Posed = DiscreteProblem | StaticProblem


def trace(
    problem: Posed, probes: int | None = 16, seed: int = 0, loss: Callable[[Array], Array] | None = None
) -> Array:
    """tr A = E |J* xi|^2 of A = J J*, differentiable in the parameters of the problem's model.

    Args:
        problem: a DiscreteProblem, whose states are those of `solve`; or a StaticProblem, whose output is the state. In
            JAX its model may be traced: `jax.grad(lambda cell: kp.regularizers.trace(kp.DiscreteProblem(cell, x)))`.
        probes: how many random vectors; None for the exact sum over all unit vectors.
        seed: of the vectors. Change it from step to step of a training.
        loss: of the states, such as `kp.cross_entropy(target, readout)`: then A is h^{1/2} J J* h^{1/2} with its
            Hessian h, the kernel by which the gradient of this loss decays.

    Returns:
        A number of shape (), in torch with a graph.

    Raises:
        TypeError: another problem.
        ValueError: fewer than 2 probes.
    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990).

    >>> import torch, kpflow_dyn as kp
    >>> cell = torch.nn.GRUCell(2, 4)
    >>> found = kp.regularizers.trace(kp.DiscreteProblem(cell, torch.randn(2, 3, 2)))
    >>> found.backward()
    >>> cell.weight_hh.grad.shape
    torch.Size([12, 4])
    """
    return _Pulled(problem, probes, seed, loss).trace()


def effective_rank(
    problem: Posed, probes: int | None = 16, seed: int = 0, loss: Callable[[Array], Array] | None = None
) -> Array:
    """er(A) = (tr A)^2 / |A|_F^2, differentiable. The ratio of estimates, so biased for few probes.

    Args and Raises as `trace`.

    Source: docs/theory.md, "How many: effective ranks".

    >>> import torch, kpflow_dyn as kp
    >>> problem = kp.DiscreteProblem(torch.nn.RNNCell(2, 4), torch.randn(2, 3, 2))
    >>> kp.regularizers.effective_rank(problem, probes=None).item() < 24
    True
    """
    pulled = _Pulled(problem, probes, seed, loss)
    return pulled.trace() ** 2 / pulled.square()


def alignment(problem: Posed, other: Operator, probes: int | None = 16, seed: int = 0) -> Array:
    """cos(A, B) = tr(A B) / (|A|_F |B|_F) with a fixed symmetric operator B, differentiable in what A depends on.

    Args:
        problem, probes, seed: as for `trace`.
        other: B on the states, such as `flow.ntk` of an earlier checkpoint.

    Raises:
        ValueError: also for a B on other states, or one that is not symmetric.
    Source: Cristianini, Shawe-Taylor, Elisseeff, Kandola, "On kernel-target alignment" (2001).

    >>> import torch, kpflow_dyn as kp
    >>> problem = kp.DiscreteProblem(torch.nn.RNNCell(2, 4), torch.randn(2, 3, 2))
    >>> before = kp.linearize(kp.solve(problem)).ntk
    >>> round(kp.regularizers.alignment(problem, before, probes=None).item(), 4)
    1.0
    """
    if not other.symmetric or other.domain.measure is not None:
        raise ValueError(f"expected a symmetric operator on states without a measure, got {other!r}")
    pulled = _Pulled(problem, probes, seed)
    if pulled.size != other.domain.size:
        raise ValueError(f"the operator acts on {other.domain}, and the states have {pulled.size} entries")
    with concretely(problem.data):
        images, size = on_rows(other)(pulled.rows), frobenius_norm(other).value
    return pulled.mean(pulled.back(images)) / (pulled.square() ** 0.5 * size)


class _Pulled:
    """Rows xi of the states and g = J* xi, differentiable."""

    def __init__(
        self, problem: Posed, probes: int | None, seed: int, loss: Callable[[Array], Array] | None = None
    ) -> None:
        if not isinstance(problem, Posed):
            raise TypeError(f"got {type_name(problem)}, expected a DiscreteProblem or a StaticProblem")
        if probes is not None and probes < 2:
            raise ValueError(f"probes = {probes}, expected at least 2, or None for exact sums")
        if isinstance(problem, DiscreteProblem):
            problem = without_gradient(problem, stacklevel=5)
        state, self.back = problem.backend.objectives.pull_back(problem)
        self.size, self.exact = math.prod(state.shape), probes is None
        xp = array_namespace(state)
        with concretely(problem.data):
            like = {"dtype": state.dtype, "device": device(problem.data)}
            if probes is None:
                self.rows = xp.eye(self.size, **like)
            else:
                self.rows = Random(seed).normal((probes, self.size), xp.zeros(self.size, **like))
        self.images = self.curved = self.back(self.rows)
        if loss is not None:
            self.curved = self.back(_curved(loss, state, self.rows, problem.backend.transforms))

    def trace(self) -> Array:
        """tr A."""
        return self.mean(self.curved)

    def square(self) -> Array:
        """|A|_F^2."""
        products, m = self.curved @ self.images.T, len(self.rows)
        if self.exact:
            return (products * products.T).sum()
        of_itself = array_namespace(products).sum(self.curved * self.images, axis=1)
        return ((products * products.T).sum() - (of_itself**2).sum()) / (m * (m - 1))

    def mean(self, images: Array) -> Array:
        """tr(A B), from J* B xi."""
        return (self.images * images).sum() / (1 if self.exact else len(self.rows))


def _curved(loss: Callable[[Array], Array], state: Array, rows: Array, transforms: Transforms) -> Array:
    """h xi of rows xi [b, n], differentiable in the state."""

    def product(row: Array) -> Array:
        return transforms.jvp(
            lambda state: gradient_in(state, loss, transforms), (state,), (row.reshape(state.shape),)
        )[1]

    return transforms.vmap(product)(rows).reshape(rows.shape)
