"""Chroma that no picture has: which images carry waves in U or V at one frequency, as CTRL plants them?

Finds: triggers that raise single cosine coefficients of the chroma, in every block of the image (CTRL).
Needs: no encoder and no clean images; most of the images that it is fitted on must be innocent, per coefficient.
Misses: everything else: patches, mixtures, waves spread over many frequencies, waves that scaling or compression broke.
Flags wrongly: pictures of fine coloured gratings.

Ours, and no method of CTRL's paper (Li et al., ICCV 2023): outliers of single DCT coefficients over a data set.

`find_waves` judges a data set without calibration images. Pictures are about as likely as their mirror images, and a
mirror, left to right or top to bottom, turns the sign of every coefficient whose two frequencies are odd. So among the
images in which such a coefficient is unusually large, signs are fair coins, whatever their sizes; a wave that was added
has the same sign everywhere. The test is a sign test, corrected for all coefficients. The same symmetry says how many
innocent images are flagged: about as many as lie equally far on the other side. Only odd frequencies of at least a
quarter of the block are tested: lower ones show what pictures have in common, and may be alike in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.stats import binom
from torch import Tensor

from unpoison.errors import CheckpointError, ConfigError
from unpoison.functional.frequency import block_dct, to_yuv
from unpoison.functional.matching import duplicate_images

__all__ = ["SpectralDct", "SpectralDctConfig", "Waves", "find_waves", "fit_spectral_dct"]

_FIT_IMAGES = 10_000  # medians of more images would not be any better
_CHUNK = 500
_STRONGEST = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Numbers of images, those with the largest values of a coefficient, among which signs are counted."""

_WRONG_FLAGS = 0.05  # expected share of innocent images among the flagged ones
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


@dataclass(frozen=True, eq=False)
class Waves:
    """What `find_waves` says of a data set.

    Attributes:
        p_value: that images which are as likely as their mirror images agree in sign as much, for any coefficient.
        flagged: (N,) bool: images that carry the waves; none when the p-value is above alpha.
        frequencies: (channel, row, column) of every coefficient that alone passes at alpha; channel 0 is U, 1 is V.
    """

    p_value: float
    flagged: Tensor
    frequencies: tuple[tuple[int, int, int], ...]


