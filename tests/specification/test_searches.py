"""The whole searches against their specification: the rounds alone, and from pixels to scores."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from specification import published
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.functional.clustering import assign
from unpoison.records import Clusters, Geometry, ImageSet
from unpoison.runtime import silent, stage_generator
from unpoison.scan.candidates import Candidates
from unpoison.scan.config import ScanConfig
from unpoison.scan.flip_test import Flips, FlipTest
from unpoison.scan.patchsearch import GradCamAttention
from unpoison.scan.poisoncam import MaskAttention
from unpoison.scan.search import Attention, Searcher, n_scored


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plainly(_name: str, compute: Callable[[], Candidates]) -> Candidates:
    return compute()


@given(st.integers(2, 300), st.integers(1, 5), st.floats(0.2, 0.99))
def test_how_many_images_are_scored(n_clusters: int, samples: int, prune: float) -> None:
    queues = [[cluster] * 200 for cluster in range(n_clusters)]
    scored = published.search(queues, range(n_clusters), samples, prune, lambda row: 0.0, "sum")
    assert n_scored(n_clusters, samples, prune) == len(scored)


# --- the rounds, with scores from a table


class NoAttention:
    def heat(self, pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels), 4, 4)

    def heat_along(self, pixels: Tensor, directions: Tensor) -> Tensor:
        raise NotImplementedError

    def windows(self, heat: Tensor) -> Tensor:
        raise NotImplementedError


class FromTable:
    """Every score of an image, whose number is written in its pixels, is the table's."""

    def __init__(self, table: Tensor, n_clusters: int) -> None:
        self.table, self.n_clusters = table, n_clusters

    def run(self, patches: Tensor, *, generator: torch.Generator) -> Flips:
        score = self.table[patches[:, 0, 0, 0].long() + 256 * patches[:, 1, 0, 0].long()]
        gain = score[:, None].expand(-1, self.n_clusters)
        return Flips(score, gain, torch.zeros_like(gain), score[:, None])


