"""Transformers of small packages: x-transformers, vit-pytorch, mlp-mixer-pytorch, and siren-pytorch's coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mlp_mixer_pytorch import MLPMixer
from siren_pytorch import SirenNet
from torch import nn
from vit_pytorch import SimpleViT, ViT
from x_transformers import ContinuousTransformerWrapper, Decoder, Encoder, TransformerWrapper

import kpflow_dyn as kp

from ..member import Member

LAYERS = {"dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8}


def words(make: Callable[..., nn.Module], **options: Any) -> Callable[[], kp.StaticProblem]:
    """A model of tokens with layers of these options."""

    def problem() -> kp.StaticProblem:
        layers = make(**LAYERS, **options)
        net = TransformerWrapper(num_tokens=29, max_seq_len=8, attn_layers=layers).double().eval()
        return kp.StaticProblem(net, torch.randint(29, (2, 6)), state="", axes=("trial", "time", "unit"))

    return problem


def signals() -> kp.StaticProblem:
    """A model of vectors at each time."""
    net = ContinuousTransformerWrapper(max_seq_len=8, dim_in=3, dim_out=2, attn_layers=Encoder(**LAYERS))
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    return kp.StaticProblem(net.double().eval(), x, state="", axes=("trial", "time", "unit"))


def on(shape: tuple[int, ...], make: Callable[[], nn.Module]) -> Callable[[], kp.StaticProblem]:
    """A model of images or coordinates."""
    return lambda: kp.StaticProblem(make().double().eval(), torch.randn(2, *shape, dtype=torch.float64), state="")


IMAGE = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 2}
MEMBERS = [
    Member("x-transformers: decoder", "x-transformers", words(Decoder)),
    Member("x-transformers: ALiBi", "x-transformers", words(Decoder, alibi_pos_bias=True)),
    Member("x-transformers: rotary", "x-transformers", words(Decoder, rotary_pos_emb=True)),
    Member("x-transformers: T5's bias", "x-transformers", words(Encoder, rel_pos_bias=True)),
    Member(
        "x-transformers: RMSNorm, SwiGLU",
        "x-transformers",
        words(Decoder, use_rmsnorm=True, ff_swish=True, ff_glu=True),
    ),
    Member("x-transformers: gated residuals", "x-transformers", words(Encoder, gate_residual=True)),
    Member("x-transformers: normed queries", "x-transformers", words(Encoder, attn_qk_norm=True)),
    Member("x-transformers: continuous", "x-transformers", signals),
    Member(
        "vit-pytorch: ViT", "vit-pytorch", on((3, 16, 16), lambda: ViT(**IMAGE, heads=2, mlp_dim=24, num_classes=3))
    ),
    Member(
        "vit-pytorch: SimpleViT",
        "vit-pytorch",
        on((3, 16, 16), lambda: SimpleViT(**IMAGE, heads=2, mlp_dim=24, num_classes=3)),
    ),
    Member(
        "mlp-mixer-pytorch: MLP-Mixer",
        "mlp-mixer-pytorch",
        on((3, 16, 16), lambda: MLPMixer(channels=3, **IMAGE, num_classes=3)),
    ),
    Member("siren-pytorch: SIREN", "siren-pytorch", on((2,), lambda: SirenNet(2, 16, 1, num_layers=3))),
]
