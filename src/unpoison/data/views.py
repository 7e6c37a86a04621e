"""Random views of a batch for self-supervised training, one set of parameters per image, all in tensor operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.errors import ConfigError

__all__ = ["ViewConfig", "crop_and_flip", "random_views", "recolour"]

_GREY = torch.tensor([0.299, 0.587, 0.114])
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How strongly a view differs from its image.

    Attributes:
        crop: smallest share of the area that a crop keeps, (0, 1].
        flip: mirror left and right with probability ½.
        jitter: strengths of brightness, contrast, saturation and hue, as in torchvision's ColorJitter.
        jitter_probability, grey_probability, blur_probability, solarise_probability: in [0, 1], decided per image.
    """

    crop: float = 0.3
    flip: bool = True
    jitter: tuple[float, float, float, float] = (0.2, 0.2, 0.2, 0.05)
    jitter_probability: float = 0.8
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    solarise_probability: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ConfigError(f"crop={self.crop}: expected a share of the area in (0, 1]")
        if any(s < 0 for s in self.jitter) or max(self.jitter[:3]) > 1 or self.jitter[3] > 0.5:
            raise ConfigError(
                f"jitter={self.jitter}: expected three strengths in [0, 1] and a hue in [0, 0.5]"
            )
        for name in ("jitter_probability", "grey_probability", "blur_probability", "solarise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a probability in [0, 1]")


def random_views(images: Tensor, config: ViewConfig, *, generator: torch.Generator) -> Tensor:
    """One random view of each image: crop and flip, colour jitter, greyscale, blur, solarisation, in this order.

    Brightness, contrast, saturation, hue and greyscale are one affine map of colours per image, so that the batch
    is read once; torchvision draws their order anew and clamps between them, which only differs where values
    leave [0, 1].

    Args:
        images: (N, 3, S, S) uint8, or float32 in [0, 1], on any device.
        config: strengths.
        generator: a CPU generator; the draws do not depend on the device.

    Returns:
        (N, 3, S, S) float32 in [0, 1], on the images' device.
    """
    return recolour(crop_and_flip(images, config, generator=generator), config, generator=generator)


def crop_and_flip(images: Tensor, config: ViewConfig, *, generator: torch.Generator) -> Tensor:
    """The first half of `random_views`: a random resized crop, mirrored half of the time.

    Args:
        images: (N, 3, S, S) uint8, or float32 in [0, 1], on any device; unchanged.
        config: strengths.
        generator: a CPU generator; the draws do not depend on the device.

    Returns:
        (N, 3, S, S) float32 in [0, 1], on the images' device; shares no memory with the images.
    """
    return _crop_and_flip(
        images.float().div_(255) if images.dtype == torch.uint8 else images, config, generator
    )


def recolour(views: Tensor, config: ViewConfig, *, generator: torch.Generator) -> Tensor:
    """The second half of `random_views`: colour jitter, greyscale, blur and solarisation.

    Args:
        views: (N, 3, S, S) float32 in [0, 1], on any device; unchanged.
        config: strengths.
        generator: a CPU generator; the draws do not depend on the device.

    Returns:
        (N, 3, S, S) float32 in [0, 1], on the views' device; the argument itself where nothing is to be done.
    """
    n = len(views)
    matrix, offset_of_mean = _colour_maps(n, config, generator)
    if matrix is not None and offset_of_mean is not None:
        mean_grey = (views.mean(dim=(2, 3)) @ _GREY.to(views.device))[:, None]
        shift = offset_of_mean.to(views.device) * mean_grey
        flat = torch.baddbmm(shift[:, :, None].expand(n, 3, 1), matrix.to(views.device), views.flatten(2))
        views = flat.view_as(views).clamp_(0, 1)
    if config.blur_probability > 0:
        views = _blur(views, config.blur_probability, generator)
    if config.solarise_probability > 0:
        chosen = torch.rand(n, generator=generator) < config.solarise_probability
        inverted = torch.where(
            views >= 128 / 255, 1 - views, views
        )  # the bright half, as torchvision's at 128
        views = torch.where(chosen.to(views.device)[:, None, None, None], inverted, views)
    return views


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def _crop_and_flip(images: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Random resized crop by one affine map per image, mirrored half of the time."""
    n = len(images)
    area = _uniform(n, config.crop, 1.0, generator)
    ratio = torch.exp(_uniform(n, math.log(3 / 4), math.log(4 / 3), generator))
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    x = _uniform(n, -1, 1, generator) * (1 - width)
    y = _uniform(n, -1, 1, generator) * (1 - height)
    mirrored = (torch.rand(n, generator=generator) < 0.5) & torch.tensor(config.flip)
    # Not by affine_grid, whose matrix product takes as long as the sampling: nothing is rotated.
    size = images.shape[-1]
    centres = ((2 * torch.arange(size) + 1) / size - 1).to(images.device)
    maps = torch.stack((x, torch.where(mirrored, -width, width), y, height))[..., None].to(images.device)
    grid = torch.empty(n, size, size, 2, device=images.device)
    grid[..., 0] = torch.addcmul(maps[0], maps[1], centres)[:, None]
    grid[..., 1] = torch.addcmul(maps[2], maps[3], centres)[:, :, None]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _colour_maps(
    n: int, config: ViewConfig, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    """Per image a 3×3 colour matrix, and how much of the picture's mean grey to add to each channel."""
    brightness, contrast, saturation, hue = config.jitter
    if max(config.jitter) * config.jitter_probability + config.grey_probability == 0:
        return None, None
    identity = torch.eye(3).expand(n, 3, 3)
    to_grey = _GREY.expand(3, 3)
    b, c, s = (
        _uniform(n, 1 - v, 1 + v, generator)[:, None, None] for v in (brightness, contrast, saturation)
    )
    angle = _uniform(n, -hue, hue, generator) * 2 * math.pi
    rotation = torch.zeros(n, 3, 3)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    turn = torch.linalg.inv(_TO_YIQ) @ rotation @ _TO_YIQ
    saturate = s * identity + (1 - s) * to_grey
    jittered = (torch.rand(n, generator=generator) < config.jitter_probability)[:, None, None]
    matrix = torch.where(jittered, b * c * (turn @ saturate), identity)
    # Contrast mixes with the mean grey of the brightened picture.
    offset = torch.where(jittered[:, :, 0], (b * (1 - c))[:, :, 0], torch.zeros(n, 1))
    grey = (torch.rand(n, generator=generator) < config.grey_probability)[:, None, None]
    matrix = torch.where(grey, to_grey @ matrix, matrix)
    return matrix, offset.expand(n, 3).contiguous()


def _blur(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur with sigma in [0.1, 2] at 224 px (scaled to the side), for a random part of the batch."""
    n, _, side, _ = images.shape
    chosen = (torch.rand(n, generator=generator) < probability).nonzero().flatten()
    sigma = _uniform(n, 0.1, 2.0, generator)[chosen] * side / 224
    if len(chosen) == 0:
        return images
    radius = max(1, round(0.05 * side))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None].clamp_min(1e-3)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(images.device).repeat_interleave(3, dim=0)
    planes = images[chosen.to(images.device)].reshape(1, 3 * len(chosen), side, side)
    planes = F.pad(planes, (radius,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=len(kernel))
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=len(kernel))
    blurred = images.clone()
    blurred[chosen.to(images.device)] = planes.reshape(len(chosen), 3, side, side)
    return blurred
