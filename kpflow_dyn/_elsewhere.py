"""What others call parts of the package, and what stands for these names here: errors about names read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

Rows = tuple[tuple[tuple[str, ...], str], ...]

PACKAGE: Rows = (
    (("ntk", "NTK", "kernel", "empirical_ntk_fn", "ntk_fn"),
     "`kp.linearize(kp.solve(problem)).ntk`, or `kp.empirical_ntk` of all outputs as a matrix"),
    (("participation_ratio", "effective_dimension", "dimension"),
     "`kp.effective_rank(flow.ntk)`, and of states `kp.dynamics.pca`"),
    (("eigsh", "eigh", "eig", "eigvals", "eigvalsh", "eigenvectors"),
     "`kp.eigs(flow.ntk, k)`, or `kp.eigenvalues` without their vectors"),
    (("svd", "svdvals"), "`kp.svds(flow.J, k)`"),
    (("odeint", "odeint_adjoint", "solve_ivp", "diffeqsolve"), "`kp.solve(kp.ODEProblem(f, z0, t))`"),
    (("jacobian", "jacrev", "jacfwd", "jvp", "vjp"), "`kp.linearize(solution).J`, with `.mv` and `.T.mv`"),
    (("plot", "plotting", "viz", "visualize"), "`.plot()` of a result, or `kp.figures`"),
    (("fixed_points", "find_fixed_points", "FixedPointFinder"), "`kp.dynamics.fixed_points`"),
    (("lyapunov", "lyapunov_spectrum"), "`kp.dynamics.lyapunov_spectrum`"),
    (("pca", "PCA"), "`kp.dynamics.pca`"),
    (("load", "load_model", "restore"), "`kp.load_checkpoint`"),
    (("ClosedLoop", "Hybrid", "Event"), "`kp.models.{name}`"),
)  # fmt: skip
FLOW: Rows = (
    (("NTK", "kernel", "gram"), "`flow.ntk`"),
    (("jacobian", "Jacobian", "jac"), "`flow.J`"),
    (("jvp", "vjp"), "`flow.J.mv` and `flow.J.T.mv`"),
    (("propagator",), "`flow.P`"),
    (("readout",), "`flow.output(C)`"),
)
OPERATOR: Rows = (
    (("to_dense", "todense", "toarray", "to_numpy", "numpy", "matrix"), "`op.dense()`"),
    (("shape",), "`op.codomain.shape` and `op.domain.shape`, or their `.size`"),
    (("matvec", "matmat", "matmul", "apply", "dot"), "`op.mv`, with leading axes for several vectors"),
    (("rmatvec", "rmatmat"), "`op.T.mv`"),
    (("H", "adjoint", "transpose"), "`op.T`"),
    (("trace",), "`kp.trace(op)`"),
    (("eigs", "eigsh", "eigh", "eigvals"), "`kp.eigs(op, k)`"),
)


def stands_for(name: str, rows: Rows) -> str:
    """What stands for a name here, as a clause; "" where it is none that is known."""
    here = next((here for names, here in rows if name in names), None)
    return "" if here is None else f"; in its place take {here.format(name=name)}"


class Named:
    """An object that answers names of others by what stands for them."""

    _elsewhere: ClassVar[Rows]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property of its own that failed: raise its own error
                return object.__getattribute__(self, name)
            advice = stands_for(name, type(self)._elsewhere)
            message = f"{type(self).__name__!r} object has no attribute {name!r}{advice}"
            raise AttributeError(message, name=name, obj=self)
