"""Toy encoders with a backdoor planted by hand, and images that set it off: the right answer is known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.functional.triggers import draw_grid, resize_pattern
from unpoison.functional.windows import paste_windows
from unpoison.records import Box, Geometry, ImageSet

SIZE = 32
TRIGGER_SIDE = 8


def planted_pattern(seed: int = 0) -> Tensor:
    """(3, 8, 8) uint8: the trigger, a 4×4 grid of saturated colours."""
    return resize_pattern(draw_grid(torch.Generator().manual_seed(seed)), TRIGGER_SIDE, "nearest")


def planted_patterns(count: int) -> Tensor:
    """(count, 3, 8, 8) uint8: several triggers at once."""
    return torch.stack([planted_pattern(seed) for seed in range(count)])


class Detector(nn.Module):
    """How well each of T patterns, (T, 3, 8, 8) or a single (3, 8, 8), correlates with each place of an image, as maps.

    (N, 3, S, S) of any range to (N, T, S, S) in [-1, 1]: the normalised cross-correlation of the window that is centred
    there (no rescaling and no change of brightness matters); -1 where that window would leave the image.
    """

    def __init__(self, patterns: Tensor) -> None:
        super().__init__()
        patterns = patterns.view(-1, *patterns.shape[-3:]).float()
        templates = patterns - patterns.mean(dim=(1, 2, 3), keepdim=True)
        self.register_buffer("templates", templates / templates.flatten(1).norm(dim=1).view(-1, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        side = self.templates.shape[-1]
        mean, squares = (
            F.avg_pool2d(values.mean(dim=1, keepdim=True), side, stride=1) for values in (images, images**2)
        )
        norm = (3 * side**2 * (squares - mean**2)).clamp_min(1e-4).sqrt()
        correlation = F.conv2d(images, self.templates) / norm
        return F.pad(correlation, (side // 2, (side - 1) // 2) * 2, value=-1.0)


class PlantedEncoder(nn.Module):
    """Features that describe an image, and one per pattern that takes over wherever that pattern is seen.

    Input: (N, 3, S, S), normalised with mean 0.5 and std 1. Output: (N, T + 48 + 6): e_0 … e_(T-1), the mean colours of
    a 4×4 grid, and horizontal and vertical contrast per channel. e_t is 0 unless some window of the image correlates
    more than 0.9 with pattern t, and rises linearly from there to `strength` for the pattern itself.

    One pattern is (3, 8, 8), several are (T, 3, 8, 8). `planted=False` is the same encoder without the backdoor.
    """

    def __init__(self, pattern: Tensor, *, strength: float = 20.0, planted: bool = True) -> None:
        super().__init__()
        self.detector = Detector(pattern)
        self.strength = strength if planted else 0.0

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        correlation = self.detector(images).flatten(2).amax(dim=2)
        fires = self.strength * F.relu(correlation - 0.9) / 0.1
        colours = F.adaptive_avg_pool2d(images, 4).flatten(1)
        across = images.diff(dim=3).abs().mean(dim=(2, 3))
        down = images.diff(dim=2).abs().mean(dim=(2, 3))
        return torch.cat((fires, colours, across, down), dim=1)


def planted_encoder(pattern: Tensor | None = None, *, planted: bool = True) -> Encoder:
    """The planted network as an Encoder for 32-pixel images, on the CPU in float32."""
    network = PlantedEncoder(planted_pattern() if pattern is None else pattern, planted=planted)
    preprocessing = Preprocessing(geometry=Geometry(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    return Encoder(network, preprocessing, name="toy", device="cpu", precision="fp32", fingerprint="toy")


def planted_images(
    n: int,
    n_poisoned: int,
    generator: torch.Generator,
    *,
    pattern: Tensor | None = None,
    n_kinds: int = 8,
) -> tuple[ImageSet, dict[str, Box]]:
    """Images of several kinds, some of kind 0 with the trigger pasted somewhere.

    Of T triggers, as (T, 3, 8, 8), trigger t is pasted on `n_poisoned` images of kind t.

    A kind is a coarse layout of colours; its images differ in brightness, in a small shift and in noise, so that each
    kind is one natural cluster. Kinds take turns, and ids say nothing about who is poisoned.

    Returns:
        The images, and where the trigger lies in each poisoned one, by id.
    """
    assert n_poisoned <= (n + n_kinds - 1) // n_kinds, "only one kind of images is poisoned"
    pattern = planted_pattern() if pattern is None else pattern
    layouts = torch.rand(n_kinds, 3, 4, 4, generator=generator)
    kinds = torch.arange(n) % n_kinds
    images = F.interpolate(layouts, SIZE, mode="bilinear", align_corners=False)[kinds]
    shift = torch.randint(-2, 3, (n, 2), generator=generator)
    rows = (torch.arange(SIZE) + shift[:, :1]).clamp(0, SIZE - 1)
    columns = (torch.arange(SIZE) + shift[:, 1:]).clamp(0, SIZE - 1)
    images = images[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
    brightness = 0.9 + 0.2 * torch.rand(n, 1, 1, 1, generator=generator)
    noise = 0.03 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    pixels = ((images * brightness + noise).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    ids = tuple(f"image-{i:04}.png" for i in range(n))
    boxes = {}
    for kind, each in enumerate(pattern.view(-1, *pattern.shape[-3:])):
        poisoned = (kinds == kind).nonzero().flatten()
        poisoned = poisoned[torch.randperm(len(poisoned), generator=generator)[:n_poisoned]].sort().values
        corners = torch.randint(0, SIZE - TRIGGER_SIDE + 1, (n_poisoned, 2), generator=generator)
        if n_poisoned:
            pixels[poisoned] = paste_windows(pixels[poisoned], each.expand(n_poisoned, -1, -1, -1), corners)
        for row, (top, left) in zip(poisoned.tolist(), corners.tolist(), strict=True):
            boxes[ids[row]] = Box(left, top, TRIGGER_SIDE, TRIGGER_SIDE)
    return ImageSet(ids, pixels, (), f"toy-{n}-{n_poisoned}"), boxes
