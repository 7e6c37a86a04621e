"""How fast is an encoder here? One timed batch says it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from unpoison.encoders.encoder import Encoder

__all__ = ["Rate", "measure_rate"]


@dataclass(frozen=True)
class Rate:
    """What one timed batch says of an encoder.

    Attributes:
        images_per_second: shown to it.
        features: D, columns of its features.
        memory: bytes that a GPU needed at its peak; None on a CPU.
    """

    images_per_second: float
    features: int
    memory: int | None


def measure_rate(encoder: Encoder, batch_size: int) -> Rate:
    """Time one batch, after one that warms up.

    Args:
        encoder: shown 2 `batch_size` grey images, which do not count in `images_shown`.
        batch_size: images per pass.
    """
    size, shown = encoder.preprocessing.geometry.size, encoder.images_shown
    pixels = torch.full((batch_size, 3, size, size), 128, dtype=torch.uint8)
    on_gpu = encoder.device.type == "cuda"
    seconds, columns = 0.0, 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(encoder.device)
    for _ in range(2):
        start = time.perf_counter()
        features = encoder.features(pixels)
        columns = features[:1].cpu().shape[1]  # waits until the device is done
        seconds = time.perf_counter() - start
    encoder.images_shown = shown
    memory = torch.cuda.max_memory_allocated(encoder.device) if on_gpu else None
    return Rate(batch_size / max(seconds, 1e-9), columns, memory)
