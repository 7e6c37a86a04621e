"""Do two patches show the same thing?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.errors import ShapeError
from unpoison.functional.windows import crop_windows

__all__ = [
    "clearest_match",
    "duplicate_images",
    "patch_similarity",
    "surroundings_similarity",
    "without_copies",
]

_FLAT = 4 / 255
"""Standard deviation, of values in [0, 1], below which a patch has no pattern to compare."""

_SAME_GREY = 16.5 / 255  # 16 grey levels, with room for rounding
_AGREEING = 0.4
_COMPARED_SIDE = 12
"""Side at which larger patches are compared, pixels."""

_OUTSIDE = -1000.0
"""Stands for what lies outside a picture; a mean over any of it is negative."""

_PAIRS = 8192
"""Pairs whose pixels are compared at once; bounds the memory."""


def patch_similarity(
    patches: Tensor, *, reach: float = 1 / 3, least: float = 0.0, agreeing: float = _AGREEING
) -> Tensor:
    """Largest normalised cross-correlation of every pair over the relative shifts at which their pixels agree.

    Correlation alone takes any dark-over-bright edge for any other: on clean CIFAR-10 it found groups of more than a
    hundred "equal" windows. A pasted pattern brings its very pixels along, so a shift only counts when at least 40 %
    (`agreeing`) of the shared pixels differ by no more than 16 grey levels in every channel.

    Args:
        patches: (n, 3, w, w) uint8; those above 16 px are compared at 12 px.
        reach: shifts up to this share of the side, in every direction.
        least: similarities below it are 0, because nobody asks; the higher, the faster.
        agreeing: share of the shared pixels that must agree, [0, 1].

    Returns:
        (n, n) float32 in [0, 1], symmetric, 1 on the diagonal; 0 where the shared part of either patch is flat.

    Raises:
        ShapeError: the patches are not (n, 3, w, w).

    >>> a = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    >>> moved = a.roll(2, dims=3)
    >>> float(patch_similarity(torch.cat((a, moved)))[0, 1]) > 0.99
    True
    """
    if patches.ndim != 4 or patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
        raise ShapeError(f"patches must be (n, 3, w, w), got {tuple(patches.shape)}")
    values = patches.float() / 255
    if values.shape[-1] > 16:
        values = F.interpolate(values, size=(_COMPARED_SIDE, _COMPARED_SIDE), mode="area")
    side = values.shape[-1]
    most = max(1, int(side * reach))
    shifts = range(-most, most + 1)
    best = torch.zeros(len(patches), len(patches))
    for down in shifts:
        for right in shifts:
            if (down, right) < (
                0,
                0,
            ):  # the opposite shift compares the same pixels, with the pair turned round
                continue
            here = _window(values, side, down, right)
            there = _window(values, side, -down, -right)
            correlation = _standard(here) @ _standard(there).T
            # Counting agreeing pixels is what costs: only for pairs that they could lift.
            first, second = ((correlation > best) & (correlation >= least)).nonzero(as_tuple=True)
            for pair in torch.split(torch.arange(len(first)), _PAIRS):
                one, other = first[pair], second[pair]
                agrees = _agreement(here[one], there[other]) >= agreeing
                best[one[agrees], other[agrees]] = correlation[one[agrees], other[agrees]]
    return torch.maximum(best, best.T).fill_diagonal_(1)


def _agreement(one: Tensor, other: Tensor) -> Tensor:
    """Share of the pixels that differ by no more than 16 grey levels in every channel, (n,)."""
    return ((one - other).abs() <= _SAME_GREY).all(dim=1).float().mean(dim=(1, 2))


def duplicate_images(images: Tensor, *, threshold: float = 0.95) -> Tensor:
    """Which images are the same picture, so that copies do not count as independent sources.

    Args:
        images: (n, 3, S, S) uint8.
        threshold: correlation of the pictures at 16×16 pixels from which they count as copies; above it even
            when a trigger lies at different places.

    Returns:
        (n, n) bool.
    """
    small = F.interpolate(images.float() / 255, size=(16, 16), mode="area")
    flat = _standard(small)
    return flat @ flat.T >= threshold


def without_copies(members: Iterable[int], copies: Tensor) -> list[int]:
    """Of pictures that are copies of each other, as `duplicate_images` says, (n, n) bool, the first member."""
    distinct: list[int] = []
    for member in members:
        if not any(copies[member, other] for other in distinct):
            distinct.append(member)
    return distinct


def surroundings_similarity(images: Tensor, corners: Tensor, side: int, centre: int) -> Tensor:
    """How alike the pictures are around windows that show the same: high where it is one picture, cropped twice.

    A pattern that is pasted on a picture has that picture around it; of overlapping crops, frames of a film or product
    shots the surroundings agree, too. Windows are laid on the one in the centre as their own pixels agree best, by up
    to a third of the side; compared is what lies up to half of a side around them.

    Args:
        images: (n, 3, S, S) uint8.
        corners: (n, 2) int64, top and left of a window in each.
        side: of the windows, pixels.
        centre: number of the image that the others are compared with.

    Returns:
        (n,) float32 in [-1, 1], the correlation; 0 where too little is around a window, or that is flat.
    """
    margin = max(2, side // 2)
    padded = F.pad(images.float() / 255, [margin] * 4, value=_OUTSIDE)
    wide = crop_windows(padded, corners, side + 2 * margin)
    if side > 16:
        margin = _COMPARED_SIDE // 2
        side = _COMPARED_SIDE
        wide = F.interpolate(wide, size=(side + 2 * margin,) * 2, mode="area")
    inner = slice(margin, margin + side)
    windows = wide[:, :, inner, inner]
    # The rest is known to lie in the picture, and not under the window.
    known = (wide >= 0).all(dim=1)
    known[:, inner, inner] = False
    most = max(1, side // 3)
    best = torch.full((len(images),), -1.0)
    around = torch.zeros(len(images))
    for down in range(-most, most + 1):
        for right in range(-most, most + 1):
            here = _standard(_window(windows[centre][None], side, down, right))
            there = _standard(_window(windows, side, -down, -right))
            correlation = (there @ here.T).squeeze(1)
            better = correlation > best
            best = torch.where(better, correlation, best)
            whole = side + 2 * margin
            one = _window(wide[centre][None], whole, down, right)
            other = _window(wide[better], whole, -down, -right)
            both = _window(known[centre][None, None], whole, down, right) & _window(
                known[better][:, None], whole, -down, -right
            )
            around[better] = _masked_correlation(one, other, both, side**2 // 2)
    return around


def clearest_match(pixels: Tensor, patterns: Tensor) -> Tensor:
    """How clearly images show a pattern: largest normalised cross-correlation over places and over its windows.

    Args:
        pixels: (n, 3, S, S) uint8.
        patterns: (m, 3, w, w) uint8, m of at least 1: windows of one pattern, w at most S. From 24 pixels on they are
            made smaller by a whole factor, and so are the images, which then cost no more than small ones.

    Returns:
        (n,) float32 in [-1, 1]; flat places count as 0.
    """
    factor = max(1, patterns.shape[-1] // _COMPARED_SIDE)
    scaled, known = (F.avg_pool2d(x.float() / 255, factor) for x in (pixels, patterns))
    known = known - known.mean(dim=(1, 2, 3), keepdim=True)
    known = known / known.flatten(1).norm(dim=1).clamp_min(1e-6)[:, None, None, None]
    side, count = known.shape[-1], known[0].numel()
    products = F.conv2d(scaled, known)
    box = torch.ones(1, 3, side, side)
    sums, squares = F.conv2d(scaled, box), F.conv2d(scaled.square(), box)
    spread = (squares - sums.square() / count).clamp_min(0).sqrt()
    least = _FLAT * math.sqrt(count)
    correlation = torch.where(spread > least, products / spread.clamp_min(least), torch.zeros(()))
    return correlation.amax(dim=(1, 2, 3)).clamp(-1, 1)


def _masked_correlation(one: Tensor, other: Tensor, both: Tensor, least: int) -> Tensor:
    """(n,) correlation of (1, 3, h, w) with (n, 3, h, w) where (n, 1, h, w) says; 0 where that is little, or flat."""
    weight = both.expand_as(other).float()
    count = weight.sum(dim=(1, 2, 3)).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        mean = (values * weight).sum(dim=(1, 2, 3)) / count
        return (values - mean[:, None, None, None]) * weight

    first, second = centred(one.expand_as(other)), centred(other)
    spreads = [(values.square().sum(dim=(1, 2, 3)) / count).sqrt() for values in (first, second)]
    enough = (both.sum(dim=(1, 2, 3)) >= least) & (torch.minimum(*spreads) >= _FLAT)
    product = (first * second).sum(dim=(1, 2, 3)) / count
    return torch.where(enough, product / (spreads[0] * spreads[1]).clamp(min=1e-9), torch.zeros_like(product))


def _window(values: Tensor, side: int, down: int, right: int) -> Tensor:
    """The part of each patch that lies under another patch moved by (down, right)."""
    top, left = max(down, 0), max(right, 0)
    return values[:, :, top : side + min(down, 0), left : side + min(right, 0)]


def _standard(values: Tensor) -> Tensor:
    """Rows of zero mean and unit length; flat ones become zero.

    The mean is that of the whole patch, not of each channel: a trigger's colours are part of its pattern.
    """
    flat = values.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    pattern = values.std(dim=(2, 3)).amax(dim=1, keepdim=True) >= _FLAT
    return torch.where(pattern, F.normalize(centred, dim=1), torch.zeros_like(centred))
