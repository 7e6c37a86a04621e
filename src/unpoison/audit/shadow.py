"""Images for an audit when there are none: overlapping discs, which have the statistics of natural pictures.

Discs that hide one another, small ones many and large ones few ("dead leaves", Lee, Mumford and Huang, IJCV 2001),
share edges, occlusion and the spectrum of photographs, and show no object. An encoder tells them apart, which is all
that DECREE asks of its images. They are always the same for one size and number, so that audits compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unpoison.errors import ConfigError
from unpoison.records import ImageSet
from unpoison.runtime import stage_generator

__all__ = ["GENERATED", "generated_images"]

GENERATED = "generated images"
"""What a verdict calls this set."""

_LEAVES = 80  # discs per image
_RADII = (1 / 32, 1 / 2)  # shares of the side; their density falls with the third power of the radius
_CHUNK = 64  # images drawn at once, which bounds memory


def generated_images(count: int, size: int) -> ImageSet:
    """The built-in set of one size.

    Args:
        count: images, at least 1.
        size: side in pixels, at least 8.

    Raises:
        ConfigError: a number is too small.
    """
    if count < 1 or size < 8:
        raise ConfigError(f"{count} generated images of {size} pixels: expected at least 1 image of 8 pixels")
    generator = stage_generator(0, f"audit/generated images/{size}")
    parts = [_dead_leaves(min(_CHUNK, count - start), size, generator) for start in range(0, count, _CHUNK)]
    pixels = torch.cat(parts).contiguous(memory_format=torch.channels_last)
    ids = tuple(f"generated-{number:05d}" for number in range(count))
    return ImageSet(ids, pixels)


def _dead_leaves(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) uint8."""
    grid = (torch.arange(size) + 0.5) / size
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(count, 3, size, size).clone()
    smallest, largest = _RADII
    for _ in range(_LEAVES):
        uniform = torch.rand(count, 1, 1, generator=generator)
        radius = (smallest**-2 + uniform * (largest**-2 - smallest**-2)) ** -0.5
        centre = torch.rand(count, 2, 1, 1, generator=generator) * 1.2 - 0.1  # some leave the image
        colour = torch.rand(count, 3, 1, 1, generator=generator)
        shade = 0.4 * (torch.rand(count, 2, 1, 1, generator=generator) - 0.5)
        across, down = grid.view(1, 1, size) - centre[:, 0], grid.view(1, size, 1) - centre[:, 1]
        inside = across**2 + down**2 <= radius**2
        # Each disc brightens to one side, as round things do in light from there.
        light = (shade[:, 0] * across + shade[:, 1] * down) / radius
        images = torch.where(inside[:, None], (colour + light[:, None]).clamp(0, 1), images)
    return (images * 255).round().to(torch.uint8)
