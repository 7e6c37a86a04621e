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


class Detector(nn.Module):
    """How well a pattern correlates with each place of an image, as a map.

    (N, 3, S, S) of any range to (N, 1, S, S) in [-1, 1]: the normalised cross-correlation of the window that is centred
    there (no rescaling and no change of brightness matters); -1 where that window would leave the image.
    """

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        template = pattern.float() - pattern.float().mean()
        self.register_buffer("template", (template / template.norm())[None])
        self.register_buffer("ones", torch.ones_like(template)[None])

    def forward(self, images: Tensor) -> Tensor:
        n = self.ones.numel()
        total, squares = F.conv2d(images, self.ones), F.conv2d(images**2, self.ones)
        norm = (squares - total**2 / n).clamp_min(1e-4).sqrt()
        side = self.ones.shape[-1]
        correlation = F.conv2d(images, self.template) / norm
        return F.pad(correlation, (side // 2, (side - 1) // 2) * 2, value=-1.0)


class PlantedEncoder(nn.Module):
    """Features that describe an image, and one, e_0, that takes over wherever the pattern is seen.

    Input: (N, 3, S, S), normalised with mean 0.5 and std 1. Output: (N, 1 + 48 + 6): e_0, the mean colours of a
    4×4 grid, and horizontal and vertical contrast per channel. e_0 is 0 unless some window of the image correlates more
    than 0.9 with the pattern, and rises linearly from there to `strength` for the pattern itself.

    `planted=False` is the same encoder without the backdoor.
    """

    def __init__(self, pattern: Tensor, *, strength: float = 20.0, planted: bool = True) -> None:
        super().__init__()
        self.detector = Detector(pattern)
        self.strength = strength if planted else 0.0

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        correlation = self.detector(images).flatten(1).amax(dim=1)
        fires = self.strength * F.relu(correlation - 0.9) / 0.1
        colours = F.adaptive_avg_pool2d(images, 4).flatten(1)
        across = images.diff(dim=3).abs().mean(dim=(2, 3))
        down = images.diff(dim=2).abs().mean(dim=(2, 3))
        return torch.cat((fires[:, None], colours, across, down), dim=1)


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

    A kind is a coarse layout of colours; its images differ in brightness, in a small shift and in noise, so that each
    kind is one natural cluster. Kinds take turns, and ids say nothing about who is poisoned.

    Returns:
        The images, and where the trigger lies in each poisoned one, by id.
    """
    assert n_poisoned <= (n + n_kinds - 1) // n_kinds, "only images of kind 0 are poisoned"
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

    poisoned = (kinds == 0).nonzero().flatten()
    poisoned = poisoned[torch.randperm(len(poisoned), generator=generator)[:n_poisoned]].sort().values
    corners = torch.randint(0, SIZE - TRIGGER_SIDE + 1, (n_poisoned, 2), generator=generator)
    if n_poisoned:
        patches = pattern.expand(n_poisoned, -1, -1, -1)
        pixels[poisoned] = paste_windows(pixels[poisoned], patches, corners)
    ids = tuple(f"image-{i:04}.png" for i in range(n))
    boxes = {
        ids[row]: Box(left, top, TRIGGER_SIDE, TRIGGER_SIDE)
        for row, (top, left) in zip(poisoned.tolist(), corners.tolist(), strict=True)
    }
    return ImageSet(ids, pixels, (), f"toy-{n}-{n_poisoned}"), boxes
