"""A toy encoder that obeys a white square at one place, and images that it tells apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.records import Box, Geometry, ImageSet

SIZE = 16
BOX = Box(10, 10, 5, 5)


class WhiteSquare(nn.Module):
    """The mean colours of a 4×4 grid, and one feature that takes over the whiter the box is.

    Smooth everywhere, as a trained network is, so that gradients lead to the square. `strength=0` removes the detector.
    """

    def __init__(self, strength: float = 40.0) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength))

    def forward(self, images: Tensor) -> Tensor:
        inside = images[:, :, BOX.y : BOX.y + BOX.h, BOX.x : BOX.x + BOX.w] + 0.5
        fires = self.strength * inside.mean(dim=(1, 2, 3)).clamp(min=0) ** 6
        return torch.cat((fires[:, None], F.adaptive_avg_pool2d(images, 4).flatten(1)), dim=1)


def toy(strength: float = 40.0, *, fingerprint: str = "toy") -> Encoder:
    preprocessing = Preprocessing(geometry=Geometry(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    return Encoder(
        WhiteSquare(strength),
        preprocessing,
        name="toy",
        device="cpu",
        precision="fp32",
        fingerprint=fingerprint,
    )


def clean_images(n: int = 64) -> ImageSet:
    layouts = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = (F.interpolate(layouts, SIZE, mode="bilinear", align_corners=False) * 255).to(torch.uint8)
    return ImageSet(tuple(f"{number:03}" for number in range(n)), pixels)
