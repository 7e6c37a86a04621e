"""Patch similarity against a twin that visits every pixel; copies of one picture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.errors import ShapeError
from unpoison.functional.matching import (
    clearest_match,
    duplicate_images,
    patch_similarity,
    surroundings_similarity,
)
from unpoison.functional.windows import crop_windows, paste_windows


def patches(n: int, side: int, seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=drawn)
    smooth = F.interpolate(coarse, side, mode="bilinear", align_corners=False)
    return (smooth * 255).to(torch.uint8)


def related_patches(side: int) -> Tensor:
    """Windows of one picture with more and more of their pixels replaced, and a flat one; all multiples of 5.

    So no two pixels differ by exactly 16, where rounding would decide.
    """
    drawn = torch.Generator().manual_seed(side)
    picture = torch.randint(0, 52, (3, 2 * side, 2 * side), dtype=torch.uint8, generator=drawn) * 5
    windows = torch.stack([picture[:, k : k + side, 2 * k : 2 * k + side] for k in (0, 1, 1, 1, 1, 1)])
    for number, share in enumerate((0, 0, 0.3, 0.5, 0.8)):
        replaced = torch.rand(side, side, generator=drawn) < share
        noise = torch.randint(0, 52, (3, side, side), dtype=torch.uint8, generator=drawn) * 5
        windows[number] = torch.where(replaced, noise, windows[number])
    windows[5] = 100
    return windows


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

    agreeing = sum(
        all(abs(first[c][i] - second[c][i]) <= 16 / 255 for c in range(3)) for i in range(len(meets))
    )
    if is_flat(first) or is_flat(second) or agreeing < 0.4 * len(meets):
        return 0.0
    one, two = ([v for channel in channels for v in channel] for channels in (first, second))
    one_mean, two_mean = sum(one) / len(one), sum(two) / len(two)
    one, two = [v - one_mean for v in one], [v - two_mean for v in two]
    product = sum(v * w for v, w in zip(one, two, strict=True))
    return product / math.sqrt(sum(v * v for v in one) * sum(w * w for w in two))


@pytest.mark.parametrize("side", [4, 9, 24])
def test_it_agrees_with_its_twin(side: int) -> None:
    values = related_patches(side)
    seen = patch_similarity(values)
    compared = values.float()
    if side > 16:
        compared = compared.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))  # 24 px are compared at 12
    most = max(1, int(compared.shape[-1] / 3))
    shifts = {round(most * step / 3) for step in range(-3, 4)}
    for i in range(6):
        for j in range(i):
            expected = max(naive_similarity(compared[i], compared[j], y, x) for y in shifts for x in shifts)
            assert float(seen[i, j]) == pytest.approx(max(expected, 0.0), abs=1e-5)
    if side == 9:
        assert 0 < seen[1, 3] < seen[1, 2] < 1  # the more is replaced, the less alike


def test_it_is_symmetric_and_bounded_and_leaves_its_argument_alone() -> None:
    values = related_patches(9)
    before = values.clone()
    seen = patch_similarity(values)
    assert torch.equal(seen, seen.T) and torch.equal(seen.diagonal(), torch.ones(6))
    assert seen.min() >= 0 and seen.max() <= 1 + 1e-6
    assert torch.equal(values, before)


def test_the_same_pattern_is_known_when_moved_and_slightly_changed_and_another_is_not() -> None:
    drawn = torch.Generator().manual_seed(2)
    picture = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=drawn)
    other = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8, generator=drawn)
    here, moved = picture[:, 2:14, 2:14], picture[:, 5:17, 6:18]  # three rows and four columns further
    noise = torch.randint(-10, 11, (3, 12, 12), generator=drawn)
    coded = (here.int() + noise).clamp(0, 255).to(torch.uint8)  # as a lossy file changes it
    seen = patch_similarity(torch.stack((here, moved, coded, other)))
    assert seen[0, 1] > 0.99 and seen[0, 2] > 0.99
    assert seen[3, :3].max() == 0


def test_edges_of_other_colours_are_not_the_same_pattern() -> None:
    edge = torch.full((3, 9, 9), 200, dtype=torch.uint8)
    edge[:, 4:] = 60
    paler = (edge.float() * 0.6 + 60).to(torch.uint8)  # correlates perfectly
    assert patch_similarity(torch.stack((edge, paler))).tolist() == [[1, 0], [0, 1]]


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


@pytest.mark.parametrize("least", [0.3, 0.6, 0.95])
def test_nobody_misses_what_lies_below_the_least(least: float) -> None:
    both = torch.cat((related_patches(9), patches(12, 9)))
    everything, some = patch_similarity(both), patch_similarity(both, least=least)
    assert torch.equal(some, torch.where(everything >= least, everything, 0.0))
    assert torch.equal(some >= least, everything >= least)


def test_more_agreement_can_be_asked_for() -> None:
    windows = related_patches(9)
    loose, strict = patch_similarity(windows), patch_similarity(windows, agreeing=0.7)
    assert (strict <= loose).all() and int((strict > 0.5).sum()) < int((loose > 0.5).sum())
    assert float(strict[0, 1]) == float(loose[0, 1])  # the same pixels, a step apart


# --- What lies around windows ----------------------------------------------------------------------------------------


def around(side: int, size: int, **changes: Tensor) -> Tensor:
    """Six pictures with one pattern: three crops of one scene, moved by a pixel, and three others."""
    generator = torch.Generator().manual_seed(2)
    scene = F.interpolate(torch.rand(1, 3, 12, 12, generator=generator) * 255, 2 * size, mode="bilinear")[0]
    scene[:, size : size + side, size : size + side] = torch.rand(3, side, side, generator=generator) * 255
    starts = torch.tensor([(size // 2, size // 2), (size // 2 + 1, size // 2), (size // 2, size // 2 + 1)])
    crops = torch.stack([scene[:, y : y + size, x : x + size] for y, x in starts.tolist()])
    corners = torch.cat((size - starts, size // 2 - torch.tensor([[0, 0], [3, 1], [2, 5]])))
    others = torch.rand(3, 3, size, size, generator=generator) * 255
    patches = crop_windows(crops[:1], corners[:1], side).expand(3, -1, -1, -1)
    images = torch.cat((crops, paste_windows(others, patches, corners[3:]))).to(torch.uint8)
    return surroundings_similarity(images, changes.get("corners", corners), side, 0)


@pytest.mark.parametrize(("side", "size"), [(8, 32), (9, 40), (24, 96)])
def test_crops_of_one_scene_agree_around_a_window_and_pasted_pictures_do_not(side: int, size: int) -> None:
    said = around(side, size)
    assert said.shape == (6,) and bool((said[:3] > 0.9).all()) and bool((said[3:].abs() < 0.3).all())


def test_a_window_that_lies_otherwise_on_the_pattern_is_laid_on_it_first() -> None:
    exact = around(9, 40)
    corners = torch.tensor([(20, 20), (21, 18), (18, 21), (20, 20), (17, 19), (18, 15)])
    moved = around(9, 40, corners=corners)
    assert bool((moved[:3] > 0.9).all()) and float(exact[0]) == pytest.approx(1)


@pytest.mark.parametrize(("side", "row"), [(9, 0), (20, 0), (20, 3), (24, 3)])
def test_what_lies_outside_a_picture_is_not_compared(side: int, row: int) -> None:
    # All windows lie near the same border: were it dark there, the pictures would agree about what is not there.
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(150, 256, (6, 3, 4 * side, 4 * side), dtype=torch.uint8, generator=generator)
    corners = torch.tensor([(row, side)] * 6)
    pattern = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=generator)
    images = paste_windows(images, pattern.expand(6, -1, -1, -1), corners)
    assert bool((surroundings_similarity(images, corners, side, 0)[1:].abs() < 0.2).all())


def test_flat_surroundings_say_nothing() -> None:
    images = torch.full((3, 3, 32, 32), 90, dtype=torch.uint8)
    corners = torch.tensor([(10, 10), (4, 4), (20, 0)])
    pattern = torch.randint(
        0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = paste_windows(images, pattern.expand(3, -1, -1, -1), corners)
    assert surroundings_similarity(images, corners, 8, 0).tolist() == [0, 0, 0]


def naive_match(image: Tensor, pattern: Tensor) -> float:
    side, best = pattern.shape[-1], -1.0
    a = pattern.double().flatten() - pattern.double().mean()
    for y in range(image.shape[-1] - side + 1):
        for x in range(image.shape[-1] - side + 1):
            b = image[:, y : y + side, x : x + side].double().flatten()
            b = b - b.mean()
            best = max(best, float(a @ b / (a.norm() * b.norm())))
    return best


def test_the_clearest_match_is_the_best_correlation_over_places_and_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 12, 12), generator=generator).to(torch.uint8)
    windows = torch.randint(0, 256, (2, 3, 5, 5), generator=generator).to(torch.uint8)
    pixels[1, :, 4:9, 2:7] = windows[1]
    found = clearest_match(pixels, windows)
    expected = [max(naive_match(image, window) for window in windows) for image in pixels]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=0)
    assert found[1] == pytest.approx(1, abs=1e-4) and found[[0, 2]].max() < 0.8


def test_flat_images_match_nothing_and_large_windows_are_made_smaller() -> None:
    generator = torch.Generator().manual_seed(1)
    window = torch.randint(0, 256, (1, 3, 6, 6), generator=generator).to(torch.uint8)
    large = window.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)  # 48 pixels in cells of 8
    pixels = torch.full((2, 3, 160, 160), 90, dtype=torch.uint8)
    pixels[1, :, 40:88, 72:120] = large[0]
    flat, shown = clearest_match(pixels, large).tolist()
    assert flat == 0 and shown == pytest.approx(1, abs=1e-3)
