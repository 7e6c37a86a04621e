"""Square windows: hide them, find the hottest, cut them out and paste them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.errors import ShapeError

__all__ = [
    "attention_map",
    "block_masks",
    "crop_windows",
    "grid_masks",
    "hide",
    "hottest_windows",
    "paste_windows",
    "pixel_masks",
    "random_masks",
]


def _check_window(size: int, side: int) -> None:
    if not 1 <= side <= size:
        raise ShapeError(f"a {side}-pixel window does not fit images of {size} pixels")


def grid_masks(size: int, side: int, stride: int) -> Tensor:
    """Masks on a regular grid that overhangs the image on all sides.

    With `stride` ≤ side − t + 1 every t×t square, wherever it lies, is hidden entirely by some mask. Windows that
    stay inside would hide border pixels by fewer masks than others, and dividing by so uneven a coverage moves the
    peak of the attention away from the trigger; the parts that overhang are simply cut off.

    Args:
        size: S, side of the images in pixels.
        side: w, side of the hidden window, 1..S.
        stride: step between windows, at least 1.

    Returns:
        (M, S, S) bool, True = hidden; row-major order of the windows.

    Raises:
        ShapeError: the window does not fit, or the stride is below 1.
    """
    _check_window(size, side)
    if stride < 1:
        raise ShapeError(f"stride={stride}: expected at least 1 pixel")
    starts = torch.arange(stride - side if stride < side else 0, size, stride)
    axis = torch.arange(size)
    hidden = (axis >= starts[:, None]) & (axis < starts[:, None] + side)  # (P, S): one axis of each window
    return (hidden[:, None, :, None] & hidden[None, :, None, :]).reshape(-1, size, size)


def random_masks(size: int, side: int, count: int, *, generator: torch.Generator) -> Tensor:
    """PoisonCAM's masks: corners uniform over the whole image, windows wrap around its border.

    Wrapping hides every pixel with the same probability w²/S²; windows that stay inside would favour the centre.

    Returns:
        (count, S, S) bool, True = hidden.
    """
    _check_window(size, side)
    corners = torch.randint(0, size, (count, 2), generator=generator)
    distance = (torch.arange(size) - corners[:, :, None]) % size  # (count, 2, S)
    hidden = distance < side
    return hidden[:, 0, :, None] & hidden[:, 1, None, :]


def block_masks(size: int, side: int, count: int, *, generator: torch.Generator) -> Tensor:
    """Windows placed as by `random_masks`, of which every other block is hidden, as on a chessboard.

    Blocks have a side of w/4, at least one pixel; the last of a row or column is cut off where w is no multiple. The
    corner block is hidden, so half of the window is, rounded in its favour. The same generator state gives the same
    windows as `random_masks`.

    Returns:
        (count, S, S) bool, True = hidden.

    Source:
        PoisonCAM, section VI-D, mask strategy "0-1 interval"; the side of its blocks is not stated.
    """
    _check_window(size, side)
    corners = torch.randint(0, size, (count, 2), generator=generator)
    block = torch.arange(side) // max(1, side // 4)
    pattern = (block[:, None] + block) % 2 == 0
    return _place_cyclic(pattern.expand(count, -1, -1), corners, size)


def pixel_masks(size: int, side: int, count: int, *, generator: torch.Generator) -> Tensor:
    """Windows placed as by `random_masks`, of which a random half of the pixels is hidden.

    Each mask draws its own pixels, ⌈w²/2⌉ of them. The same generator state gives the same windows as `random_masks`.

    Returns:
        (count, S, S) bool, True = hidden.

    Source:
        PoisonCAM, section VI-D, mask strategy "random"; its share of hidden pixels is not stated.
    """
    _check_window(size, side)
    corners = torch.randint(0, size, (count, 2), generator=generator)
    rank = torch.rand(count, side * side, generator=generator).argsort(dim=1).argsort(dim=1)
    pattern = (rank < (side * side + 1) // 2).view(count, side, side)
    return _place_cyclic(pattern, corners, size)


def _place_cyclic(patterns: Tensor, corners: Tensor, size: int) -> Tensor:
    """(n, w, w) bool patterns at (n, 2) corners of images of `size` pixels, wrapped around the border."""
    side = patterns.shape[-1]
    offset = (torch.arange(size) - corners[:, :, None]) % size  # (n, 2, S)
    inside = offset < side
    rows, columns = offset.clamp_max(side - 1).unbind(dim=1)
    index = torch.arange(len(patterns))[:, None, None]
    placed = patterns[index, rows[:, :, None], columns[:, None, :]]
    return placed & inside[:, 0, :, None] & inside[:, 1, None, :]


def hide(images: Tensor, masks: Tensor, fill: Tensor) -> Tensor:
    """Every image under every mask.

    Args:
        images: (N, 3, S, S) uint8 or float.
        masks: (M, S, S) bool, True = hidden.
        fill: (3,) colour of the hidden pixels, or (N, 3, S, S) replacement pictures; the images' dtype and range.

    Returns:
        (N·M, 3, S, S), all masks of the first image first; channels-last.
    """
    n, size = len(images), images.shape[-1]
    # As rows of values in the order of the result: three innermost values at a time would take twice as long.
    plain = images.permute(0, 2, 3, 1).reshape(n, 1, -1)
    replacement = fill.repeat(size**2) if fill.ndim == 1 else fill.permute(0, 2, 3, 1).reshape(n, 1, -1)
    hidden = torch.where(masks.flatten(1).repeat_interleave(3, dim=1), replacement, plain)
    return hidden.view(-1, size, size, 3).permute(0, 3, 1, 2)


def attention_map(scores: Tensor, masks: Tensor, *, by_coverage: bool = True) -> Tensor:
    """How suspicious each pixel is: the mean score of the masks that hid it.

    Args:
        scores: (N, M) float, ≥ 0.
        masks: (M, S, S) bool.
        by_coverage: divide by the number of masks over each pixel; PoisonCAM's equation 3 is the plain sum.

    Returns:
        (N, S, S) float32; 0 where no mask hid the pixel.
    """
    flat = masks.flatten(1).float()
    total = scores.float() @ flat
    if by_coverage:
        total = total / flat.sum(dim=0).clamp_min(1)
    return total.view(len(scores), *masks.shape[1:])


def hottest_windows(heat: Tensor, side: int, count: int = 1) -> Tensor:
    """Corners of the square windows with the largest total heat.

    Attention maps are piecewise constant, so whole plateaus tie; of the tied windows the one nearest to their
    centre of gravity is taken. Each further window is the hottest of those that share less than half of their
    side, in one direction, with every earlier one.

    Args:
        heat: (N, H, W) float, any scale.
        side: window side in pixels, 1..min(H, W).
        count: windows per map; when no candidate is left the last one is repeated.

    Returns:
        (N, count, 2) int64, (top, left) in pixels, hottest first.

    Raises:
        ShapeError: `heat` is not 3-d, or the window does not fit in it.

    Source:
        PatchSearch (Tejankar et al., CVPR 2023) and PoisonCAM (Qian et al., 2023), extraction of trigger candidates.

    >>> hottest_windows(torch.eye(4)[None], side=2)[0]
    tensor([[1, 1]])
    """
    if heat.ndim != 3:
        raise ShapeError(f"heat must be (N, H, W), got {tuple(heat.shape)}")
    _check_window(min(heat.shape[1:]), side)
    sums = F.pad(heat.double(), (1, 0, 1, 0)).cumsum(1).cumsum(2)
    totals = sums[:, side:, side:] - sums[:, :-side, side:] - sums[:, side:, :-side] + sums[:, :-side, :-side]
    rows = torch.arange(totals.shape[1], device=heat.device).view(1, -1, 1)
    columns = torch.arange(totals.shape[2], device=heat.device).view(1, 1, -1)
    # Rounding of the running sums must not decide a tie.
    tolerance = 1e-9 * sums[:, -1, -1].abs().clamp_min(1e-12).view(-1, 1, 1)
    corners: list[Tensor] = []
    for _ in range(count):
        best = totals.amax(dim=(1, 2), keepdim=True)
        tied = (totals >= best - tolerance) & torch.isfinite(totals)
        n_tied = tied.sum(dim=(1, 2), keepdim=True).clamp_min(1)
        mean_row = (tied * rows).sum(dim=(1, 2), keepdim=True) / n_tied
        mean_column = (tied * columns).sum(dim=(1, 2), keepdim=True) / n_tied
        distance = (rows - mean_row) ** 2 + (columns - mean_column) ** 2
        flat = torch.where(tied, distance, torch.inf).flatten(1).argmin(dim=1)
        corner = torch.stack((flat // totals.shape[2], flat % totals.shape[2]), dim=1)
        if corners:
            exhausted = ~torch.isfinite(best.flatten())
            corner = torch.where(exhausted[:, None], corners[-1], corner)
        corners.append(corner)
        near = ((rows - corner[:, 0, None, None]).abs() <= side // 2) & (
            (columns - corner[:, 1, None, None]).abs() <= side // 2
        )
        totals = totals.masked_fill(near, -torch.inf)
    return torch.stack(corners, dim=1)


def _window_index(corners: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Row and column indices (N, side, 1) and (N, 1, side) of windows at (N, 2) corners."""
    offsets = torch.arange(side, device=corners.device)
    return (corners[:, 0, None] + offsets)[:, :, None], (corners[:, 1, None] + offsets)[:, None, :]


def crop_windows(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """The window at (top, left) of each image.

    Args:
        images: (N, 3, S, S).
        corners: (N, 2) int64, inside the image.
        side: in pixels.

    Returns:
        (N, 3, side, side), a copy.
    """
    rows, columns = _window_index(corners, side)
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return images[index, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def paste_windows(images: Tensor, patches: Tensor, corners: Tensor) -> Tensor:
    """Each patch on its image, opaque, at (top, left).

    Args:
        images: (N, 3, S, S); unchanged.
        patches: (N, 3, side, side), same dtype.
        corners: (N, 2) int64; the patch must lie inside the image.

    Returns:
        (N, 3, S, S), channels-last.
    """
    rows, columns = _window_index(corners, patches.shape[-1])
    index = torch.arange(len(images), device=images.device)[:, None, None]
    pasted = images.clone(memory_format=torch.channels_last)
    pasted[index, :, rows, columns] = patches.permute(0, 2, 3, 1)
    return pasted
