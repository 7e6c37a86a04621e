"""Architecture names to timm networks: with a small stem, or small patches, for small images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import timm
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from unpoison.errors import ConfigError

__all__ = ["SMALL_IMAGE", "Architecture", "build_backbone", "choose_attention_kernels"]

SMALL_IMAGE = 96
"""Below this side, in pixels, the ImageNet stem (7×7 stride 2, then a pool) would throw the picture away."""

_RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}

_VITS: dict[str, tuple[int | None, int, int | None]] = {
    "vit_tiny": (None, 6, None),  # ours: 4 × width features and heads of 32, for small images and processors
    "vit_small": (384, 12, 12),  # MoCo v3's, which has 12 heads where others have 6
    "vit_base": (768, 12, 12),
}
"""Features per token, blocks and heads."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that is needed to build a network again; stored beside its weights.

    Attributes:
        name: `resnet10`, `resnet18`, `resnet34`, `resnet50`, `vit_tiny`, `vit_small`, `vit_base`, or any timm model
            name. The patches of our ViTs have 4 pixels up to 48 px, 8 below 96 px, 16 above.
        image_size: side of the images that it is built for, in pixels.
        width: channels of the first ResNet stage (64 in the paper); later stages double it. A quarter of the features
            of `vit_tiny`. Other networks have their own.
        stem_stride: stride of the ResNet stem below 96 px: 1 is the CIFAR stem of the papers, 2 and 4 are faster.
            None picks 2 up to 48 px and 4 above. Ignored from 96 px on, where the ImageNet stem is used.
    """

    name: str
    image_size: int
    width: int = 64
    stem_stride: int | None = None

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= 1024:
            raise ConfigError(f"image_size={self.image_size}: expected 8 to 1024 pixels")
        if not 4 <= self.width <= 512:
            raise ConfigError(f"width={self.width}: expected 4 to 512 channels")
        if self.stem_stride not in (None, 1, 2, 4):
            raise ConfigError(f"stem_stride={self.stem_stride}: expected 1, 2 or 4")


def build_backbone(architecture: Architecture, *, stem_kernel: int | None = None) -> nn.Module:
    """The network without a classification head: (N, 3, S, S) normalised images to (N, D) features.

    Initialisation draws from torch's global generator; wrap the call in `runtime.seeded`.

    Args:
        architecture: what to build.
        stem_kernel: of a ResNet's first layer, 3, 4 or 7 pixels, where finished weights ask for it; with 7 it has
            ImageNet's stem, max-pool and all. None: what suits the image size.

    Raises:
        ConfigError: no such architecture, or the images cannot be cut into its patches.
    """
    if architecture.name in _RESNETS:
        return _resnet(architecture, stem_kernel)
    if architecture.name in _VITS:
        return _vit(architecture)
    name = architecture.name
    if not re.fullmatch(r"[A-Za-z0-9_.\-]+", name) or not timm.is_model(name):
        near = ", ".join((*_RESNETS, *_VITS))
        raise ConfigError(
            f"architecture {name!r}: expected one of {near}, or a timm model name (timm.list_models())"
        )
    options: dict[str, Any] = {"num_classes": 0, "pretrained": False}
    try:
        return timm.create_model(name, img_size=architecture.image_size, **options)
    except TypeError:  # convolutional networks take no image size
        return timm.create_model(name, **options)


def _resnet(architecture: Architecture, stem_kernel: int | None) -> nn.Module:
    block, layers = _RESNETS[architecture.name]
    width = architecture.width
    network: Any = ResNet(  # its parts are replaced below, by others than its annotations foresee
        block=cast(Any, block),  # annotated as an instance, used as the class
        layers=layers,
        num_classes=0,
        channels=(width, 2 * width, 4 * width, 8 * width),
        # As in torchvision, whose networks the papers train. Zeroed branches learn so late that in a short run the
        # attack hardly takes hold, and what a victim does not learn cannot be found in it.
        zero_init_last=False,
    )
    stem: int = network.bn1.num_features
    if block is BasicBlock and width != stem:
        # timm's stem always has 64 channels, which would cost a narrow network more than all of its first stage.
        stem = width
        network.bn1 = nn.BatchNorm2d(stem)
        network.layer1[0] = BasicBlock(stem, width)
    small = architecture.image_size < SMALL_IMAGE if stem_kernel is None else stem_kernel != 7
    if small:
        stride = architecture.stem_stride or (2 if architecture.image_size <= 48 else 4)
        kernel, padding = (4, 0) if stride == 4 else (3, 1)
        network.maxpool = nn.Identity()
    else:
        kernel, stride, padding = 7, 2, 3
    network.conv1 = nn.Conv2d(3, stem, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return cast(nn.Module, network)


def _vit(architecture: Architecture) -> nn.Module:
    """The class token after the last norm is the feature vector."""
    features, depth, heads = _VITS[architecture.name]
    size = architecture.image_size
    patch = 4 if size <= 48 else 8 if size < SMALL_IMAGE else 16
    if size % patch:
        raise ConfigError(
            f"image_size={size}: {architecture.name} cuts it into patches of {patch} pixels; use a multiple of {patch}"
        )
    features = features or 4 * architecture.width
    network = VisionTransformer(
        img_size=size,
        patch_size=patch,
        num_classes=0,
        embed_dim=features,
        depth=depth,
        num_heads=heads or math.gcd(features, max(1, features // 32)),
        weight_init="moco",
    )
    choose_attention_kernels(cast(Any, network.blocks))
    return cast(nn.Module, network)


def choose_attention_kernels(blocks: Iterable[Any]) -> None:
    """Let timm's transformer blocks take plain products on a processor.

    For so few tokens as ours torch's fused kernel trains at a fifth of their speed there.
    """
    for block in blocks:
        block.attn.register_forward_pre_hook(_choose_attention_kernel)


def _choose_attention_kernel(attention: Any, inputs: tuple[Tensor, ...]) -> None:
    attention.fused_attn = inputs[0].is_cuda
