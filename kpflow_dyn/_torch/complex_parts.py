"""What torch's operations do with complex numbers; see `kpflow_dyn.tracing._pairs`."""

from typing import Any

import torch

from kpflow_dyn._torch.recording import tensors_in
from kpflow_dyn.tracing._pairs import Form, Kind

aten = torch.ops.aten

KINDS: dict[Any, Kind] = {
    aten.complex: Kind.JOIN,
    aten.view_as_complex: Kind.UNPACK,
    aten.view_as_real: Kind.PACK,
    aten.real: Kind.REAL,
    aten.imag: Kind.IMAGINARY,
    **dict.fromkeys((aten.conj, aten._conj, aten.conj_physical, aten._conj_physical), Kind.CONJUGATE),
    **dict.fromkeys((aten.sum, aten.mean, aten.cumsum, aten.neg), Kind.APART),
}
LINEAR = (aten._fft_r2c, aten._fft_c2r, aten._fft_c2c)  # linear in their operand, as real numbers


def form_of(fx: Any) -> Form:
    """That of an operation in a graph of torch.fx."""
    packet: Any = getattr(fx.target, "overloadpacket", None)
    kind = Kind.WIDEN if packet is aten._to_copy and _is_widened(fx) else KINDS.get(packet)
    return Form([value.is_complex() for value in tensors_in(fx.meta["val"])], kind)


def _is_widened(fx: Any) -> bool:
    """Whether a cast gives complex numbers as precise as the real ones were."""
    return fx.meta["val"].is_complex() and fx.meta["val"].dtype.to_real() is fx.args[0].meta["val"].dtype
