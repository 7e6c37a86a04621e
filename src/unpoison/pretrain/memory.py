"""What a network said of earlier images: the negatives of MoCo v2, the neighbours of mean shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Queue"]


class Queue(nn.Module):
    """The newest rows of unit length; random ones until it has been filled.

    Draws from torch's global generator; construct it inside `runtime.seeded`.

    Args:
        size: rows.
        width: D of each.

    Attributes:
        rows: (size, D) float32.
        position: where the next row goes.
    """

    rows: Tensor
    position: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, newest: Tensor) -> None:
        """Put rows over the oldest; of more rows than there is room for, the first are taken."""
        n = min(len(newest), len(self.rows))
        start = int(self.position)
        places = torch.arange(start, start + n, device=self.rows.device) % len(self.rows)
        self.rows[places] = newest[:n]
        self.position.fill_((start + n) % len(self.rows))
