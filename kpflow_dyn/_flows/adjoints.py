"""How the sensitivities of a solution are taken: the options of `linearize`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DiscreteAdjoint:
    """The exact derivative and its transpose of the steps that were taken, dz_t = A_t dz_{t-1} + B_t dtheta.

    Of an ODE these are the accepted steps of its solver: the scheme is differentiated, not the choice of its steps.

    Source: Griewank, Walther, "Evaluating derivatives" (2008).

    >>> import torch, kpflow_dyn as kp
    >>> solution = kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 5, 3)))
    >>> kp.check_adjoint(kp.linearize(solution, sensealg=kp.DiscreteAdjoint()).J) < 1e-5
    True
    """


@dataclass(frozen=True)
class InterpolatingAdjoint:
    """Sensitivities of an ODE by variational and adjoint equations, each solved adaptively along the dense z(t).

        J theta     d' = A d + F theta,  d(t_0) = 0        A = df/dz,  F = df/dtheta
        J* q        -l' = A^T l,  l += q_j at the nodes    g = int F^T l dt

    They are those of the equation rather than of the solver's steps, which need not be known. J and J* are linear and
    adjoint to each other only to the tolerances: `kp.check_adjoint(flow.J)` tells how far.

    Args:
        rtol: relative tolerance of each solve.
        atol: absolute tolerance, where the largest entry of the vector applied to is one.

    Raises:
        ValueError: tolerances that are not positive.
    Source: Chen, Rubanova, Bettencourt, Duvenaud, "Neural ordinary differential equations", arXiv:1806.07366.

    >>> import torch, kpflow_dyn as kp
    >>> field, start = kp.models.CTRNNField(8).double(), torch.randn(2, 8).double()
    >>> solution = kp.solve(kp.ODEProblem(field, start, [0.0, 0.5, 1.0]))
    >>> kp.check_adjoint(kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(rtol=1e-8)).J) < 1e-5
    True
    """

    rtol: float = 1e-6
    atol: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{name} of InterpolatingAdjoint is {value!r}, expected a positive number")
