"""timm and torchvision: the smallest networks of each kind, on small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

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


def mixer() -> nn.Module:
    net = MlpMixer(4, 32, patch_size=8, num_blocks=2, embed_dim=16)
    net.head.reset_parameters()  # which begins at zero
    return net


def vit() -> nn.Module:
    net = VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=4)
    net.heads.head.reset_parameters()  # which begins at zero
    return net


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=4)


def swin() -> nn.Module:
    block = SwinTransformerBlockV2
    return SwinTransformer(
        [4, 4], 12, [1, 1], [1, 2], [4, 4], num_classes=4, block=block, downsample_layer=PatchMergingV2
    )


MEMBERS = [
    of_timm("resnet10t"),
    of_timm("convnext_atto"),
    of_timm("efficientnet_lite0"),
    of_timm("mobilenetv3_small_050"),
    Member("timm: MLP-Mixer", "timm", images(mixer)),
    of_timm("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2),
    of_timm("swin_tiny_patch4_window7_224", img_size=32, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4),
    of_timm("regnetx_002"),
    of_timm("densenet121", growth_rate=4, block_config=(2, 2)),
    of_timm("ghostnet_050"),
    of_timm("mobilevit_xxs"),
    of_timm("poolformer_s12"),
    of_torchvision("resnet18"),
    of_torchvision("efficientnet_b0"),
    of_torchvision("mobilenet_v3_small"),
    of_torchvision("shufflenet_v2_x0_5"),
    of_torchvision("squeezenet1_1"),
    Member("torchvision: ConvNeXt", "torchvision", images(convnext)),
    Member("torchvision: DenseNet", "torchvision", images(lambda: DenseNet(4, (2, 2), 8, num_classes=4))),
    Member("torchvision: ViT", "torchvision", images(vit)),
    Member("torchvision: Swin V2", "torchvision", images(swin)),
]