VARIANTS = {
    "poisoncam": ({"faithful": True, "score": "any"}, "sum"),
    "poisoncam, source": ({"faithful": True, "score": "source"}, "sum"),
    "patchsearch": ({"faithful": True, "method": "patchsearch"}, "maximum"),
    "ours": ({"score": "concentrated"}, "maximum of the scored"),
}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rounds(variant: str, seed: int) -> None:
    """Empty clusters, clusters that run dry, scores that are negative or all the same."""
    settings, rating = VARIANTS[variant]
    choose = random.Random(seed)
    n_clusters, samples = choose.randint(2, 12), choose.randint(1, 4)
    n_images = choose.randint(n_clusters, 120)
    prune, levels = choose.choice([0.01, 0.1, 0.25, 0.5, 0.75, 0.99]), choose.choice([1, 2, 5, 200])
    assignment = torch.randint(0, n_clusters, (n_images,), generator=generator(seed))
    allowed = torch.rand(n_images, generator=generator(seed + 1)) < 0.8
    allowed[0] = True
    assignment[0] = 0
    table = (torch.randint(0, levels, (n_images,), generator=generator(seed + 2)) - levels // 2).float() / 256
    numbers = torch.arange(n_images)
    pixels = torch.stack((numbers % 256, numbers // 256, 0 * numbers), dim=1).to(torch.uint8)
    pixels = pixels[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    config = ScanConfig(
        window=2, clusters=n_clusters, n_flips=2, samples=samples, prune=prune, **settings
    ).resolve(n_images, 4)

    def drawn(step: str) -> torch.Generator:
        return stage_generator(seed, step)

    searcher = Searcher(
        ImageSet(tuple(map(str, range(n_images))), pixels),
        Clusters(torch.zeros(n_clusters, 4), assignment),
        NoAttention(),
        FromTable(table, n_clusters),  # type: ignore[arg-type]
        config,
        allowed,
        drawn,
        silent,
    )
    order = (
        torch.randperm(n_clusters, generator=drawn("cluster order")).tolist()
        if config.faithful
        else list(range(n_clusters))
    )
    expected = published.search(
        searcher.queues(), order, samples, prune, lambda row: float(table[row]), rating
    )
    found = searcher.explore(plainly)
    assert found.rows.tolist() == [row for row, _ in expected]
    assert config.score is not None
    assert found.flips.score(config.score, found.own).tolist() == [score for _, score in expected]


# --- from pixels to scores

SIZE, SIDE, KINDS = 16, 5, 4
SHADES = 8


class Detectors(nn.Module):
    """Whole numbers in, whole numbers out: how strongly each of four 2×2 patterns shows at its best place.

    All sums are exact, so that batches, orders of summation and precisions cannot matter, and clusters tie often.
    """

    def __init__(self, patterns: Tensor) -> None:
        super().__init__()
        self.register_buffer("patterns", patterns.float())

    def forward(self, images: Tensor) -> Tensor:
        return 5 + F.conv2d(images.round(), self.patterns).flatten(2).amax(dim=2).clamp_min(0)


class Averages(nn.Module):
    """A map of 8×8 cells per pattern, and its mean: Grad-CAM of it is known without any derivative."""

    def __init__(self, patterns: Tensor) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, KINDS, 2, 2, bias=False)
        self.layer.weight.data = patterns.float()

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.round()).clamp_min(0).mean(dim=(2, 3)) * 64


def encode_detectors(patterns: list[published.Picture]) -> published.Encode:
    def encode(picture: published.Picture) -> list[float]:
        features = []
        for pattern in patterns:
            best = 0.0
            for top in range(SIZE - 1):
                for left in range(SIZE - 1):
                    best = max(best, response(picture, pattern, top, left))
            features.append(5 + best)
        return features

    return encode


def response(picture: published.Picture, pattern: published.Picture, top: int, left: int) -> float:
    total = 0.0
    for c in range(3):
        for y in range(2):
            for x in range(2):
                total += pattern[c][y][x] * picture[c][top + y][left + x]
    return total


def encode_averages(patterns: list[published.Picture]) -> published.Encode:
    def encode(picture: published.Picture) -> list[float]:
        return [
            sum(
                max(0.0, response(picture, p, top, left))
                for top in range(0, SIZE, 2)
                for left in range(0, SIZE, 2)
            )
            for p in patterns
        ]

    return encode


def patchsearch_heat(
    picture: published.Picture, patterns: list[published.Picture], encode: published.Encode
) -> published.Map:
    """The release's scalar is the cosine with the own centroid, here an axis k: its slope along feature j is
    ([j = k] − cos · z_j) / |f|, and every feature is the mean of a map, cut off at 0 and times 64.
    """
    features = encode(picture)
    axes = [[float(j == k) for j in range(KINDS)] for k in range(KINDS)]
    own = published.nearest(features, axes)
    length = sum(f * f for f in features) ** 0.5
    channels, gradients = [], []
    for j, pattern in enumerate(patterns):
        cells = [[response(picture, pattern, y, x) for x in range(0, SIZE, 2)] for y in range(0, SIZE, 2)]
        slope = (float(j == own) - features[own] * features[j] / length**2) / length if length else 0.0
        channels.append(cells)
        gradients.append([[slope if cell > 0 else 0.0 for cell in row] for row in cells])
    return published.grad_cam(channels, gradients, SIZE)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("method", "score"), [("poisoncam", "any"), ("poisoncam", "source"), ("patchsearch", "source")]
)
def test_from_pixels_to_scores(method: str, score: str, seed: int) -> None:
    """Same images, same windows, same counts, in the same order, by the package and by the loops."""
    n_images, n_flips = 30, 6
    draw = generator(seed)
    pixels = torch.randint(0, SHADES, (n_images, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw)
    pixels[0] = 0  # nothing to see: no heat, no feature
    patterns = torch.randint(-2, 3, (KINDS, 3, 2, 2), generator=draw)
    network = Averages(patterns) if method == "patchsearch" else Detectors(patterns)
    # Pixels reach the network as the whole numbers that they are.
    preprocessing = Preprocessing(geometry=Geometry(SIZE, SIZE), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    encoder = Encoder(network, preprocessing, device="cpu", precision="fp32")
    centroids = torch.eye(KINDS)
    clusters = Clusters(centroids, assign(encoder.features(pixels), centroids))
    config = ScanConfig(
        method=method, score=score, faithful=True, window=SIDE, clusters=KINDS, n_masks=9, n_flips=n_flips
    ).resolve(n_images, SIZE)
    images = ImageSet(tuple(map(str, range(n_images))), pixels)
    test = FlipTest.draw(
        encoder,
        images,
        clusters,
        torch.randperm(n_images, generator=draw)[:n_flips],
        SIDE,
        generator=draw,
        with_control=False,
        batch_size=7,
    )
    attention: Attention
    if method == "patchsearch":
        attention = GradCamAttention(encoder, clusters, config, batch_size=7)
    else:
        attention = MaskAttention(encoder, clusters, config, generator=draw, batch_size=7)

    def drawn(step: str) -> torch.Generator:
        return stage_generator(seed, step)

    allowed = torch.ones(n_images, dtype=torch.bool)
    searcher = Searcher(images, clusters, attention, test, config, allowed, drawn, silent)
    found = searcher.explore(plainly)

    axes, shapes = centroids.tolist(), patterns.tolist()
    encode = encode_averages(shapes) if method == "patchsearch" else encode_detectors(shapes)
    flip_set = [
        (picture, (top, left))
        for picture, (top, left) in zip(
            test.flip_set.pixels.tolist(), test.flip_set.corners.tolist(), strict=True
        )
    ]
    windows: dict[int, published.Corner] = {}

    def score_of(row: int) -> float:
        picture = pixels[row].tolist()
        if isinstance(attention, MaskAttention):
            heat = published.poisoncam_heat(picture, attention.masks.tolist(), (0, 0, 0), encode, axes)
        else:
            heat = patchsearch_heat(picture, shapes, encode)
        windows[row] = published.hottest_window(heat, SIDE)
        before, after = published.flips(published.cut(picture, windows[row], SIDE), flip_set, encode, axes)
        if score == "any":
            return published.any_score(before, after)
        return published.source_score(before, after, published.nearest(encode(picture), axes))

    order = torch.randperm(KINDS, generator=drawn("cluster order")).tolist()
    rating = "maximum" if method == "patchsearch" else "sum"
    expected = published.search(searcher.queues(), order, config.samples, config.prune, score_of, rating)
    assert found.rows.tolist() == [row for row, _ in expected]
    assert [tuple(corner) for corner in found.corners.tolist()] == [windows[row] for row, _ in expected]
    counts = found.flips.score(score, found.own) * n_flips
    assert counts.tolist() == pytest.approx([count for _, count in expected], abs=1e-4)
    for row, patch in zip(found.rows.tolist(), found.patches, strict=True):
        assert patch.tolist() == published.cut(pixels[row].tolist(), windows[row], SIDE)


@pytest.mark.parametrize("seed", range(8))
def test_the_three_counts_of_a_flip_test(seed: int) -> None:
    draw = generator(seed)
    side = (1, SIDE, SIZE)[seed % 3]  # a pixel, a window, the whole image
    n_flips = 1 + seed
    pixels = torch.randint(0, SHADES, (12, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw)
    patterns = torch.randint(-2, 3, (KINDS, 3, 2, 2), generator=draw)
    preprocessing = Preprocessing(geometry=Geometry(SIZE, SIZE), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    encoder = Encoder(Detectors(patterns), preprocessing, device="cpu", precision="fp32")
    clusters = Clusters(torch.eye(KINDS), torch.zeros(12, dtype=torch.int64))
    test = FlipTest.draw(
        encoder,
        ImageSet(tuple(map(str, range(12))), pixels),
        clusters,
        torch.arange(n_flips),
        side,
        generator=draw,
        with_control=False,
        batch_size=5,
    )
    patches = torch.randint(0, 3 * SHADES, (6, 3, side, side), dtype=torch.uint8, generator=draw)
    own = torch.randint(0, KINDS, (6,), generator=draw)
    seen = test.run(patches, generator=draw)
    flip_set = list(zip(pixels[:n_flips].tolist(), map(tuple, test.flip_set.corners.tolist()), strict=True))
    encode = encode_detectors(patterns.tolist())
    for place, patch in enumerate(patches.tolist()):
        before, after = published.flips(patch, flip_set, encode, torch.eye(KINDS).tolist())
        counts = {
            "any": published.any_score(before, after),
            "source": published.source_score(before, after, int(own[place])),
            "concentrated": published.concentrated_score(before, after, KINDS),
        }
        for kind, count in counts.items():
            assert float(seen.score(kind, own)[place]) * n_flips == pytest.approx(count, abs=1e-5)
