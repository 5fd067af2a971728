"""How the sensitivities of a solution are taken: the options of `linearize`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiscreteAdjoint:
    """The exact tangent and transpose of the steps that were taken, frozen.

    Of an ODE these are the accepted steps of its solver: the scheme is differentiated, not the choice of its steps.
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
        ValueError: for tolerances that are not positive.

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> class Decay(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rate = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        ...     def forward(self, t, z):
        ...         return -self.rate * z
        >>> solution = kp.solve(kp.ODEProblem(Decay(), torch.ones(1, 1, dtype=torch.float64), [0.0, 1.0, 2.0]))
        >>> flow = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(rtol=1e-8))
        >>> [round(change, 4) for change in flow.J.dense()[:, 0].tolist()]  # -t exp(-t)
        [0.0, -0.3679, -0.2707]
    """

    rtol: float = 1e-6
    atol: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{name} of InterpolatingAdjoint is {value!r}, expected a positive number")
