"""The user's operator, counted and checked."""

from kpflow_dyn._arrays import Array, Rows, is_finite

ASYMMETRY = 1e-2  # an operator further from symmetric than this, relative to |A q|, is refused


class Asymmetric(ValueError):
    """An operator that is not symmetric."""


class Counted:
    """A symmetric operator A on rows [b, n]."""

    def __init__(self, apply: Rows) -> None:
        self.uncounted = apply
        self.halves = self.calls = 0
        self.asymmetry = 0.0  # largest |<q, A p> - <p, A q>| / |A q| so far; 0 for round-off

    @property
    def applications(self) -> int:
        """How often it was applied to one row."""
        return (self.halves + 1) // 2

    def __call__(self, rows: Array) -> Array:
        image = self.uncounted(rows)
        self.calls += 1
        self.halves += 2 * rows.shape[0]
        if tuple(image.shape) != tuple(rows.shape) or image.dtype != rows.dtype:
            raise ValueError(
                f"the operator gave {tuple(image.shape)} of {image.dtype} for rows {tuple(rows.shape)} of "
                f"{rows.dtype}; it must keep the shape and the dtype"
            )
        if not is_finite(image):
            raise ValueError(
                f"the operator gave NaN or inf in call {self.calls}; look for them in its inputs and weights"
            )
        return image

    def check_symmetry(self, defect: float, eps: float) -> None:
        """Take note of a relative difference, or raise."""
        if defect > ASYMMETRY:
            raise Asymmetric(
                f"the operator is not symmetric: <q, A p> and <p, A q> differ by {defect:.1e} of |A q|; use the "
                "eigenpairs of A A* or A* A, or lower rtol and atol of InterpolatingAdjoint if it comes from that"
            )
        if defect > eps**0.5:
            self.asymmetry = max(self.asymmetry, defect)


class Product(Counted):
    """A = L* L on rows [b, p], from L on these and L* on rows [b, n]."""

    def __init__(self, forward: Rows, backward: Rows) -> None:
        super().__init__(lambda rows: backward(forward(rows)))
        self._forward, self._backward = forward, backward

    def forward(self, rows: Array) -> Array:
        """L alone, half of an application."""
        self.halves += rows.shape[0]
        return self._forward(rows)

    def backward(self, rows: Array) -> Array:
        """L* alone, half of an application."""
        self.halves += rows.shape[0]
        return self._backward(rows)
