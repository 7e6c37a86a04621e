"""Has training collapsed? Two numbers of a sample of features, cheap enough for every epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Diversity", "measure_diversity"]

_LEAST_SPREAD = 1e-3
_LEAST_RANK = 1.05
_FEW = 16  # features; so few lie near a line by chance, two always do


@dataclass(frozen=True)
class Diversity:
    """How much the features of different images differ.

    Attributes:
        spread: 1 minus the squared length of the mean unit feature, in [0, 1]; 0 when all are one point.
        rank: number of directions that share their variance (participation ratio), at least 1; 1 when all lie on
            one line. Infinite where it was not measured, on fewer than 16 features.
    """

    spread: float
    rank: float

    @property
    def collapsed(self) -> bool:
        """One point, one line, or no number at all."""
        return not (self.spread > _LEAST_SPREAD and self.rank > _LEAST_RANK)

    def __str__(self) -> str:
        return f"features differ by {self.spread:.1e} of their length, in {self.rank:.2f} directions"


def measure_diversity(features: Tensor) -> Diversity:
    """Spread and rank of features.

    Args:
        features: (N, D) float, N at least 2, any length.

    Source:
        Participation ratio (sum λ)² / sum λ² of the covariance's eigenvalues, taken from the Gram matrix, which has
        the same ones.
    """
    unit = F.normalize(features.detach().double(), dim=1)
    mean = unit.mean(dim=0)
    spread = float(1 - mean.norm() ** 2)
    if len(features) < _FEW:
        return Diversity(spread, rank=math.inf)
    gram = (unit - mean) @ (unit - mean).T
    rank = gram.trace() ** 2 / gram.square().sum().clamp_min(torch.finfo(gram.dtype).tiny)
    return Diversity(spread, float(rank))
