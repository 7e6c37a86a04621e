"""Luma and chroma, and the discrete cosine transform of square blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unpoison.errors import ShapeError

__all__ = ["block_dct", "dct_matrix", "inverse_block_dct", "to_rgb", "to_yuv"]

_LUMA = (0.299, 0.587, 0.114)
_U_SCALE, _V_SCALE = 0.492, 0.877


def to_yuv(images: Tensor) -> Tensor:
    """RGB to YUV as in BT.601, in the unit of the argument; U and V have mean 0 for grey.

    Args:
        images: (…, 3, H, W) floating point.

    Returns:
        (…, 3, H, W): Y, then U = 0.492 (B - Y), then V = 0.877 (R - Y).

    >>> to_yuv(torch.full((3, 1, 1), 7.0)).flatten().abs() > 1e-4
    tensor([ True, False, False])
    """
    return torch.einsum("ij,...jhw->...ihw", _yuv_matrix().to(images), images)


def to_rgb(yuv: Tensor) -> Tensor:
    """The inverse of `to_yuv`, exact up to rounding and not clipped.

    Args:
        yuv: (…, 3, H, W) floating point.
    """
    return torch.einsum("ij,...jhw->...ihw", torch.linalg.inv(_yuv_matrix()).to(yuv), yuv)


def dct_matrix(side: int) -> Tensor:
    """(side, side) float64, orthonormal DCT-II: row k holds the k-th cosine.

    >>> bool(torch.allclose(dct_matrix(5) @ dct_matrix(5).T, torch.eye(5, dtype=torch.float64)))
    True
    """
    steps = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(math.pi / side * (steps + 0.5) * steps[:, None]) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix


def block_dct(planes: Tensor, side: int) -> Tensor:
    """Orthonormal two-dimensional DCT-II of every whole block; a remainder at the right or bottom is left out.

    Args:
        planes: (…, H, W) floating point.
        side: of the blocks, pixels, 1..min(H, W).

    Returns:
        (…, H // side, W // side, side, side): of every block, coefficient (0, 0) is the mean times `side`.

    Raises:
        ShapeError: no whole block fits.
    """
    height, width = planes.shape[-2:]
    if not 1 <= side <= min(height, width):
        raise ShapeError(f"a block of {side} pixels does not fit in {width}×{height}: give larger images")
    rows, columns = height // side, width // side
    used = planes[..., : rows * side, : columns * side]
    blocks = used.reshape(*planes.shape[:-2], rows, side, columns, side).transpose(-3, -2)
    matrix = dct_matrix(side).to(planes)
    return matrix @ blocks @ matrix.T


def inverse_block_dct(coefficients: Tensor) -> Tensor:
    """Planes from `block_dct`, (…, rows, columns, side, side) to (…, rows · side, columns · side)."""
    matrix = dct_matrix(coefficients.shape[-1]).to(coefficients)
    blocks = matrix.T @ coefficients @ matrix
    return blocks.transpose(-3, -2).flatten(-2, -1).flatten(-3, -2)


def _yuv_matrix() -> Tensor:
    luma = torch.tensor(_LUMA, dtype=torch.float64)
    red, _, blue = torch.eye(3, dtype=torch.float64)
    return torch.stack((luma, _U_SCALE * (blue - luma), _V_SCALE * (red - luma)))
