"""Windows: hide, find, cut, paste, each against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unpoison.errors import ShapeError
from unpoison.functional.windows import (
    attention_map,
    block_masks,
    crop_windows,
    grid_masks,
    hide,
    hottest_windows,
    paste_windows,
    pixel_masks,
    random_masks,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def window_mask(size: int, top: int, left: int, side: int) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_grid_masks_are_overhanging_windows_in_row_major_order(size: int, side: int, stride: int) -> None:
    side = min(size, side)
    starts = range(min(stride - side, 0), size, stride) if stride < side else range(0, size, stride)
    expected = torch.stack([clipped_mask(size, top, left, side) for top in starts for left in starts])
    assert torch.equal(grid_masks(size, side, stride), expected)


def clipped_mask(size: int, top: int, left: int, side: int) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
    return mask


@pytest.mark.parametrize(("size", "side", "stride"), [(32, 8, 4), (32, 9, 3), (64, 16, 8), (10, 10, 5)])
def test_a_grid_hides_every_pixel_equally_often(size: int, side: int, stride: int) -> None:
    """The border too: with uneven coverage, dividing by it would move the attention's peak."""
    coverage = grid_masks(size, side, stride).sum(dim=0)
    assert coverage.unique().tolist() == [(side // stride) ** 2]


@pytest.mark.parametrize(("side", "trigger"), [(9, 6), (12, 8), (8, 8), (32, 5)])
def test_some_grid_mask_hides_every_trigger_wherever_it_lies(side: int, trigger: int) -> None:  # invariant 3
    masks = grid_masks(32, side, side - trigger + 1)
    for top in range(32 - trigger + 1):
        for left in range(32 - trigger + 1):
            assert masks[:, top : top + trigger, left : left + trigger].flatten(1).all(dim=1).any()


def test_windows_that_do_not_fit_are_refused() -> None:
    for side in (0, 9):
        with pytest.raises(ShapeError, match=f"a {side}-pixel window does not fit images of 8 pixels"):
            grid_masks(8, side, 1)
        for strategy in (random_masks, block_masks, pixel_masks):
            with pytest.raises(ShapeError, match="does not fit"):
                strategy(8, side, 1, generator=generator())
        with pytest.raises(ShapeError, match="does not fit"):
            hottest_windows(torch.zeros(1, 8, 8), side)
    with pytest.raises(ShapeError, match="stride=0: expected at least 1 pixel"):
        grid_masks(8, 4, 0)
    with pytest.raises(ShapeError, match=r"heat must be \(N, H, W\), got \(8, 8\)"):
        hottest_windows(torch.zeros(8, 8), 2)


def test_random_masks_are_windows_that_wrap() -> None:
    size, side = 7, 3
    every = {
        tuple(window_mask(size, 0, 0, side).roll((y, x), (0, 1)).flatten().tolist())
        for y in range(size)
        for x in range(size)
    }
    masks = random_masks(size, side, 600, generator=generator())
    assert masks.shape == (600, size, size) and masks.dtype == torch.bool
    assert {tuple(mask.flatten().tolist()) for mask in masks} == every  # all of them come up, no other


def test_every_pixel_is_hidden_equally_often() -> None:  # invariant 3
    size, side = 6, 4
    cyclic = torch.stack(
        [window_mask(size, 0, 0, side).roll((y, x), (0, 1)) for y in range(size) for x in range(size)]
    )
    assert (cyclic.sum(dim=0) == side**2).all()
    frequency = random_masks(size, side, 20_000, generator=generator()).float().mean(dim=0)
    assert (frequency - side**2 / size**2).abs().max() < 0.02


def test_random_masks_depend_on_their_generator_alone() -> None:
    first = random_masks(16, 5, 10, generator=generator(1))
    torch.rand(1)
    assert torch.equal(first, random_masks(16, 5, 10, generator=generator(1)))
    assert not torch.equal(first, random_masks(16, 5, 10, generator=generator(2)))


# --- mask strategies of the paper's section VI-D


def naive_blocks(size: int, side: int, top: int, left: int) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    block = max(1, side // 4)
    for y in range(side):
        for x in range(side):
            mask[(top + y) % size, (left + x) % size] = (y // block + x // block) % 2 == 0
    return mask


def corners_of(masks: Tensor) -> list[tuple[int, int]]:
    """Corners of windows that wrap: the hidden row, and column, whose predecessor is not hidden."""
    found = []
    for mask in masks:
        at = []
        for axis in (1, 0):
            line = mask.any(dim=axis)
            at.append(int((line & ~line.roll(1)).nonzero()[0]) if not line.all() else 0)
        found.append((at[0], at[1]))
    return found


@given(st.integers(2, 14), st.integers(1, 14), st.integers(0, 1000))
def test_block_masks_are_chessboards_in_the_windows_of_random_masks(size: int, side: int, seed: int) -> None:
    side = min(side, size - 1)  # a window as large as the image has no corner that one could see
    whole = random_masks(size, side, 6, generator=generator(seed))
    blocks = block_masks(size, side, 6, generator=generator(seed))
    expected = torch.stack([naive_blocks(size, side, top, left) for top, left in corners_of(whole)])
    assert blocks.dtype == torch.bool and torch.equal(blocks, expected)


@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 1000))
def test_every_strategy_hides_parts_of_the_same_windows(size: int, side: int, seed: int) -> None:
    side = min(side, size)
    whole = random_masks(size, side, 6, generator=generator(seed))
    for strategy in (block_masks, pixel_masks):
        part = strategy(size, side, 6, generator=generator(seed))
        assert part.shape == (6, size, size) and not (part & ~whole).any()
        assert torch.equal(part, strategy(size, side, 6, generator=generator(seed)))
    assert (whole.flatten(1).sum(dim=1) == side**2).all()
    assert (
        pixel_masks(size, side, 6, generator=generator(seed)).flatten(1).sum(1) == -(-(side**2) // 2)
    ).all()


@pytest.mark.parametrize("side", range(1, 70))
def test_half_of_the_window_is_hidden_by_blocks(side: int) -> None:
    """Exactly where the blocks come in pairs; otherwise the uneven rest is at most a row and a column of blocks."""
    hidden = int(block_masks(70, side, 1, generator=generator()).sum())
    block = max(1, side // 4)
    if side % (2 * block) == 0:
        assert hidden == side**2 // 2
    assert side**2 <= 2 * hidden <= side**2 + block**2


@pytest.mark.parametrize("strategy", [random_masks, block_masks, pixel_masks])
def test_every_strategy_hides_every_pixel_equally_often(strategy) -> None:  # invariant 3
    size, side = 6, 4
    masks = strategy(size, side, 20_000, generator=generator())
    share = side**2 / size**2 / (1 if strategy is random_masks else 2)
    assert (masks.float().mean(dim=0) - share).abs().max() < 0.02


def test_chessboards_at_all_corners_cover_every_pixel_alike() -> None:  # invariant 3, exactly
    size, side = 9, 5
    boards = torch.stack([naive_blocks(size, side, y, x) for y in range(size) for x in range(size)])
    assert boards.sum(dim=0).unique().tolist() == [13]


def test_pixels_differ_from_mask_to_mask() -> None:
    masks = pixel_masks(4, 4, 30, generator=generator())  # the window is the image, its corner anywhere
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 25


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_hide_agrees_with_its_twin(dtype: torch.dtype) -> None:
    images = torch.randint(1, 255, (2, 3, 6, 6), generator=generator()).to(dtype)
    masks = random_masks(6, 3, 4, generator=generator())
    colour = torch.tensor([3, 5, 7]).to(dtype)
    pictures = images.flip(0)
    for fill in (colour, pictures):
        hidden = hide(images, masks, fill)
        assert hidden.shape == (8, 3, 6, 6) and hidden.dtype == dtype
        for i in range(2):
            for m in range(4):
                expected = images[i].clone()
                for y, x in masks[m].nonzero().tolist():
                    expected[:, y, x] = colour if fill is colour else pictures[i, :, y, x]
                assert torch.equal(hidden[i * 4 + m], expected)


def test_hide_leaves_its_arguments_alone() -> None:
    images = torch.ones(1, 3, 4, 4)
    hide(images, grid_masks(4, 2, 1), torch.zeros(3))
    assert (images == 1).all()


@pytest.mark.parametrize("by_coverage", [True, False])
def test_attention_agrees_with_its_twin(by_coverage: bool) -> None:
    masks = random_masks(6, 3, 5, generator=generator(3))
    scores = torch.rand(2, 5, generator=generator(4))
    attention = attention_map(scores, masks, by_coverage=by_coverage)
    for i in range(2):
        for y in range(6):
            for x in range(6):
                over = [float(scores[i, m]) for m in range(5) if masks[m, y, x]]
                expected = sum(over) / (len(over) if by_coverage and over else 1)
                assert abs(float(attention[i, y, x]) - expected) < 1e-6
    assert (attention >= 0).all()  # invariant 5
    if by_coverage:
        assert (attention <= scores.amax(dim=1)[:, None, None] + 1e-6).all()


def naive_hottest(heat: Tensor, side: int) -> tuple[int, int]:
    """The tied window nearest to the centre of all that tie."""
    rows, columns = heat.shape[0] - side + 1, heat.shape[1] - side + 1
    totals = {
        (y, x): float(heat[y : y + side, x : x + side].double().sum())
        for y in range(rows)
        for x in range(columns)
    }
    best = max(totals.values())
    tied = [at for at, total in totals.items() if total >= best - 1e-9]
    centre = [sum(at[axis] for at in tied) / len(tied) for axis in (0, 1)]
    return min(tied, key=lambda at: (at[0] - centre[0]) ** 2 + (at[1] - centre[1]) ** 2)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.booleans())
def test_the_hottest_window_agrees_with_its_twin(
    height: int, width: int, side: int, seed: int, plateaus: bool
) -> None:
    side = min(side, height, width)
    heat = torch.rand(1, height, width, generator=generator(seed))
    if plateaus:
        heat = (heat * 3).floor()
    corner = tuple(hottest_windows(heat, side)[0, 0].tolist())
    assert corner == naive_hottest(heat[0], side)
    assert 0 <= corner[0] <= height - side and 0 <= corner[1] <= width - side  # invariant 5


@pytest.mark.parametrize("at", [(0, 0), (0, 7), (7, 0), (7, 7), (3, 5)])
def test_the_last_row_and_column_can_be_reached(at: tuple[int, int]) -> None:
    heat = torch.zeros(1, 8, 8)
    heat[0, at[0], at[1]] = 1
    assert hottest_windows(heat, 1)[0, 0].tolist() == list(at)
    top, left = hottest_windows(heat, 3)[0, 0].tolist()
    assert top <= at[0] < top + 3 and left <= at[1] < left + 3
    heat = window_mask(8, min(at[0], 5), min(at[1], 5), 3)[None].float()
    assert hottest_windows(heat, 3)[0, 0].tolist() == [min(at[0], 5), min(at[1], 5)]


def test_a_window_as_large_as_the_image_has_one_place() -> None:
    heat = torch.rand(3, 8, 8, generator=generator())
    assert hottest_windows(heat, 8).tolist() == [[[0, 0]]] * 3
    assert hottest_windows(heat, 8, count=3).tolist() == [[[0, 0]] * 3] * 3
    images = torch.rand(3, 3, 8, 8, generator=generator())
    assert torch.equal(crop_windows(images, torch.zeros(3, 2, dtype=torch.int64), 8), images)


def test_a_map_without_heat_gives_the_middle() -> None:
    assert hottest_windows(torch.zeros(1, 9, 9), 3)[0, 0].tolist() == [3, 3]


def test_rounding_never_decides_a_tie() -> None:
    heat = torch.full((1, 20, 20), 0.1)
    assert hottest_windows(heat, 6)[0, 0].tolist() == [7, 7]
    assert hottest_windows(heat * 1e6, 6)[0, 0].tolist() == [7, 7]


def test_further_windows_are_the_hottest_of_those_elsewhere() -> None:
    heat = torch.zeros(1, 16, 16)
    for value, (y, x) in ((3.0, (0, 0)), (2.0, (12, 12)), (1.0, (12, 0))):
        heat[0, y : y + 4, x : x + 4] = value
    corners = hottest_windows(heat, 4, count=3)[0].tolist()
    assert corners == [[0, 0], [12, 12], [12, 0]]


@given(st.integers(4, 16), st.integers(1, 8), st.integers(1, 4), st.integers(0, 1000))
def test_further_windows_share_less_than_half_of_a_side_while_there_is_room(
    size: int, side: int, count: int, seed: int
) -> None:
    side = min(side, size)
    heat = torch.rand(1, size, size, generator=generator(seed))
    corners = hottest_windows(heat, side, count)[0].tolist()
    for place, (y, x) in enumerate(corners):
        apart = [max(abs(y - top), abs(x - left)) > side // 2 for top, left in corners[:place]]
        if not all(apart):  # then there is no room left: the last window is repeated
            assert [y, x] == corners[place - 1]
            free = [
                (top, left)
                for top in range(size - side + 1)
                for left in range(size - side + 1)
                if all(max(abs(top - a), abs(left - b)) > side // 2 for a, b in corners[:place])
            ]
            assert free == []


def random_corners(n: int, size: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(0, size - side + 1, (n, 2), generator=generator(seed))


@given(st.integers(1, 8), st.integers(0, 1000))
def test_crop_and_paste_agree_with_slices(side: int, seed: int) -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator(seed), dtype=torch.uint8)
    corners = random_corners(4, 8, side, seed)
    patches = crop_windows(images, corners, side)
    for i, (top, left) in enumerate(corners.tolist()):
        assert torch.equal(patches[i], images[i, :, top : top + side, left : left + side])
    new = 255 - patches
    pasted = paste_windows(images, new, corners)
    for i, (top, left) in enumerate(corners.tolist()):
        expected = images[i].clone()
        expected[:, top : top + side, left : left + side] = new[i]
        assert torch.equal(pasted[i], expected)


@given(st.integers(1, 8), st.integers(0, 1000))
def test_pasting_a_crop_back_changes_nothing(side: int, seed: int) -> None:  # invariant 2
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator(seed), dtype=torch.uint8)
    corners = random_corners(4, 8, side, seed)
    assert torch.equal(paste_windows(images, crop_windows(images, corners, side), corners), images)


def test_paste_and_crop_copy() -> None:
    images = torch.zeros(1, 3, 4, 4)
    corners = torch.zeros(1, 2, dtype=torch.int64)
    paste_windows(images, torch.ones(1, 3, 2, 2), corners)
    crop_windows(images, corners, 4).add_(1)
    assert (images == 0).all()
