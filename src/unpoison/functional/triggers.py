"""Patch triggers: draw one, bring it to its paste size, say where it may lie, stamp it on images.

The triggers of Saha et al. (HTBA, AAAI 2020; SSL-Backdoor, CVPR 2022) are 4×4 grids of saturated colours, enlarged
smoothly to 80 pixels. Here the same family is drawn from a seed, so that no test depends on ten published files.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.errors import ConfigError, ShapeError

__all__ = ["GRID", "RESAMPLES", "draw_grid", "grid_trigger", "placement_range", "resize_pattern", "stamp"]

GRID = 4
"""Cells on each side of a drawn trigger."""

RESAMPLES = ("nearest", "bilinear", "bicubic")
"""How a pattern changes size: saturated cells with hard edges, soft ones, or soft ones with overshoot."""

_PATTERN_SIDE = 80  # pixels; the side of the published trigger files
_FEWEST_COLOURS = 5
_MOST_CELLS_OF_ONE_COLOUR = 6


def draw_grid(generator: torch.Generator) -> Tensor:
    """A random grid of the eight saturated colours, as varied as the published triggers.

    Grids with fewer than 5 distinct colours, or with one colour in more than 6 of the 16 cells, are drawn again.

    Args:
        generator: on the CPU; the only source of randomness.

    Returns:
        (3, 4, 4) uint8, RGB, every value 0 or 255.

    >>> draw_grid(torch.Generator().manual_seed(0)).unique().tolist()
    [0, 255]
    """
    weights = torch.tensor([4, 2, 1]).view(3, 1, 1)  # one number per colour: its three bits
    while True:
        bits = torch.randint(2, (3, GRID, GRID), generator=generator)
        cells = torch.bincount((bits * weights).sum(0).flatten(), minlength=8)
        if (cells > 0).sum() >= _FEWEST_COLOURS and cells.max() <= _MOST_CELLS_OF_ONE_COLOUR:
            return (bits * 255).to(torch.uint8)


def grid_trigger(
    generator: torch.Generator, *, side: int = _PATTERN_SIDE, resample: str = "bicubic"
) -> Tensor:
    """A random trigger at one size; with the defaults, what the published 80-pixel files look like.

    Args:
        generator: on the CPU; the only source of randomness.
        side: of the square pattern, pixels, at least 1.
        resample: `nearest` gives cells with hard edges, `bicubic` the published look, `bilinear` lies between.

    Returns:
        (3, side, side) uint8, RGB.

    Raises:
        ConfigError: `side` or `resample` is out of range.

    Source:
        HTBA triggers (Saha et al., AAAI 2020): cubic convolution with a = -1/2 and replicated edges, then clipped.

    >>> tuple(grid_trigger(torch.Generator().manual_seed(7)).shape)
    (3, 80, 80)
    """
    return resize_pattern(draw_grid(generator), side, resample)


def resize_pattern(pattern: Tensor, side: int, resample: str = "nearest") -> Tensor:
    """Bring a pattern to `side` pixels of width; the height keeps the aspect ratio.

    Smooth shrinking averages over the pixels it drops (as image libraries do); growing interpolates between pixel
    centres with replicated edges; cubic overshoot is clipped.

    Args:
        pattern: (3, h, w) uint8, RGB.
        side: new width, pixels, at least 1.
        resample: `nearest`, `bilinear` or `bicubic` (a = -1/2).

    Returns:
        (3, round(side · h / w), side) uint8, at least one pixel high; never the argument itself.

    Raises:
        ShapeError: `pattern` is not (3, h, w) uint8.
        ConfigError: `side` is below 1, or `resample` is none of the three.

    >>> resize_pattern(torch.arange(4, dtype=torch.uint8).view(1, 2, 2).expand(3, 2, 2), 4)[0].tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    """
    _check_pattern(pattern)
    if resample not in RESAMPLES:
        raise ConfigError(f"resample {resample!r}: expected one of {', '.join(RESAMPLES)}")
    if side < 1:
        raise ConfigError(f"trigger side {side}: expected at least 1 pixel")
    height, width = pattern.shape[1:]
    rows = _resample_matrix(height, max(1, round(side * height / width)), resample)
    columns = _resample_matrix(width, side, resample)
    values = rows @ pattern.cpu().double() @ columns.T
    return values.round().clamp(0, 255).to(torch.uint8).to(pattern.device)


def placement_range(length: int, side: int, margin: float) -> tuple[int, int]:
    """First and last admissible top-left coordinate of a trigger along one axis of an image.

    The whole trigger keeps `margin` of the image free on either side: [⌊margin · L⌋, ⌊(1 - margin) · L - t⌋]. Where
    that holds no position, the corner is pinned to the margin, or as near to it as the trigger fits.

    Args:
        length: width or height of the image, pixels.
        side: width or height of the trigger, pixels, 1..length.
        margin: fraction of the image left free on each side, [0, 0.5).

    Returns:
        (low, high), both inclusive, low <= high <= length - side.

    Raises:
        ConfigError: the trigger does not fit in the image.

    Source:
        SSL-Backdoor (Saha et al., CVPR 2022): margin 0.25 in training images, 0.10 in test images.

    >>> placement_range(224, 50, 0.25), placement_range(224, 50, 0.10), placement_range(90, 50, 0.25)
    ((56, 118), (22, 151), (22, 22))
    """
    if not 1 <= side <= length:
        raise ConfigError(
            f"a {side}-pixel trigger does not fit in {length} image pixels; give a smaller --size"
        )
    # The epsilon undoes the rounding of products such as 0.9 · 70, which must count as 63.
    low = math.floor(margin * length + 1e-9)
    high = math.floor((1 - margin) * length - side + 1e-9)
    if high < low:
        low = high = min(low, length - side)
    return low, high


def stamp(images: Tensor, pattern: Tensor, top: Tensor | int, left: Tensor | int) -> Tensor:
    """Paste one opaque pattern on every image, each at its own place.

    Args:
        images: (N, 3, H, W), any dtype.
        pattern: (3, h, w), same dtype and device as `images`.
        top: (N,) integer rows of the pattern's upper edge, or one for all.
        left: (N,) integer columns of the pattern's left edge, or one for all.

    Returns:
        (N, 3, H, W) new images; memory format and dtype as given.

    Raises:
        ShapeError: shapes or dtypes do not fit together, or a pattern would leave its image.

    >>> images, pattern = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((3, 1, 2), 9, dtype=torch.uint8)
    >>> stamp(images, pattern, torch.tensor([0, 3]), 2)[:, 0, :, 3].tolist()
    [[9, 0, 0, 0], [0, 0, 0, 9]]
    """
    if images.ndim != 4 or pattern.ndim != 3 or images.shape[1] != pattern.shape[0]:
        raise ShapeError(
            f"stamp needs images (N, C, H, W) and a pattern (C, h, w), got "
            f"{tuple(images.shape)} and {tuple(pattern.shape)}"
        )
    if images.dtype != pattern.dtype:
        raise ShapeError(f"images are {images.dtype} and the pattern is {pattern.dtype}; convert one of them")
    count, channels, height, width = images.shape
    tall, wide = pattern.shape[1:]
    y, x = _one_per_image(top, count, images.device), _one_per_image(left, count, images.device)
    if bool(((y < 0) | (y + tall > height) | (x < 0) | (x + wide > width)).any()):
        raise ShapeError(f"a {wide}×{tall} pattern would leave its {width}×{height} image")
    which = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    rows = (y.view(-1, 1) + torch.arange(tall, device=images.device)).view(count, 1, tall, 1)
    columns = (x.view(-1, 1) + torch.arange(wide, device=images.device)).view(count, 1, 1, wide)
    stamped = images.clone()
    stamped[which, channel, rows, columns] = pattern
    return stamped


def _check_pattern(pattern: Tensor) -> None:
    if pattern.ndim != 3 or pattern.shape[0] != 3 or pattern.dtype != torch.uint8 or 0 in pattern.shape:
        raise ShapeError(
            f"a trigger pattern must be (3, h, w) uint8, got {tuple(pattern.shape)} {pattern.dtype}"
        )


def _one_per_image(value: Tensor | int, count: int, device: torch.device) -> Tensor:
    positions = torch.as_tensor(value, device=device)
    if positions.is_floating_point() or positions.shape not in ((), (count,)):
        raise ShapeError(
            f"positions must be ({count},) integers or one integer, got {tuple(positions.shape)} {positions.dtype}"
        )
    return positions.long().expand(count)


def _resample_matrix(source: int, target: int, resample: str) -> Tensor:
    """(target, source) float64: each row holds the weights of the source pixels in one target pixel.

    Written out, rather than left to a library, because the published triggers need a = -1/2 with replicated edges
    (torch enlarges with a = -3/4), and because float64 products are the same on every machine.
    """
    if source == target:
        return torch.eye(source, dtype=torch.float64)
    scale = source / target
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale - 0.5
    if resample == "nearest":
        return F.one_hot((centres + 0.5).floor().long().clamp(0, source - 1), source).double()
    stretch = max(scale, 1.0)  # a shrinking kernel spans all pixels that it drops
    reach = math.ceil(2 * stretch)
    taps = centres.floor().long().view(-1, 1) + torch.arange(-reach, reach + 2)
    weights = _KERNELS[resample]((centres.view(-1, 1) - taps).abs() / stretch)
    weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(target, source, dtype=torch.float64)
    return matrix.scatter_add_(1, taps.clamp(0, source - 1), weights)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Cubic convolution with a = -1/2."""
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


_KERNELS = {"bilinear": _triangle, "bicubic": _cubic}
