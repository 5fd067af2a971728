"""A policy on a plant's state as an equinox module; see `kpflow_dyn.gym.policy`."""

from collections.abc import Callable

import equinox as eqx
from jax import Array

from kpflow_dyn.gym._policies import Head


class Policy(eqx.Module):
    """What `kpflow_dyn.gym.policy` returns for a network of JAX."""

    net: Callable[[Array], Array]
    head: Head = eqx.field(static=True)

    def __call__(self, z: Array) -> Array:
        """u [control]."""
        return self.head.control(self.net(self.head.observation(z)))
