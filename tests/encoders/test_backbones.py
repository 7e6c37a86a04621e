"""Names to networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.errors import ConfigError
from unpoison.runtime import seeded


@pytest.mark.parametrize(
    ("size", "stride", "kernel", "map_side"),
    [
        (16, None, 3, 8),
        (32, None, 3, 16),
        (32, 1, 3, 32),
        (64, None, 4, 16),
        (64, 2, 3, 32),
        (96, None, 7, 24),
    ],
)
def test_the_stem_fits_the_image_size(size: int, stride: int | None, kernel: int, map_side: int) -> None:
    architecture = Architecture(name="resnet10", image_size=size, width=8, stem_stride=stride)
    network = build_backbone(architecture).eval()
    maps: list[torch.Size] = []
    network.layer1.register_forward_hook(lambda _m, _i, out: maps.append(out.shape))
    with torch.no_grad():
        features = network(torch.zeros(1, 3, size, size))
    assert features.shape == (1, 64)
    assert network.conv1.weight.shape == (8, 3, kernel, kernel)
    assert maps == [(1, 8, map_side, map_side)]


def test_the_named_resnets_have_their_depth_and_width() -> None:
    for name, convolutions, features in (("resnet10", 12, 64), ("resnet18", 20, 64), ("resnet50", 53, 256)):
        with torch.device("meta"):
            network = build_backbone(Architecture(name=name, image_size=32, width=8))
        assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == convolutions
        assert network.num_features == features


def test_the_full_width_network_is_the_published_one() -> None:
    with torch.device("meta"):
        network = build_backbone(Architecture(name="resnet18", image_size=224))
    assert sum(p.numel() for p in network.parameters()) == 11_176_512  # torchvision's, without its classifier


def test_timm_networks_are_built_for_the_image_size() -> None:
    network = build_backbone(Architecture(name="vit_tiny_patch16_224", image_size=32))
    assert network.pos_embed.shape == (1, 5, 192)
    convolutional = build_backbone(Architecture(name="resnet10t", image_size=32)).eval()
    assert convolutional(torch.zeros(1, 3, 32, 32)).shape == (1, 512)


@pytest.mark.parametrize(
    ("name", "size", "width", "patch", "features", "heads"),
    [
        ("vit_tiny", 16, 4, 4, 16, 1),
        ("vit_tiny", 32, 32, 4, 128, 4),
        ("vit_tiny", 48, 25, 4, 100, 1),
        ("vit_tiny", 64, 64, 8, 256, 8),
        ("vit_tiny", 96, 32, 16, 128, 4),
        ("vit_small", 224, 32, 16, 384, 12),
        ("vit_base", 224, 32, 16, 768, 12),
    ],
)
def test_the_vits_have_their_patches_and_sizes(
    name: str, size: int, width: int, patch: int, features: int, heads: int
) -> None:
    with torch.device("meta"):
        network = build_backbone(Architecture(name=name, image_size=size, width=width))
        assert network(torch.zeros(2, 3, size, size)).shape == (2, features)
    assert network.patch_embed.patch_size == (patch, patch)
    assert network.pos_embed.shape == (1, (size // patch) ** 2 + 1, features)
    assert network.blocks[0].attn.num_heads == heads


def test_a_vit_needs_images_that_its_patches_fill() -> None:
    with pytest.raises(
        ConfigError, match="image_size=50: vit_tiny cuts it into patches of 8 pixels; use a mult"
    ):
        build_backbone(Architecture(name="vit_tiny", image_size=50))


def test_both_attention_kernels_give_the_same_features() -> None:
    with seeded(0, "vit"):
        network = build_backbone(Architecture(name="vit_tiny", image_size=16, width=8)).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = network(images)
    assert not network.blocks[0].attn.fused_attn
    for block in network.blocks:
        block.attn._forward_pre_hooks.clear()
        block.attn.fused_attn = True
    torch.testing.assert_close(network(images), plain)


@pytest.mark.parametrize("name", ["resnet19", "hf-hub:someone/something", "../resnet18", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected one of resnet10, .* or a timm model name"):
        build_backbone(Architecture(name=name, image_size=32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 4}, "image_size=4: expected 8 to 1024 pixels"),
        ({"image_size": 32, "width": 2}, "width=2: expected 4 to 512 channels"),
        ({"image_size": 32, "stem_stride": 3}, "stem_stride=3: expected 1, 2 or 4"),
    ],
)
def test_sizes_out_of_range_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture(name="resnet10", **wrong)  # type: ignore[arg-type]
