"""The squared error as a torch module."""

from __future__ import annotations

from torch import Tensor, nn

from kpflow_dyn._learning.losses import weighted_squares


class SquaredError(nn.Module):
    """A weighted squared error of the states, or of a readout of them."""

    def __init__(
        self, target: Tensor, weights: Tensor, weight: Tensor | None, bias: Tensor | None, learn: bool
    ) -> None:
        super().__init__()
        for name, value in {"weight": weight, "bias": bias}.items():
            own = None if value is None else value.detach().clone()
            setattr(self, name, nn.Parameter(own) if learn and own is not None else own)
        self.target, self.weights = target, weights

    def forward(self, state: Tensor) -> Tensor:
        return weighted_squares(state, self)
