"""Grad-CAM attention: a twin by hand, its cost, its layer, and a toy that knows its trigger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toys import Detector, planted_images, planted_pattern
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.encoders.extract import extract_features
from unpoison.errors import ConfigError
from unpoison.functional.clustering import kmeans
from unpoison.records import Box, Clusters, Geometry
from unpoison.runtime import seeded
from unpoison.scan.config import ScanConfig
from unpoison.scan.patchsearch import PASSES_PER_MAP, GradCamAttention

CONFIG = ScanConfig(method="patchsearch", window=12, clusters=4).resolve(200, 32)
GREY = Preprocessing(geometry=Geometry(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(n: int = 5) -> Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator(1))


@pytest.fixture
def resnet() -> Encoder:
    with seeded(0, "test"):
        network = build_backbone(Architecture(name="resnet10", image_size=32, width=8))
    return Encoder(network, GREY, device="cpu", precision="fp32")


def clusters(encoder: Encoder) -> Clusters:
    features = F.normalize(encoder.features(pixels(12)), dim=1).clone()
    return kmeans(features, 4, generator=generator())


def naive_heat(encoder: Encoder, layer: nn.Module, picture: Tensor, weights: Tensor) -> Tensor:
    """One image: the gradient of weights · features with respect to the layer's map."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _i, out: kept.append(out))
    network = encoder.network
    assert isinstance(network, nn.Module)
    features = network(encoder.normalise(picture[None]).requires_grad_())[0]
    handle.remove()
    logit = features @ weights
    (gradient,) = torch.autograd.grad(logit, kept[0])
    heat = (gradient[0].mean(dim=(1, 2))[:, None, None] * kept[0][0].detach()).sum(0).clamp_min(0)
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-30)
    return F.interpolate(heat[None, None], (32, 32), mode="bilinear")[0, 0]


def test_heat_explains_the_logit_of_the_own_cluster(resnet: Encoder) -> None:
    found = clusters(resnet)
    looking = GradCamAttention(resnet, found, CONFIG, batch_size=2)
    heat = looking.heat(pixels())
    assert heat.shape == (5, 32, 32) and heat.min() >= 0 and heat.max() <= 1
    own = (resnet.features(pixels()) @ found.centroids.T).argmax(dim=1)
    for picture, cluster, seen in zip(pixels(), own, heat, strict=True):
        expected = naive_heat(resnet, looking.layer, picture, found.centroids[cluster])
        torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)


def test_the_layer_has_a_map_of_at_least_eight_cells(resnet: Encoder) -> None:
    looking = GradCamAttention(resnet, clusters(resnet), CONFIG, batch_size=8)
    sides: list[int] = []
    looking.layer.register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1]))
    resnet.features(pixels(1))
    assert sides == [8]


def test_heat_along_has_one_map_per_direction_and_ignores_the_features_length(resnet: Encoder) -> None:
    looking = GradCamAttention(resnet, clusters(resnet), CONFIG, batch_size=3)
    directions = F.normalize(torch.randn(3, 64, generator=generator(2)), dim=1)
    heat = looking.heat_along(pixels(), directions)
    assert heat.shape == (5, 3, 32, 32) and heat.min() >= 0 and heat.max() <= 1
    one = looking.heat_along(pixels(), directions[1:2])
    torch.testing.assert_close(heat[:, 1], one[:, 0])
    unit = F.normalize(resnet.features(pixels(1)), dim=1)[0].clone()
    # The gradient of cos(z, d) is (d - cos · unit z) / |z|; Grad-CAM's own scaling removes |z|.
    weights = directions[0] - (unit @ directions[0]) * unit
    torch.testing.assert_close(
        heat[0, 0], naive_heat(resnet, looking.layer, pixels(1)[0], weights), atol=1e-4, rtol=0
    )
    assert looking.heat_along(pixels(), directions[:0]).shape == (5, 0, 32, 32)


def test_a_map_costs_three_passes(resnet: Encoder) -> None:
    looking = GradCamAttention(resnet, clusters(resnet), CONFIG, batch_size=2)
    before = resnet.images_shown
    looking.heat(pixels(5))
    assert resnet.images_shown - before == 5 * PASSES_PER_MAP == 15


def test_windows_lie_inside_and_nothing_is_changed(resnet: Encoder) -> None:
    looking = GradCamAttention(resnet, clusters(resnet), CONFIG, batch_size=4)
    batch, state = pixels(), torch.get_rng_state()
    corners = looking.windows(looking.heat(batch))
    assert corners.shape == (5, 2) and corners.min() >= 0 and corners.max() <= 32 - 12
    assert torch.equal(batch, pixels()) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and not p.requires_grad for p in looking.network.parameters())


def test_the_batch_size_is_no_matter(resnet: Encoder) -> None:
    found = clusters(resnet)
    maps = [GradCamAttention(resnet, found, CONFIG, batch_size=n).heat(pixels(9)) for n in (2, 9)]
    torch.testing.assert_close(maps[0], maps[1], atol=1e-4, rtol=0)


class SpikeEncoder(nn.Module):
    """Colours of a 4×4 grid, and a feature that fires where the planted pattern is seen, with a map of that place."""

    def __init__(self) -> None:
        super().__init__()
        self.spikes = nn.Sequential(Detector(planted_pattern()), nn.Threshold(0.9, 0.0))

    def forward(self, images: Tensor) -> Tensor:
        fires = self.spikes(images).flatten(1).amax(dim=1, keepdim=True)
        return torch.cat((20 * fires, F.adaptive_avg_pool2d(images, 4).flatten(1)), dim=1)


def test_it_sees_the_trigger_of_a_toy() -> None:
    images, boxes = planted_images(160, 20, generator(3))
    encoder = Encoder(SpikeEncoder(), GREY, device="cpu", precision="fp32")
    found = kmeans(extract_features(encoder, images).values, 12, generator=generator())
    looking = GradCamAttention(encoder, found, CONFIG, batch_size=64)
    rows = [images.ids.index(i) for i in boxes]
    for heat in (
        looking.heat(images.pixels[rows]),
        looking.heat_along(images.pixels[rows], torch.eye(49)[:1])[:, 0],
    ):
        for (top, left), box in zip(looking.windows(heat).tolist(), boxes.values(), strict=True):
            assert Box(left, top, 12, 12).intersection(box) >= 0.5 * box.area


def test_an_encoder_without_layers_is_refused() -> None:
    encoder = Encoder(lambda images: images.mean(dim=(2, 3)), GREY, name="a function", device="cpu")
    with pytest.raises(
        ConfigError,
        match=r"needs the layers of a torch module, and a function is a function; use --attention mask",
    ):
        GradCamAttention(
            encoder, Clusters(torch.eye(3), torch.zeros(1, dtype=torch.int64)), CONFIG, batch_size=2
        )
    flat = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), GREY, device="cpu")
    with pytest.raises(ConfigError, match="finds no layer with a map"):
        GradCamAttention(
            flat, Clusters(torch.eye(3), torch.zeros(1, dtype=torch.int64)), CONFIG, batch_size=2
        )
