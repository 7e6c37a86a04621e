"""Grad-CAM attention: a twin by hand, its cost, its layer, and a toy that knows its trigger."""

from __future__ import annotations

from typing import Any

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
from unpoison.runtime import seeded, silent, stage_generator
from unpoison.scan import patchsearch
from unpoison.scan.config import ScanConfig
from unpoison.scan.flip_test import FlipTest, nearest_rows
from unpoison.scan.patchsearch import PASSES_PER_MAP, GradCamAttention
from unpoison.scan.search import Searcher

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


def test_memory_that_runs_out_halves_the_batch_and_changes_no_map(
    resnet: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = GradCamAttention(resnet, clusters(resnet), CONFIG, batch_size=5)
    expected, plain = looking.heat(pixels()), patchsearch.grad_cam

    def small_device(network: nn.Module, layer: nn.Module, images: Tensor, target: Any) -> Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(network, layer, images, target)

    monkeypatch.setattr(patchsearch, "grad_cam", small_device)
    before = resnet.images_shown
    torch.testing.assert_close(looking.heat(pixels()), expected, atol=1e-5, rtol=0)
    assert resnet.largest_batch == 2 and resnet.images_shown - before == PASSES_PER_MAP * 5


def test_faithful_explains_the_cosine_as_the_release_does(resnet: Encoder) -> None:
    centroids = F.normalize(torch.randn(4, 64, generator=generator(4)), dim=1)
    found = Clusters(centroids, torch.zeros(5, dtype=torch.int64))
    config = ScanConfig(method="patchsearch", window=12, clusters=4, faithful=True).resolve(200, 32)
    looking = GradCamAttention(resnet, found, config, batch_size=8)
    for picture, seen in zip(pixels(), looking.heat(pixels()), strict=True):
        unit = F.normalize(resnet.features(picture[None]), dim=1)[0].clone()
        centroid = found.centroids[int((found.centroids @ unit).argmax())]
        weights = centroid - (unit @ centroid) * unit  # the gradient of the cosine, but for its length
        expected = naive_heat(resnet, looking.layer, picture, weights)
        torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("faithful", [False, True])
def test_the_cluster_is_chosen_in_float32_whatever_the_network_s_precision(faithful: bool) -> None:
    """Two clusters that bfloat16 cannot tell apart, and features that lie nearer to the second."""
    ends = [torch.tensor([1.0, 1e-3 * sign, 0.0]) for sign in (-1, 1)]
    found = Clusters(F.normalize(torch.stack(ends), dim=1), torch.zeros(1, dtype=torch.int64))
    config = ScanConfig(method="patchsearch", window=12, clusters=2, faithful=faithful).resolve(200, 32)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = Encoder(network, GREY, device="cpu", precision="bf16")
    looking = GradCamAttention(encoder, found, config, batch_size=2)
    features = torch.tensor([[1.0, 0.5, 0.0]], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (logit,) = looking._logit(features)
    (gradient,) = torch.autograd.grad(logit, features)
    assert logit.dtype == torch.float32
    scaled = F.normalize(features, dim=1) if faithful else features
    (expected,) = torch.autograd.grad(scaled[0] @ found.centroids[1], features)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("patches", [1, 2])
def test_the_published_search_ranks_planted_images_first(patches: int) -> None:
    images, boxes = planted_images(240, 30, generator(3))
    encoder = Encoder(SpikeEncoder(), GREY, device="cpu", precision="fp32")
    features = extract_features(encoder, images).values
    found = kmeans(features, 12, generator=generator())
    config = ScanConfig(
        method="patchsearch", faithful=True, window=12, clusters=12, n_flips=24, patches=patches
    ).resolve(240, 32)
    every = torch.ones(240, dtype=torch.bool)
    flips = nearest_rows(features, found, every, 24, generator=generator())
    looking = GradCamAttention(encoder, found, config, batch_size=64)
    test = FlipTest.draw(
        encoder, images, found, flips, 12, generator=generator(), with_control=False, batch_size=64
    )
    searcher = Searcher(
        images, found, looking, test, config, every, lambda step: stage_generator(0, step), silent
    )
    scored = searcher.explore(lambda _name, compute: compute())
    planted = torch.tensor([images.ids[row] in boxes for row in scored.rows])
    order = scored.flips.score("source", scored.own).argsort(descending=True, stable=True)
    assert planted.sum() >= 10 and planted[order[:10]].all()


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
