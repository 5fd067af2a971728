"""Equations of second order, as pairs of first order."""

from typing import Any

from kpflow_dyn._problems.problems import ODEProblem


def SecondOrderProblem(f: Any, z0: Any, v0: Any, t: Any, x: Any = None, args: Any = None) -> ODEProblem:
    """A model of second order in time, z'' = f(t, z, z') or f(t, z, z', x(t)), from z(t_0) = z0 and z'(t_0) = v0.

    It is `ODEProblem(f, (z0, v0), t, x, args=args, order=2)`: its state [trial, time, 2 unit] has the positions first,
    then the velocities, and `problem.unflatten(solution.state)` is the pair of them. `problem.remake(z0=(position,
    velocity))` starts elsewhere.

    Args:
        f: as that of `ODEProblem`, but called as f(t, z, z'), with x_t and args after these, giving z'' like z.
        z0: the positions [trial, unit], or a pytree of arrays [trial, ...].
        v0: the velocities, in the same form.
        t: as that of `ODEProblem`.
        x: as that of `ODEProblem`.
        args: as that of `ODEProblem`.

    Raises:
        TypeError, ValueError: as `ODEProblem`; a start whose two parts differ in form.
    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 1993, section II.14.

    >>> import jax, jax.numpy as jnp, kpflow_dyn as kp
    >>> pendulum = jax.tree_util.Partial(lambda p, t, q, v: -p["k"] * jnp.sin(q), {"k": jnp.asarray(9.81)})
    >>> problem = kp.SecondOrderProblem(pendulum, jnp.ones((2, 1)), jnp.zeros((2, 1)), [0.0, 0.1, 0.2])
    >>> position, velocity = problem.unflatten(kp.solve(problem).state)
    >>> position.shape, velocity.shape
    ((2, 3, 1), (2, 3, 1))
    """
    return ODEProblem(f, (z0, v0), t, x, args=args, order=2)
