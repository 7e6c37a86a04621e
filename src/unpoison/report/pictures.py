"""Pictures for reports: small images made visible, windows outlined, attention as colour, sheets of trigger patches.

Everything is NumPy and Pillow on arrays that already lie in memory; no file is read and no library draws for us.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, features
from torch import Tensor

from unpoison.data.export import atomic_file
from unpoison.errors import ShapeError
from unpoison.records import BenignPattern, Box, TriggerFinding

__all__ = [
    "Picture",
    "as_pixels",
    "colour_map",
    "data_uri",
    "enlarge",
    "outline",
    "overlay",
    "trigger_sheet",
    "write_trigger_sheets",
]

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels to show, and how many times they were repeated to be seen."""

    pixels: Pixels
    scale: int = 1


_GAP = 4  # pixels between the patches of a sheet
_PAPER = 238  # their grey background


def as_pixels(image: Tensor) -> Pixels:
    """(3, H, W) uint8 to (H, W, 3) uint8.

    Raises:
        ShapeError: the tensor is something else.
    """
    if image.ndim != 3 or image.shape[0] != 3 or str(image.dtype) != "torch.uint8":
        raise ShapeError(f"a picture must be (3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def enlarge(pixels: Pixels, at_least: int) -> Picture:
    """Repeat every pixel until the longer side reaches `at_least`; larger pictures are left alone.

    >>> enlarge(np.zeros((32, 32, 3), np.uint8), 96).scale
    3
    """
    scale = max(1, math.ceil(at_least / max(pixels.shape[:2])))
    return Picture(pixels.repeat(scale, axis=0).repeat(scale, axis=1), scale)


def outline(picture: Picture, box: Box) -> Picture:
    """Draw a frame around a box: white within dark, so that it shows on any picture.

    Args:
        picture: left as it is.
        box: in pixels before enlarging.
    """
    image = Image.fromarray(picture.pixels)
    draw = ImageDraw.Draw(image)
    height, width = picture.pixels.shape[:2]
    scale = picture.scale
    left, top = box.x * scale, box.y * scale
    right, bottom = (box.x + box.w) * scale - 1, (box.y + box.h) * scale - 1
    for grow, colour in ((2, (20, 20, 30)), (1, (255, 255, 255)), (0, (20, 20, 30))):
        # A frame at the rim is drawn just inside it rather than cut off.
        x0, y0 = max(left - grow, 2 - grow), max(top - grow, 2 - grow)
        x1, y1 = min(right + grow, width - 3 + grow), min(bottom + grow, height - 3 + grow)
        if x1 > x0 and y1 > y0:
            draw.rectangle((x0, y0, x1, y1), outline=colour)
    return Picture(np.asarray(image), scale)


@cache
def colour_map() -> Pixels:
    """(256, 3) uint8 from dark blue over magenta and orange to pale yellow.

    Lightness rises evenly (a straight line in OKLab), so that the map also reads in grey and to colour-blind people.
    """
    steps = np.linspace(0, 1, 256)
    lightness = 0.18 + 0.78 * steps
    hue = np.radians(275 + 190 * steps)  # blue → magenta → orange → yellow
    chroma = 0.04 + 0.15 * np.sin(np.pi * steps) ** 0.8
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        (
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ),
        axis=1,
    ).clip(0, 1)
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (gamma * 255).round().astype(np.uint8)


def overlay(pixels: Pixels, attention: NDArray[np.float32], *, strength: float = 0.72) -> Pixels:
    """Colour a greyed picture by attention.

    Args:
        pixels: (H, W, 3) uint8; left as it is.
        attention: (H, W) float; values outside [0, 1], and NaN, are clipped.
        strength: share of colour over picture, [0, 1].

    Raises:
        ShapeError: the map has another size than the picture.
    """
    if attention.shape != pixels.shape[:2]:
        raise ShapeError(f"attention must be {pixels.shape[:2]} like its picture, got {attention.shape}")
    level = np.nan_to_num(attention, nan=0.0).clip(0, 1)
    colours = colour_map()[(level * 255).round().astype(np.intp)].astype(np.float32)
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    mixed: NDArray[np.float32] = strength * colours + (1 - strength) * grey[..., None]
    return mixed.round().clip(0, 255).astype(np.uint8)


def trigger_sheet(patches: Tensor, *, columns: int = 10, side: int = 96, most: int = 60) -> Picture:
    """Patches of one trigger beside each other, strongest first: what recurs meets the eye.

    Args:
        patches: (N, 3, w, w) uint8, N ≥ 1.
        columns: patches per row.
        side: each is enlarged to at least so many pixels.
        most: further patches are left out.

    Raises:
        ShapeError: there are no patches, or they have another shape.
    """
    if patches.ndim != 4 or len(patches) == 0:
        raise ShapeError(f"patches must be (N, 3, w, w) with N of at least 1, got {tuple(patches.shape)}")
    tiles = [enlarge(as_pixels(patch), side) for patch in patches[:most]]
    height, width = tiles[0].pixels.shape[:2]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    shape = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3)
    sheet = np.full(shape, _PAPER, np.uint8)
    for index, tile in enumerate(tiles):
        top = _GAP + (index // columns) * (height + _GAP)
        left = _GAP + (index % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = tile.pixels
    return Picture(sheet, tiles[0].scale)


def write_trigger_sheets(
    triggers: Sequence[TriggerFinding], folder: Path, benign: Sequence[BenignPattern] = ()
) -> tuple[str, ...]:
    """Write `triggers/trigger-1.png` and so on below a run folder, and `benign/pattern-1.png` for what is no attack.

    Returns:
        Their paths relative to the folder, in the order of the triggers and then of the benign patterns.
    """
    named = [(f"triggers/trigger-{n}.png", found.patches) for n, found in enumerate(triggers, start=1)]
    named += [(f"benign/pattern-{n}.png", found.patches) for n, found in enumerate(benign, start=1)]
    for name, patches in named:
        with atomic_file(folder / name) as file:
            Image.fromarray(trigger_sheet(patches).pixels).save(file, format="PNG")
    return tuple(name for name, _ in named)


def data_uri(pixels: Pixels, *, lossless: bool = True) -> str:
    """A picture as text that a page can hold: WebP, or PNG where Pillow lacks it."""
    buffer = io.BytesIO()
    kind = "webp" if features.check("webp") else "png"
    options = {"lossless": True, "method": 2} if lossless else {"quality": 75, "method": 2}
    Image.fromarray(pixels).save(buffer, format=kind, **(options if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
