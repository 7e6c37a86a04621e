"""Pixel values to what networks take."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["standardise"]


def standardise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel.

    Args:
        images: (N, 3, S, S) uint8, or float in [0, 1]; unchanged.
        mean: (3,) float32 in [0, 1], on the images' device.
        std: (3,) float32, above 0.

    Returns:
        (N, 3, S, S) float32, channels-last.

    >>> white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    >>> standardise(white, torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.5])).mean(dim=(2, 3))
    tensor([[1., 1., 0.]])
    """
    n, channels, *sides = images.shape
    scale, shift = 1 / std, -mean / std
    # One colour spread over a row of values, so that processors work on whole rows and not on three values at a time.
    pixels = images.permute(0, 2, 3, 1).reshape(n, -1)
    repeats = pixels.shape[1] // channels
    if pixels.dtype == torch.uint8:
        pixels = pixels.float().div_(255)
    values = torch.addcmul(shift.repeat(repeats), pixels, scale.repeat(repeats))
    return values.view(n, *sides, channels).permute(0, 3, 1, 2)
