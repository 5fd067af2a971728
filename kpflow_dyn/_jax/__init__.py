"""The JAX backend: tracing a step, its linearisation and sweeps."""
