"""The small networks that sit on a backbone during pre-training and are thrown away afterwards."""

from __future__ import annotations

from torch import nn

__all__ = ["projection_head"]


def projection_head(feature_size: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers with batch normalisation and ReLU between them."""
    return nn.Sequential(
        nn.Linear(feature_size, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out),
    )
