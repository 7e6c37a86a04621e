"""Chroma and block DCT agree with the formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch

from unpoison.errors import ShapeError
from unpoison.functional.frequency import block_dct, inverse_block_dct, to_rgb, to_yuv


def slow_dct(block: torch.Tensor) -> torch.Tensor:
    """DCT-II from its definition, one coefficient after the other."""
    side = len(block)
    out = torch.zeros_like(block)
    for u in range(side):
        for v in range(side):
            total = sum(
                float(block[y, x])
                * math.cos(math.pi * u * (2 * y + 1) / (2 * side))
                * math.cos(math.pi * v * (2 * x + 1) / (2 * side))
                for y in range(side)
                for x in range(side)
            )
            weight = [math.sqrt(1 / side) if k == 0 else math.sqrt(2 / side) for k in (u, v)]
            out[u, v] = weight[0] * weight[1] * total
    return out


def test_every_block_is_transformed_by_itself_and_the_remainder_is_left_out() -> None:
    planes = torch.rand(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = block_dct(planes, 4)
    assert found.shape == (2, 2, 3, 4, 4)
    for row in range(2):
        for column in range(3):
            block = planes[1, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.allclose(found[1, row, column], slow_dct(block))


def test_the_inverse_brings_the_blocks_back() -> None:
    planes = torch.rand(3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(inverse_block_dct(block_dct(planes, 4)), planes)


def test_yuv_follows_bt601_and_comes_back() -> None:
    red, green, blue = 200.0, 100.0, 50.0
    image = torch.tensor([red, green, blue], dtype=torch.float64).view(3, 1, 1)
    y, u, v = to_yuv(image).flatten().tolist()
    assert y == pytest.approx(0.299 * red + 0.587 * green + 0.114 * blue)
    assert u == pytest.approx(0.436 * blue - 0.147 * red - 0.289 * green, abs=0.1)
    assert v == pytest.approx(0.615 * red - 0.515 * green - 0.100 * blue, abs=0.1)
    assert torch.allclose(to_rgb(to_yuv(image)), image)


def test_a_block_must_fit() -> None:
    with pytest.raises(ShapeError, match="a block of 9 pixels does not fit in 12×8: give larger images"):
        block_dct(torch.zeros(8, 12), 9)
