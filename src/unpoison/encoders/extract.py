"""Features of many images, in batches of one size."""

from __future__ import annotations

import torch
from torch import Tensor

from unpoison.encoders.encoder import Encoder
from unpoison.errors import NoVerdictError
from unpoison.records import Features, ImageSet
from unpoison.runtime import Progress, silent

__all__ = ["extract_features", "raw_features"]

_ALL_ALIKE = 1e-4  # rounding of bfloat16 lies above it, as do networks that were never trained


def raw_features(
    encoder: Encoder,
    pixels: Tensor,
    *,
    batch_size: int = 512,
    stage: str = "features",
    progress: Progress = silent,
) -> Tensor:
    """Features as the network gives them.

    Args:
        encoder: any encoder.
        pixels: (N, 3, S, S) uint8, or float in [0, 1].
        batch_size: images per pass; the result does not depend on it beyond rounding.
        stage: what `progress` calls this.
        progress: called after every batch with the number of images done.

    Returns:
        (N, D) float32 on the CPU.
    """
    parts = []
    for start in range(0, len(pixels), batch_size):
        parts.append(encoder.features(pixels[start : start + batch_size]).cpu())
        progress(stage, min(start + batch_size, len(pixels)), len(pixels))
    return torch.cat(parts) if parts else torch.empty(0, 0)


def extract_features(
    encoder: Encoder, images: ImageSet, *, batch_size: int = 512, progress: Progress = silent
) -> Features:
    """Unit-length features of every image.

    Raises:
        NoVerdictError: the encoder gives NaN, infinite or zero features, or the same for all of several images, so
            nothing can be compared.
    """
    values = raw_features(encoder, images.pixels, batch_size=batch_size, progress=progress)
    norms = values.norm(dim=1, keepdim=True)
    bad = int((~torch.isfinite(norms) | (norms <= 0)).sum())
    if bad:
        raise NoVerdictError(
            f"{encoder.name} gives NaN, infinite or zero features for {bad} of {len(values)} images; "
            "check its weights and preprocessing"
        )
    units = values / norms
    if len(units) > 1 and float((units - units.mean(dim=0)).norm(dim=1).max()) < _ALL_ALIKE:
        raise NoVerdictError(
            f"{encoder.name} gives the same features for all {len(units)} images: it is no working encoder; "
            "check its weights and preprocessing"
        )
    return Features(images.ids, units)
