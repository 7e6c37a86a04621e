"""The small networks that sit on a backbone during pre-training and are thrown away afterwards."""

from __future__ import annotations

import itertools

from torch import nn

__all__ = ["normalised_head", "projection_head"]


def projection_head(feature_size: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers with batch normalisation and ReLU between them; BYOL's predictor has the same form."""
    return nn.Sequential(
        nn.Linear(feature_size, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out),
    )


def normalised_head(sizes: tuple[int, ...]) -> nn.Sequential:
    """Layers of these sizes, each with batch normalisation, ReLU between them; the last normalises only.

    Args:
        sizes: of the input, of every hidden layer, of the output.

    Source:
        MoCo v3, section 4.1: projector of three layers, predictor of two; the last norm is without scale and shift,
        as in its release.
    """
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(into, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
    layers += [nn.Linear(sizes[-2], sizes[-1], bias=False), nn.BatchNorm1d(sizes[-1], affine=False)]
    return nn.Sequential(*layers)