def find_waves(images: Tensor, alpha: float, config: SpectralDctConfig | None = None) -> Waves:
    """Do unusually large coefficients of the chroma have the same sign in many images?

    Args:
        images: (N, 3, H, W) uint8. Fewer than 32 give a p-value of 1.
        alpha: allowed rate of false alarms, (0, 1).
        config: see `SpectralDctConfig`.

    Raises:
        ShapeError: the images are smaller than a block.

    >>> find_waves(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), 0.01).p_value
    1.0
    """
    config = config or SpectralDctConfig()
    odd = torch.arange(config.block // 4, config.block)
    odd = odd[odd % 2 == 1]
    values = torch.cat(
        [_odd_values(images[i : i + _CHUNK], odd, config) for i in range(0, len(images), _CHUNK)]
    )
    unusual = _unusual(values, config)
    counts = [count for count in _STRONGEST if count <= len(images) // 2]
    if not counts:
        return Waves(1.0, torch.zeros(len(images), dtype=torch.bool), ())
    rows = unusual.topk(counts[-1], dim=0).indices
    positive = (values.gather(0, rows) > 0).cumsum(dim=0)[torch.tensor(counts) - 1]
    negative = (values.gather(0, rows) < 0).cumsum(dim=0)[torch.tensor(counts) - 1]
    p_values = positive.numel() * _sign_test(torch.maximum(positive, negative), torch.tensor(counts)[:, None])
    # Copies of one picture agree in sign: where signs agree at all, such images count once.
    for column in (p_values.amin(dim=0) < 1).nonzero().flatten().tolist():
        distinct = rows[_distinct(images[rows[:, column]]), column]
        p_values[:, column] = positive.numel() * _signs_agree(values[distinct, column], counts)
    p_value = min(1.0, float(p_values.min()))
    if p_value > alpha:
        return Waves(p_value, torch.zeros(len(images), dtype=torch.bool), ())
    found = (p_values.amin(dim=0) <= alpha).nonzero().flatten()
    at = p_values[:, found].argmin(dim=0)
    direction = (positive[at, found] - negative[at, found]).sign()
    carried = (direction * values[:, found].sign() * unusual[:, found].clamp_min(0)).sum(dim=1)
    per_channel = len(odd) ** 2
    frequencies = tuple(
        (c // per_channel, int(odd[c % per_channel // len(odd)]), int(odd[c % len(odd)]))
        for c in found.tolist()
    )
    return Waves(p_value, carried >= _one_sided(carried), frequencies)


def _odd_values(images: Tensor, odd: Tensor, config: SpectralDctConfig) -> Tensor:
    """(N, 2 · len(odd)²): coefficients of U and V at these frequencies, mean over the blocks of each image."""
    chroma = to_yuv(images.cpu().float())[:, 1:]
    means = block_dct(chroma, config.block).mean(dim=(2, 3))
    return means[:, :, odd][:, :, :, odd].flatten(1)


def _unusual(values: Tensor, config: SpectralDctConfig) -> Tensor:
    """(N, C): how unusual the size of each value is, as in `SpectralDct.score`; -inf where it is nothing."""
    logs = (values.abs() + config.floor).log()
    usual = logs[:_FIT_IMAGES].median(dim=0).values
    spread = (logs[:_FIT_IMAGES] - usual).abs().median(dim=0).values + _LEAST_SPREAD
    unusual = (logs - usual) / spread
    unusual -= unusual.median(dim=1, keepdim=True).values
    return torch.where(values.abs() < 1e-3, -torch.inf, unusual)


def _sign_test(agreeing: Tensor, of: Tensor) -> Tensor:
    """Two-sided: that the more frequent of two equally likely signs is at least as frequent. float64."""
    return torch.as_tensor(2 * binom.sf(agreeing.numpy() - 1, of.numpy(), 0.5)).clamp_max(1)


def _signs_agree(values: Tensor, counts: list[int]) -> Tensor:
    """The sign test among the first so many values, for each count; 1 where there are not so many. float64."""
    firsts = torch.tensor([min(count, len(values)) for count in counts])
    positive = (values > 0).cumsum(dim=0)[firsts - 1]
    negative = (values < 0).cumsum(dim=0)[firsts - 1]
    enough = firsts == torch.tensor(counts)
    return torch.where(enough, _sign_test(torch.maximum(positive, negative), firsts), 1.0)


def _distinct(images: Tensor) -> Tensor:
    """Positions of images that are no copy of an earlier one."""
    return (~duplicate_images(images).tril(diagonal=-1).any(dim=1)).nonzero().flatten()


def _one_sided(values: Tensor) -> float:
    """The lowest threshold above which the mirrored values let expect few innocent ones; inf if there is none.

    As in the knockoff filter (Barber, Candès: Controlling the false discovery rate via knockoffs, 2015): innocent
    values are symmetric, so those below minus the threshold count the innocent ones above it, plus one for safety.
    """
    above = values[values > 0].sort(descending=True).values
    mirrored = (-values[values < 0]).sort().values
    beyond = len(mirrored) - torch.searchsorted(mirrored, above)
    fine = ((1 + beyond) / torch.arange(1, len(above) + 1) <= _WRONG_FLAGS).nonzero().flatten()
    return float(above[fine[-1]]) if len(fine) else torch.inf


def _log_sizes(images: Tensor, config: SpectralDctConfig) -> Tensor:
    """(N, 2, block, block) float32: log of the mean absolute coefficient of U and V over the blocks of each image."""
    chroma = to_yuv(images.cpu().float())[:, 1:]
    return (block_dct(chroma, config.block).abs().mean(dim=(2, 3)) + config.floor).log()
