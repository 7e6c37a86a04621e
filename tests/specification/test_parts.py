"""Each fast part against its specification, on random inputs with many ties and degenerate shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from specification import published
from unpoison.functional.clustering import assign
from unpoison.functional.saliency import grad_cam
from unpoison.functional.windows import (
    attention_map,
    crop_windows,
    hottest_windows,
    paste_windows,
    random_masks,
)
from unpoison.records import Clusters
from unpoison.scan.flip_test import nearest_rows
from unpoison.scan.poisoncam import activation_scores

SEEDS = st.integers(0, 10_000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coarse(shape: tuple[int, ...], levels: int, seed: int) -> Tensor:
    """Multiples of 1/8 in [0, levels/8): exact in float32, with many ties."""
    return torch.randint(0, levels, shape, generator=generator(seed)).float() / 8


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), SEEDS)
def test_clusters_of_features_that_tie_or_vanish(n: int, k: int, levels: int, seed: int) -> None:
    """Centroids along the axes: every cosine is then one component over the length, and ties are exact."""
    features = coarse((n, max(k, 2)), levels, seed)
    centroids = torch.eye(max(k, 2))[torch.randint(0, max(k, 2), (k,), generator=generator(seed + 1))]
    expected = [published.nearest(f, centroids.tolist()) for f in features.tolist()]
    assert assign(features, centroids).tolist() == expected


@given(st.integers(2, 8), st.integers(1, 6), SEEDS)
def test_clusters_of_features_in_general(d: int, k: int, seed: int) -> None:
    features = torch.randn(20, d, generator=generator(seed))
    centroids = F.normalize(torch.randn(k, d, generator=generator(seed + 1)), dim=1)
    expected = [published.nearest(f, centroids.tolist()) for f in features.tolist()]
    assert assign(features, centroids).tolist() == expected


@given(st.integers(2, 5), st.integers(1, 3), SEEDS)
def test_the_flip_set(k: int, each: int, seed: int) -> None:
    """Where every cluster has enough images; where not, ours fills up from the others and the release does not."""
    features = F.normalize(torch.randn(12 * k, 4, generator=generator(seed)), dim=1)
    centroids = F.normalize(torch.randn(k, 4, generator=generator(seed + 1)), dim=1)
    assignment = (torch.arange(12 * k) % k)[torch.randperm(12 * k, generator=generator(seed))]
    cosines = [
        published.cosine(f, centroids[a].tolist()) for f, a in zip(features.tolist(), assignment, strict=True)
    ]
    rows = nearest_rows(
        features,
        Clusters(centroids, assignment),
        torch.ones(12 * k, dtype=torch.bool),
        each * k,
        generator=generator(seed),
    )
    assert sorted(rows.tolist()) == sorted(published.flip_rows(cosines, assignment.tolist(), k, each))


@given(st.integers(1, 7), st.integers(1, 7), SEEDS)
def test_masks_are_cyclic_windows(size: int, side: int, seed: int) -> None:
    side = min(side, size)
    every = [published.cyclic_window(size, side, (y, x)) for y in range(size) for x in range(size)]
    for mask in random_masks(size, side, 5, generator=generator(seed)).tolist():
        assert mask in every


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([2, 3, 8]), SEEDS)
def test_equation_2(n_masks: int, n_clusters: int, levels: int, seed: int) -> None:
    """Few levels: views tie between clusters, clusters tie for the mode, and all distances may be equal."""
    similarities = coarse((6, n_masks, n_clusters), levels, seed)
    own = torch.randint(0, n_clusters, (6,), generator=generator(seed + 1))
    scores = activation_scores(similarities, own)
    for image in range(6):
        expected = published.activation_scores(similarities[image].tolist(), int(own[image]))
        assert scores[image].tolist() == pytest.approx(expected, abs=1e-6)


def test_equation_2_does_not_scale_rounding() -> None:
    """Views that hide nothing differ by what float32 rounds; that is no distance."""
    similarities = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]])
    similarities[0, 1, 0] = torch.nextafter(similarities[0, 1, 0], torch.tensor(1.0))
    assert activation_scores(similarities, torch.tensor([0])).tolist() == [[0, 0, 0]]
    assert published.activation_scores(similarities[0].tolist(), 0) == [0, 0, 0]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), SEEDS)
def test_equation_3(size: int, side: int, n_masks: int, seed: int) -> None:
    masks = random_masks(size, min(side, size), n_masks, generator=generator(seed))
    scores = coarse((2, n_masks), 9, seed)
    for by_coverage, slow in ((False, published.attention), (True, published.mean_attention)):
        heat = attention_map(scores, masks, by_coverage=by_coverage)
        for image in range(2):
            expected = torch.tensor(slow(scores[image].tolist(), masks.tolist()))
            torch.testing.assert_close(heat[image], expected, atol=1e-6, rtol=0)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2, 3, 100]), SEEDS)
def test_the_hottest_window(height: int, width: int, side: int, levels: int, seed: int) -> None:
    """One level: no heat at all, every window ties."""
    side = min(side, height, width)
    heat = coarse((1, height, width), levels, seed)
    assert tuple(hottest_windows(heat, side)[0, 0].tolist()) == published.hottest_window(
        heat[0].tolist(), side
    )


@given(st.integers(1, 6), st.integers(1, 6), SEEDS)
def test_cutting_and_pasting(size: int, side: int, seed: int) -> None:
    side = min(side, size)
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator(seed))
    corners = torch.randint(0, size - side + 1, (3, 2), generator=generator(seed))
    patches = crop_windows(images, corners, side)
    other = paste_windows(images.flip(0), patches, corners)
    for image, corner in enumerate(corners.tolist()):
        place = (corner[0], corner[1])
        patch = published.cut(images[image].tolist(), place, side)
        assert patches[image].tolist() == patch
        assert other[image].tolist() == published.pasted(images.flip(0)[image].tolist(), patch, place)


@given(st.integers(1, 5), st.integers(1, 12), SEEDS)
def test_enlarging(cells: int, size: int, seed: int) -> None:
    heat = torch.rand(cells, cells, generator=generator(seed))
    expected = torch.tensor(published.enlarged(heat.tolist(), size))
    fast = F.interpolate(heat[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(fast, expected, atol=1e-6, rtol=0)


# --- Grad-CAM: gradients of real networks by differences


class Smooth(nn.Module):
    """A layer with 3 channels, and a head without kinks, so that differences are as good as derivatives."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, 2, 1).double()
        self.mix = nn.Conv2d(3, 4, 3, 1, 1).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64)

    def head(self, channels: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.tanh(channels)) / 3).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images))


