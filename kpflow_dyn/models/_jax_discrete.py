"""Plants in discrete time under a policy, as equinox modules; see `kpflow_dyn.models.ClosedLoop`."""

from typing import Any

import equinox as eqx
import jax
from jax import Array

from kpflow_dyn.models import _discrete as discrete
from kpflow_dyn.models.jax import hashable


class DiscreteLoop(eqx.Module):
    """What `kpflow_dyn.models.ClosedLoop` returns for a policy of JAX where the plant has a `step`."""

    plant: Any = eqx.field(static=True)
    policy: Any
    readout: Any

    def __init__(self, plant: Any, policy: Any, readout: Any = None) -> None:
        self.plant, self.policy, self.readout = hashable(plant), policy, readout

    def __call__(self, x_t: Array, z: Array) -> Array:
        """The next state [state + memory]."""
        return discrete.advance(self.plant, self.policy, self.readout, z, x_t)

    def controls(self, x: Array, z: Array) -> Array:
        """u [row, control] of inputs [row, input] and states before the step [row, state + memory]."""
        return jax.vmap(lambda x, z: discrete.control_of(self.plant, self.policy, self.readout, z, x)[1])(x, z)
