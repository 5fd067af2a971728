"""timm and torchvision: the smallest networks of each kind, on small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import kpflow_dyn as kp

from ..member import Member


def images(make: Callable[[], nn.Module], size: int = 32) -> Callable[[], kp.StaticProblem]:
    """The classifier's logits on two images."""

    def problem() -> kp.StaticProblem:
        net = make().double().eval()
        return kp.StaticProblem(net, torch.randn(2, 3, size, size, dtype=torch.float64), state="")

    return problem


def of_timm(name: str, size: int = 32, **options: Any) -> Member:
    """A model of timm by its name."""
    make = lambda: timm.create_model(name, num_classes=4, **options)  # noqa: E731
    return Member(f"timm: {name}", "timm", images(make, size))


def of_torchvision(name: str, size: int = 32, **options: Any) -> Member:
    """A model of torchvision by its name."""
    make = lambda: torchvision.models.get_model(name, num_classes=4, **options)  # noqa: E731
    return Member(f"torchvision: {name}", "torchvision", images(make, size))


MEMBERS = [
    of_timm("resnet10t"),
    of_timm("convnext_atto"),
    of_timm("efficientnet_lite0"),
    of_timm("mobilenetv3_small_050"),
    of_timm("mixer_s32_224", img_size=64, embed_dim=32, num_blocks=2, size=64),
    of_timm("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2),
    of_timm("swin_tiny_patch4_window7_224", img_size=32, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4),
    of_timm("regnetx_002"),
    of_timm("densenet121", growth_rate=4, block_config=(2, 2)),
    of_timm("levit_128s", size=224),
    of_timm("poolformer_s12"),
    of_timm("gmlp_s16_224", img_size=32, embed_dim=24, num_blocks=2),
    of_torchvision("resnet18"),
    of_torchvision("convnext_tiny"),
    of_torchvision("efficientnet_b0"),
    of_torchvision("mobilenet_v3_small"),
    of_torchvision("shufflenet_v2_x0_5"),
    of_torchvision("squeezenet1_1"),
    of_torchvision("regnet_y_400mf"),
    of_torchvision("densenet121"),
    of_torchvision("vgg11_bn"),
    of_torchvision("googlenet", aux_logits=False, init_weights=True),
    of_torchvision("vit_b_16", image_size=32),
    of_torchvision("swin_v2_t"),
]
