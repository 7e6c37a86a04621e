"""Triggers that cover the whole image: each keeps a share of the image and adds one fixed picture to it.

CTRL adds waves to the chroma, SIG waves to all colours, and blending mixes a picture in. None depends on what the image
shows, so each is one picture per image size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.errors import ConfigError, ShapeError
from unpoison.functional.frequency import inverse_block_dct, to_rgb

__all__ = ["CTRL_BLOCK", "CTRL_COEFFICIENTS", "GLOBAL_KINDS", "apply_global", "global_change"]

GLOBAL_KINDS = ("ctrl", "blended", "sig")
"""Frequency trigger (Li et al., ICCV 2023), blended picture (Chen et al., 2017), waves (Barni et al., ICIP 2019)."""

CTRL_BLOCK = 32
"""Side of the blocks that CTRL transforms, pixels."""

CTRL_COEFFICIENTS = ((15, 15), (31, 31))
"""The coefficients of U and V that CTRL raises, in every block."""

_SIG_PERIODS = 6  # waves across the width of the image


def global_change(
    kind: str, strength: float, pattern: Tensor, height: int, width: int
) -> tuple[float, Tensor]:
    """What a trigger keeps of an image of this size, and what it adds.

    Args:
        kind: one of `GLOBAL_KINDS`.
        strength: of `ctrl`: added to each coefficient; of `sig`: amplitude in grey levels; of `blended`: share of the
            pattern in the mixture, (0, 1).
        pattern: (3, h, w) uint8: the picture that `blended` mixes in, brought to the image's size; of no matter for
            the others.
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        The share of the image that stays, and (3, height, width) float64 in grey levels to be added.

    Raises:
        ConfigError: the kind is unknown, or an image too small for a single block of CTRL.
    """
    if kind == "ctrl":
        return 1.0, _ctrl(strength, height, width)
    if kind == "sig":
        wave = torch.sin(2 * math.pi * _SIG_PERIODS / width * torch.arange(width, dtype=torch.float64))
        return 1.0, (strength * wave).expand(3, height, width)
    if kind == "blended":
        picture = F.interpolate(
            pattern[None].cpu().double(), (height, width), mode="bilinear", align_corners=False
        )
        return 1.0 - strength, strength * picture[0]
    raise ConfigError(f"trigger kind {kind!r}: expected one of {', '.join(GLOBAL_KINDS)}")


def apply_global(images: Tensor, kind: str, strength: float, pattern: Tensor) -> Tensor:
    """Images with the trigger, rounded and clipped.

    Args:
        images: (N, 3, H, W) uint8.
        kind: as in `global_change`, like the arguments that follow.
        strength: of the trigger.
        pattern: (3, h, w) uint8.

    Returns:
        (N, 3, H, W) uint8, new.

    Raises:
        ShapeError: the images have another shape or dtype.
        ConfigError: as `global_change`.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ShapeError(f"images must be (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
    kept, added = global_change(kind, strength, pattern, images.shape[2], images.shape[3])
    changed = images.float() * kept + added.float().to(images.device)
    return changed.round().clamp(0, 255).to(torch.uint8)


def _ctrl(magnitude: float, height: int, width: int) -> Tensor:
    """The same waves in every whole block; what is left at the right and bottom stays as it is."""
    rows, columns = height // CTRL_BLOCK, width // CTRL_BLOCK
    if not rows or not columns:
        raise ConfigError(
            f"images of {width}×{height} pixels: CTRL needs at least {CTRL_BLOCK} on each side; give larger images"
        )
    block = torch.zeros(CTRL_BLOCK, CTRL_BLOCK, dtype=torch.float64)
    for row, column in CTRL_COEFFICIENTS:
        block[row, column] = magnitude
    chroma = inverse_block_dct(block.expand(rows, columns, CTRL_BLOCK, CTRL_BLOCK))
    added = torch.zeros(3, height, width, dtype=torch.float64)
    tiled = torch.stack((torch.zeros_like(chroma), chroma, chroma))
    added[:, : rows * CTRL_BLOCK, : columns * CTRL_BLOCK] = to_rgb(tiled)
    return added
