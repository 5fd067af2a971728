"""What a trace estimator and an eigensolver are: any object with the method, ours and yours alike."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from kpflow_dyn._arrays import Array, Random, Rows
from kpflow_dyn._shown import type_name
from kpflow_dyn.solvers._certify import OfProduct
from kpflow_dyn.solvers._counted import Product
from kpflow_dyn.solvers._moments import Estimate, Moments
from kpflow_dyn.solvers._results import Eigenpairs, Triplets

Result = TypeVar("Result", Estimate, Moments, Eigenpairs, Triplets)


@runtime_checkable
class TraceEstimator(Protocol):
    """E trace(A) = tr A, for any A that can be applied to rows.

    `kp.trace` needs nothing but `trace`. `kp.effective_rank` needs |A|_F^2 as well: a method `moments` with the same
    arguments, which returns `Moments`. `kp.frobenius_norm` takes `moments`, or the trace of A A* where there is none.

    Raises:
        TypeError: from these functions, where a method is missing, or returns something else.
    Source: Hutchinson, Commun. Stat. Simul. Comput. 19, 433 (1990), whose estimator the example is.

    >>> import numpy as np, kpflow_dyn as kp
    >>> class Signs:
    ...     def trace(self, apply, n, samples, *, like, seed):
    ...         x = np.sign(seed.normal((samples, n), like))
    ...         each = (x * apply(x)).sum(1)
    ...         return kp.solvers.Estimate(float(each.mean()), each.std() / samples**0.5, samples, "random signs")
    >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
    >>> kp.trace(kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit), alg=Signs()).value
    6.0
    """

    def trace(self, apply: Rows, n: int, samples: int, *, like: Array, seed: Random) -> Estimate:
        """tr A, from at most `samples` applications.

        Args:
            apply: A on a block of rows, [b, n] -> [b, n], in coordinates where the inner product is the plain one.
            n: the dimension.
            samples: how many applications to one row it may take.
            like: an array of the library, dtype and device that rows must have.
            seed: a source of random rows, `seed.normal(shape, like)`.
        """
        ...


@runtime_checkable
class FactorTraceEstimator(Protocol):
    """E trace_product(L, L*) = tr A, for A = L L* alone.

    As `TraceEstimator`, for estimators that need the factor; for |A|_F^2 there may be a method `moments_product`. One
    with the methods of both is given the factor wherever it is known.

    Raises and Source as `TraceEstimator`.

    >>> import numpy as np, kpflow_dyn as kp
    >>> class OneSide:
    ...     def trace_product(self, factor, shape, samples, *, like, seed):
    ...         each = (factor[1](seed.normal((samples, shape[0]), like)) ** 2).sum(1)  # |L* x|^2
    ...         return kp.solvers.Estimate(float(each.mean()), each.std() / samples**0.5, samples // 2, "one side")
    >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
    >>> A = kp.GramOperator(kp.MatrixOperator(np.eye(3), unit, unit))
    >>> found = kp.trace(A, samples=1000, alg=OneSide())
    >>> bool(abs(found.value - 3) < 4 * found.stderr)
    True
    """

    def trace_product(
        self, factor: tuple[Rows, Rows], shape: tuple[int, int], samples: int, *, like: Array, seed: Random
    ) -> Estimate:
        """tr L L*, from at most `samples` applications of L and of L*; other arguments as for `TraceEstimator.trace`.

        Args:
            factor: L and L* on rows, [b, p] -> [b, n] and [b, n] -> [b, p].
            shape: (n, p), with p <= n.
        """
        ...


@runtime_checkable
class EigenSolver(Protocol):
    """V A = diag(l) V + residuals, for a symmetric A that can be applied to rows; V holds k orthonormal rows.

    `kp.eigs` passes on what its caller gives: `which`, `start`, `deflate` and `callback`, as `BlockLanczos.solve` takes
    them. A solver may lack them; to give one is then an error that names it. `kp.svds`, and `kp.eigs` of a J J* with
    fewer parameters than states, take the pairs of J* J, or call `solve_product` where the solver has one as
    `BlockLanczos` does.

    Raises:
        TypeError: from these functions, where an option or a method is missing, or a method returns something else.
    Source: Golub, Van Loan, Matrix Computations (2013), chapter 8: the residual bounds the error of an eigenvalue.

    >>> import numpy as np, kpflow_dyn as kp
    >>> class Numpy:
    ...     def solve(self, apply, n, k, *, like, seed):
    ...         values, vectors = np.linalg.eigh(apply(np.eye(n)))
    ...         found = values[::-1][:k], vectors.T[::-1][:k]
    ...         return kp.solvers.Eigenpairs(*found, np.zeros(k), np.ones(k, bool), applications=n, calls=1)
    >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
    >>> A = kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit, symmetric=True)
    >>> kp.eigs(A, k=2, alg=Numpy()).values
    array([3., 2.])
    """

    def solve(self, apply: Rows, n: int, k: int, *, like: Array, seed: Random) -> Eigenpairs:
        """The 1 <= k <= n algebraically largest eigenpairs, descending; arguments as for `TraceEstimator.trace`."""
        ...


class OfOperator:
    """The trace, for estimators whose `moments` takes A itself."""

    moments: Callable[..., Moments]

    def trace(self, apply: Rows, n: int, samples: int, *, like: Array, seed: int | Random = 0) -> Estimate:
        """tr A alone; arguments as for `moments`."""
        return self.moments(apply, n, samples, like=like, seed=seed).trace


class OfFactor:
    """The trace, for estimators whose `moments` takes the factor of A = L L*."""

    moments: Callable[..., Moments]

    def moments_product(
        self, factor: tuple[Rows, Rows], shape: tuple[int, int], samples: int, *, like: Array, seed: int | Random = 0
    ) -> Moments:
        """tr A and |A|_F^2 of A = L L*, from L and L* on rows and shape = (n, p)."""
        return self.moments(factor, shape, samples, like=like, seed=seed)

    def trace_product(
        self, factor: tuple[Rows, Rows], shape: tuple[int, int], samples: int, *, like: Array, seed: int | Random = 0
    ) -> Estimate:
        """tr A alone; arguments as for `moments_product`."""
        return self.moments_product(factor, shape, samples, like=like, seed=seed).trace


def eigenpairs(alg: EigenSolver, apply: Rows, n: int, k: int, like: Array, seed: Random, **options: Any) -> Eigenpairs:
    """What a solver finds, with the options that are not None; a TypeError for what is no solver, and as `called`."""
    if not isinstance(alg, EigenSolver) or isinstance(alg, type):
        raise TypeError(f"alg is {alg!r}, expected an object with solve(...), such as kp.solvers.BlockLanczos()")
    return called(alg.solve, Eigenpairs, apply, n, k, like=like, seed=seed, **options)


def triplets(
    alg: EigenSolver, forward: Rows, backward: Rows, p: int, k: int, like: Array, seed: Random, **options: Any
) -> Triplets:
    """The k largest triplets of L, by `alg.solve_product` or from the eigenvectors of L* L; raises as `eigenpairs`."""
    squared, start, callback = (options.get(name) for name in ("squared", "start", "callback"))
    solve: Any = getattr(alg, "solve_product", None)
    if solve is not None:
        return called(solve, Triplets, forward, backward, p, k, like=like, seed=seed, **options)
    product = Product(forward, backward)
    found = eigenpairs(alg, product, p, k, like, seed, start=start, callback=callback)
    certificate = OfProduct(product, getattr(alg, "tol", 1e-6), seed, bool(squared))
    result, _again = certificate.anew(found.vectors, 0.0)
    certificate.warn(result)
    return result


def called(method: Callable[..., Any], result: type[Result], *arguments: Any, **options: Any) -> Result:
    """What a method returns, called with the options that are not None.

    A TypeError for an option that it does not take, or a result of another type.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known, name = inspect.signature(method).parameters, method.__qualname__
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if missing := [option for option in given if option not in known and not takes_all]:
        raise TypeError(f"{name} takes no {', '.join(missing)}; leave it out, or take another alg")
    found = method(*arguments, **given)
    if not isinstance(found, result):
        raise TypeError(f"{name} returned {type_name(found)}, expected kp.solvers.{result.__name__}")
    return found
