"""Chroma that no picture has: which images carry waves in U or V at one frequency, as CTRL plants them?

Finds: triggers that raise single cosine coefficients of the chroma, in every block of the image (CTRL).
Needs: no encoder and no clean images; most of the images that it is fitted on must be innocent, per coefficient.
Misses: everything else: patches, mixtures, waves spread over many frequencies, waves that scaling or compression broke.
Flags wrongly: pictures of fine coloured gratings.

Ours, and no method of CTRL's paper (Li et al., ICCV 2023): outliers of single DCT coefficients over a data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.errors import CheckpointError, ConfigError
from unpoison.functional.frequency import block_dct, to_yuv

__all__ = ["SpectralDct", "SpectralDctConfig", "fit_spectral_dct"]

_FIT_IMAGES = 10_000  # medians of more images would not be any better
_CHUNK = 500
_LEAST_SPREAD = (
    0.05  # of a logarithm: a coefficient that is the same in all images must not divide by nothing
)


@dataclass(frozen=True, kw_only=True)
class SpectralDctConfig:
    """Settings of the spectral screen.

    Attributes:
        block: side of the transformed blocks, 4 to 512 pixels; images smaller than that are refused.
        floor: added to the size of every coefficient, in grey levels: what lies far below it counts as nothing.
    """

    block: int = 32
    floor: float = 1.0

    def __post_init__(self) -> None:
        if not 4 <= self.block <= 512:
            raise ConfigError(f"block={self.block}: expected blocks of 4 to 512 pixels")
        if not self.floor > 0:
            raise ConfigError(f"floor={self.floor}: expected a positive number of grey levels")


@dataclass(frozen=True, eq=False)
class SpectralDct:
    """The fitted screen; see `scan.detector.Scorer`.

    Attributes:
        config: its settings.
        usual: (2, block, block) float32: median logarithm of the size of every coefficient of U and V over the images.
        spread: (2, block, block) float32: median absolute deviation of the same.
    """

    config: SpectralDctConfig
    usual: Tensor
    spread: Tensor

    method: ClassVar[str] = "spectral-dct"

    def score(self, images: Tensor) -> Tensor:
        """The most unusual coefficient, relative to what is usual for it and for this image.

        A coefficient's logarithm is centred and scaled by its median and spread over the data. The score is the largest
        of these values less the image's median one, so that a picture that is colourful at all frequencies is no
        suspect. Logarithms, because sizes of low frequencies have long tails.

        Args:
            images: (N, 3, H, W) uint8.

        Returns:
            (N,) float32, at least 0.
        """
        values = ((_log_sizes(images, self.config) - self.usual) / (self.spread + _LEAST_SPREAD)).flatten(1)
        return values.amax(dim=1) - values.median(dim=1).values

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold beside the settings."""
        return {"usual": self.usual, "spread": self.spread}

    @classmethod
    def restore(cls, config: SpectralDctConfig, tensors: Mapping[str, Tensor]) -> SpectralDct:
        """The screen of a file.

        Raises:
            CheckpointError: the file's tensors are not those of this method.
        """
        shape = (2, config.block, config.block)
        fitting = all(t.shape == shape and t.dtype == torch.float32 for t in tensors.values())
        if set(tensors) != {"usual", "spread"} or not fitting or bool((tensors["spread"] < 0).any()):
            raise CheckpointError(
                f"a spectral-dct detector holds `usual` and `spread`, {shape} float32, none negative: get another copy"
            )
        return cls(config, tensors["usual"], tensors["spread"])


def fit_spectral_dct(images: Tensor, config: SpectralDctConfig | None = None) -> SpectralDct:
    """Learn how large every coefficient usually is.

    Args:
        images: (N, 3, H, W) uint8; fewer than half of them may be poisoned; the first 10 000 count.
        config: see `SpectralDctConfig`.

    Raises:
        ShapeError: the images are smaller than a block.
    """
    config = config or SpectralDctConfig()
    chosen = images[:_FIT_IMAGES]
    logs = torch.cat([_log_sizes(chosen[i : i + _CHUNK], config) for i in range(0, len(chosen), _CHUNK)])
    usual = logs.median(dim=0).values
    return SpectralDct(config, usual, (logs - usual).abs().median(dim=0).values)


def _log_sizes(images: Tensor, config: SpectralDctConfig) -> Tensor:
    """(N, 2, block, block) float32: log of the mean absolute coefficient of U and V over the blocks of each image."""
    chroma = to_yuv(images.cpu().float())[:, 1:]
    return (block_dct(chroma, config.block).abs().mean(dim=(2, 3)) + config.floor).log()
