"""P, which passes kicks on."""

from kpflow_dyn._spaces.operators import Operator


class Propagator(Operator):
    """P = (D_S F)^{-1}: s_t = A_t s_{t-1} + q_t, with s_0 = 0; `inv` is D_S F itself: q_t = s_t - A_t s_{t-1}."""

    def __init__(self, forward: Operator, inverse: Operator) -> None:
        super().__init__(forward.domain, forward.codomain, forward.mv, forward.T.mv)
        self.inv = inverse