class Tokens(nn.Module):
    """Two tokens without a place, then those of a 3×3 grid, mixed by attention: a vision transformer in miniature."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.patch_size = (4, 4)  # type: ignore[assignment]
        self.num_prefix_tokens = 2
        self.layer = nn.Linear(48, 3).double()
        self.value = nn.Linear(3, 4).double()
        self.prefix = nn.Parameter(torch.zeros(1, 2, 48, dtype=torch.float64))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64) / 6

    def head(self, tokens: Tensor) -> Tensor:
        weights = (tokens[:, :1] @ tokens.transpose(1, 2)).softmax(dim=-1)
        return torch.tanh(weights @ self.value(torch.tanh(tokens)))[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        cells = F.unfold(images, 4, stride=4).transpose(1, 2)
        return self.head(self.layer(torch.cat((self.prefix.expand(len(images), -1, -1), cells), dim=1)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("explained", ["logit", "cosine"])
@pytest.mark.parametrize("kind", [Smooth, Tokens])
def test_grad_cam(kind: type[Smooth] | type[Tokens], explained: str, seed: int) -> None:
    """Of the logit of the own cluster, as the scan has it, and of its cosine, as the release has it."""
    network = kind(seed).eval()
    image = torch.randn(1, 3, 12, 12, generator=generator(seed + 1), dtype=torch.float64)
    centroids = F.normalize(torch.randn(5, 4, generator=generator(seed + 2), dtype=torch.float64), dim=1)

    def fast(features: Tensor) -> Tensor:
        features = F.normalize(features, dim=1) if explained == "cosine" else features
        return (features @ centroids.T).amax(dim=1)

    def slow(channels: list[published.Map]) -> float:
        features = network.head(as_layer(channels))[0].tolist()
        cluster = centroids[published.nearest(features, centroids.tolist())].tolist()
        if explained == "cosine":
            return published.cosine(features, cluster)
        return sum(f * c for f, c in zip(features, cluster, strict=True))

    with torch.no_grad():
        output = network.layer(
            image
            if isinstance(network, Smooth)
            else torch.cat((network.prefix, F.unfold(image, 4, stride=4).transpose(1, 2)), dim=1)
        )
    tokens = not isinstance(network, Smooth)

    def as_layer(channels: list[published.Map]) -> Tensor:
        maps = torch.tensor(channels, dtype=torch.float64)[None]
        if not tokens:
            return maps
        return torch.cat((output[:, :2], maps.flatten(2).transpose(1, 2)), dim=1)

    maps = output[:, 2:].transpose(1, 2).reshape(1, 3, 3, 3) if tokens else output
    with torch.no_grad():
        gradients = published.slopes(slow, maps[0].tolist())
    expected = torch.tensor(published.grad_cam(maps[0].tolist(), gradients, 12))
    heat = grad_cam(network, network.layer, image, fast)[0]
    torch.testing.assert_close(heat, expected, atol=1e-4, rtol=0)


def test_grad_cam_without_positive_evidence() -> None:
    channels = [[[1.0, 2.0], [3.0, 4.0]]]
    assert published.grad_cam(channels, [[[-1.0] * 2] * 2], 4) == [[0.0] * 4] * 4
