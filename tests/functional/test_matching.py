"""Patch similarity against a twin that visits every pixel; copies of one picture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.errors import ShapeError
from unpoison.functional.matching import duplicate_images, patch_similarity


def patches(n: int, side: int, seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=drawn)
    smooth = F.interpolate(coarse, side, mode="bilinear", align_corners=False)
    return (smooth * 255).to(torch.uint8)


def naive_similarity(a: Tensor, b: Tensor, down: int, right: int) -> float:
    """Correlation of the pixels that meet when b is moved; every pixel pair by itself."""
    side = a.shape[-1]
    meets = [
        (y, x) for y in range(side) for x in range(side) if 0 <= y - down < side and 0 <= x - right < side
    ]
    first = [[float(a[c, y, x]) / 255 for y, x in meets] for c in range(3)]
    second = [[float(b[c, y - down, x - right]) / 255 for y, x in meets] for c in range(3)]

    def is_flat(channels: list[list[float]]) -> bool:
        def deviation(values: list[float]) -> float:
            mean = sum(values) / len(values)
            return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

        return max(map(deviation, channels)) < 4 / 255

    if is_flat(first) or is_flat(second):
        return 0.0
    one, two = ([v for channel in channels for v in channel] for channels in (first, second))
    one = [v - sum(one) / len(one) for v in one]
    two = [v - sum(two) / len(two) for v in two]
    product = sum(v * w for v, w in zip(one, two, strict=True))
    return product / math.sqrt(sum(v * v for v in one) * sum(w * w for w in two))


@pytest.mark.parametrize("side", [4, 9])
def test_it_agrees_with_its_twin(side: int) -> None:
    values = patches(4, side)
    values[3] = 100  # flat
    seen = patch_similarity(values)
    most = max(1, int(side / 3))
    shifts = {round(most * step / 3) for step in range(-3, 4)}
    for i in range(4):
        for j in range(4):
            expected = max(naive_similarity(values[i], values[j], y, x) for y in shifts for x in shifts)
            assert float(seen[i, j]) == pytest.approx(1.0 if i == j else max(expected, 0.0), abs=1e-5)


def test_it_is_symmetric_and_bounded_and_leaves_its_argument_alone() -> None:
    values = torch.randint(
        0, 256, (7, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    before = values.clone()
    seen = patch_similarity(values)
    assert torch.equal(seen, seen.T) and torch.equal(seen.diagonal(), torch.ones(7))
    assert seen.min() >= -1 and seen.max() <= 1 + 1e-6
    assert torch.equal(values, before)


def test_the_same_pattern_is_known_when_moved_darkened_or_less_contrasted_and_another_is_not() -> None:
    drawn = torch.Generator().manual_seed(2)
    picture = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=drawn)
    other = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8, generator=drawn)
    here, moved = picture[:, 2:14, 2:14], picture[:, 5:17, 6:18]  # three rows and four columns further
    paler = (here.float() * 0.5 + 60).to(torch.uint8)
    seen = patch_similarity(torch.stack((here, moved, paler, other)))
    assert seen[0, 1] > 0.99 and seen[0, 2] > 0.99
    assert seen[3, :3].max() < 0.5


def test_flat_patches_are_like_nothing() -> None:
    flat = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8)
    assert patch_similarity(flat).tolist() == [[1, 0], [0, 1]]


def test_patches_of_another_shape_are_refused() -> None:
    for shape in ((2, 3, 8, 9), (2, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ShapeError, match=r"patches must be \(n, 3, w, w\), got \("):
            patch_similarity(torch.zeros(shape, dtype=torch.uint8))


def test_a_copy_is_a_copy_even_with_triggers_at_different_places() -> None:
    pictures = patches(3, 64, seed=3)
    copy = pictures[0].clone()
    copy[:, 5:12, 40:47] = 0
    original = pictures[0].clone()
    original[:, 50:57, 8:15] = 0
    seen = duplicate_images(torch.stack((original, copy, pictures[1], pictures[2])))
    assert seen[0, 1] and seen.diagonal().all() and torch.equal(seen, seen.T)
    assert not seen[:2, 2:].any() and not seen[2, 3]
