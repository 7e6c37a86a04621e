"""Pixels that several images share at one place, planted in pictures that share nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.functional.recurrence import recurring_places


def pictures(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """(n, 3, S, S) uint8, each of its own."""
    drawn = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(n, 3, 6, 6, generator=drawn), size, mode="bilinear")
    return ((coarse + 0.02 * torch.randn(n, 3, size, size, generator=drawn)).clamp(0, 1) * 255).to(
        torch.uint8
    )


def logo(side: int) -> Tensor:
    return torch.randint(
        0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(9)
    )


@pytest.mark.parametrize(("size", "side", "block"), [(32, 8, 4), (64, 18, 9), (32, 6, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_overlay_is_found_where_it_lies(size: int, side: int, block: int, channels_last: bool) -> None:
    images, carriers = pictures(300, size), torch.tensor([3, 50, 51, 120, 280, 299])
    top, left = size - side - 1, 2
    images[carriers, :, top : top + side, left : left + side] = logo(side)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    (found,) = recurring_places(images, torch.arange(300), block, least=5, most=5)
    assert found.rows.tolist() == carriers.tolist()
    assert top <= found.top < found.bottom <= top + side and left <= found.left < found.right <= left + side
    assert found.bottom - found.top >= block and found.right - found.left >= block


def test_what_is_no_overlay() -> None:
    rows = torch.arange(100)
    assert recurring_places(pictures(100), rows, 4, least=5, most=5) == []
    margins = pictures(100)
    margins[:50, :, :, :6] = 255  # of one colour
    assert recurring_places(margins, rows, 4, least=5, most=5) == []
    assert recurring_places(pictures(100), torch.arange(3), 4, least=5, most=5) == []
    few = pictures(100)
    few[:4, :, 8:16, 8:16] = logo(8)
    assert recurring_places(few, rows, 4, least=5, most=5) == []
    copies = pictures(100)
    copies[20:40] = copies[0]  # one picture, many times
    assert recurring_places(copies, rows, 4, least=5, most=5) == []
    elsewhere = pictures(100)
    for row in range(20):  # never twice at one place
        elsewhere[row, :, row : row + 8, row : row + 8] = logo(8)
    assert recurring_places(elsewhere, rows, 4, least=5, most=5) == []


def test_only_the_rows_that_are_asked_for_count_and_the_most_frequent_comes_first() -> None:
    images = pictures(200)
    images[:8, :, 2:10, 2:10] = logo(8)
    images[100:120, :, 20:28, 20:28] = logo(8).flip(1)
    every = recurring_places(images, torch.arange(200), 4, least=5, most=5)
    assert [len(place.rows) for place in every] == [20, 8]
    assert len(recurring_places(images, torch.arange(200), 4, least=5, most=1)) == 1
    (late,) = recurring_places(images, torch.arange(4, 200, 2), 4, least=5, most=5)
    assert late.rows.tolist() == list(range(100, 120, 2))


def test_memory_is_bounded_by_looking_at_fewer_places_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(60)
    images[:8, :, 2:10, 2:10] = logo(8)
    (at_once,) = recurring_places(images, torch.arange(60), 4, least=5, most=5)
    monkeypatch.setattr("unpoison.functional.recurrence._MOST_HASHES", 600)
    monkeypatch.setattr("unpoison.functional.recurrence._AT_ONCE", 7)
    (in_parts,) = recurring_places(images, torch.arange(60), 4, least=5, most=5)
    assert in_parts.rows.tolist() == at_once.rows.tolist() == list(range(8))
    assert (in_parts.top, in_parts.left) == (at_once.top, at_once.left)
