"""Patch triggers: the family they are drawn from, their sizes, their places, and the stamp."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.errors import ConfigError, ShapeError
from unpoison.functional.triggers import draw_grid, grid_trigger, placement_range, resize_pattern, stamp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8)


def test_grids_are_saturated_and_varied() -> None:
    for seed in range(200):
        grid = draw_grid(generator(seed))
        cells = [tuple(cell) for cell in grid.flatten(1).T.tolist()]
        assert grid.shape == (3, 4, 4) and set(grid.unique().tolist()) <= {0, 255}
        assert len(set(cells)) >= 5
        assert max(cells.count(cell) for cell in cells) <= 6


def test_the_same_generator_draws_the_same_trigger_and_another_one_another() -> None:
    assert torch.equal(grid_trigger(generator(3)), grid_trigger(generator(3)))
    assert not torch.equal(grid_trigger(generator(3)), grid_trigger(generator(4)))


def test_smooth_triggers_look_as_published() -> None:
    """Cubic convolution with a = -1/2 overshoots and is clipped; cell centres keep nearly their colour."""
    grid = draw_grid(generator(1))
    pattern = grid_trigger(generator(1))
    assert pattern.shape == (3, 80, 80) and pattern.dtype == torch.uint8
    assert ((pattern[:, 10::20, 10::20].float() - grid.float()).abs() <= 8).all()
    # Replicated edges: the outermost ring shows the outer cells, not a fade to black.
    assert ((pattern[:, :8, :8].float() - grid[:, :1, :1].float()).abs() <= 40).all()


@pytest.mark.parametrize("side", [4, 5, 7, 8, 9, 50])
def test_nearest_keeps_saturated_cells(side: int) -> None:
    grid = draw_grid(generator(2))
    pattern = resize_pattern(grid, side, "nearest")
    assert pattern.shape == (3, side, side) and set(pattern.unique().tolist()) == {0, 255}
    for row in range(side):  # the naive twin
        for column in range(side):
            cell = grid[:, int((row + 0.5) * 4 / side), int((column + 0.5) * 4 / side)]
            assert torch.equal(pattern[:, row, column], cell)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [7, 40, 80, 123])
def test_smooth_resizing_agrees_with_pillow(resample: str, side: int) -> None:
    pattern = 64 + random_images(3, 60, 80) // 2  # no overshoot: Pillow also clips between its two passes
    image = Image.fromarray(pattern.permute(1, 2, 0).contiguous().numpy())
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resample]
    height = round(side * 60 / 80)
    expected = torch.tensor(np.array(image.resize((side, height), method))).permute(2, 0, 1)
    got = resize_pattern(pattern, side, resample)
    assert got.shape == (3, height, side)
    inner = (slice(None), slice(height // 4, -(height // 4)), slice(side // 4, -(side // 4)))
    assert ((got[inner].float() - expected[inner].float()).abs() <= 1.01).all()  # edges follow another rule


def test_resizing_keeps_the_argument_and_flat_colours() -> None:
    pattern = torch.full((3, 5, 9), 200, dtype=torch.uint8)
    for resample in ("nearest", "bilinear", "bicubic"):
        small = resize_pattern(pattern, 4, resample)
        assert small.shape == (3, 2, 4) and (small == 200).all()
    same = resize_pattern(pattern, 9)
    same.zero_()
    assert (pattern == 200).all()


def test_a_flat_wide_pattern_keeps_one_row() -> None:
    assert resize_pattern(torch.zeros(3, 1, 50, dtype=torch.uint8), 4).shape == (3, 1, 4)


def test_wrong_patterns_and_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"must be \(3, h, w\) uint8, got \(4, 4\) torch.uint8"):
        resize_pattern(torch.zeros(4, 4, dtype=torch.uint8), 8)
    with pytest.raises(ShapeError, match=r"got \(3, 4, 4\) torch.float32"):
        resize_pattern(torch.zeros(3, 4, 4), 8)
    with pytest.raises(ConfigError, match="trigger side 0: expected at least 1 pixel"):
        resize_pattern(draw_grid(generator()), 0)
    with pytest.raises(ConfigError, match="resample 'lanczos': expected one of nearest, bilinear, bicubic"):
        resize_pattern(draw_grid(generator()), 8, "lanczos")


@pytest.mark.parametrize(
    ("length", "side", "margin", "expected"),
    [
        (224, 50, 0.25, (56, 118)),
        (224, 50, 0.10, (22, 151)),
        (32, 7, 0.25, (8, 17)),
        (32, 7, 0.10, (3, 21)),
        (64, 14, 0.25, (16, 34)),
        (70, 10, 0.10, (7, 53)),  # 0.9 · 70 - 10 is a little below 53 in floating point
        (90, 50, 0.25, (22, 22)),  # empty: pinned to the margin
        (10, 9, 0.25, (1, 1)),  # pinned, but inside
        (10, 10, 0.25, (0, 0)),
        (10, 3, 0.0, (0, 7)),
    ],
)
def test_placement_follows_the_papers_margins(
    length: int, side: int, margin: float, expected: tuple[int, int]
) -> None:
    assert placement_range(length, side, margin) == expected


def test_a_trigger_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="a 11-pixel trigger does not fit in 10 image pixels; give a smaller --size"
    ):
        placement_range(10, 11, 0.25)


def stamp_naively(
    images: torch.Tensor, pattern: torch.Tensor, top: list[int], left: list[int]
) -> torch.Tensor:
    stamped = images.clone()
    for image, y, x in zip(stamped, top, left, strict=True):
        image[:, y : y + pattern.shape[1], x : x + pattern.shape[2]] = pattern
    return stamped


def test_stamp_agrees_with_its_naive_twin_up_to_the_borders() -> None:
    images, pattern = random_images(5, 3, 9, 7), random_images(3, 2, 3, seed=1)
    top, left = [0, 7, 3, 7, 0], [0, 4, 2, 0, 4]
    got = stamp(images, pattern, torch.tensor(top), torch.tensor(left))
    assert torch.equal(got, stamp_naively(images, pattern, top, left))


def test_stamp_leaves_its_arguments_and_the_memory_format() -> None:
    images = random_images(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    got = stamp(images, random_images(3, 4, 4, seed=1), 2, 4)
    assert torch.equal(images, before)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(got, before)


def test_stamping_the_pixels_underneath_changes_nothing() -> None:
    images = random_images(1, 3, 8, 8)
    assert torch.equal(stamp(images, images[0, :, 2:5, 3:7].clone(), 2, 3), images)


def test_stamp_of_no_images_and_of_a_whole_image() -> None:
    pattern = random_images(3, 4, 4)
    assert stamp(random_images(0, 3, 4, 4), pattern, 0, 0).shape == (0, 3, 4, 4)
    assert torch.equal(stamp(random_images(1, 3, 4, 4, seed=2), pattern, 0, 0)[0], pattern)


def test_stamp_refuses_what_does_not_fit() -> None:
    images, pattern = random_images(2, 3, 8, 8), random_images(3, 4, 4)
    for top, left in ((5, 0), (0, 5), (-1, 0), (0, -1)):
        with pytest.raises(ShapeError, match="a 4×4 pattern would leave its 8×8 image"):
            stamp(images, pattern, torch.tensor([0, top]), torch.tensor([0, left]))
    with pytest.raises(ShapeError, match=r"stamp needs images \(N, C, H, W\)"):
        stamp(images[0], pattern, 0, 0)
    with pytest.raises(ShapeError, match=r"images are torch.uint8 and the pattern is torch.float32"):
        stamp(images, pattern.float(), 0, 0)
    with pytest.raises(ShapeError, match=r"positions must be \(2,\) integers or one integer, got \(3,\)"):
        stamp(images, pattern, torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(ShapeError, match="positions must be"):
        stamp(images, pattern, torch.zeros(2), 0)
