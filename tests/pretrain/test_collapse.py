"""Two numbers against their slow twins, and where they say that training collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unpoison.pretrain.collapse import measure_diversity


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "d"), [(16, 3), (20, 5), (20, 40)])
def test_they_agree_with_their_twins(n: int, d: int) -> None:
    features = draw(n, d) + 1
    unit = torch.stack([row / row.norm() for row in features.double()])
    values = torch.linalg.eigvalsh(torch.cov(unit.T))
    distance = sum(float(((a - b) ** 2).sum()) for a in unit for b in unit) / (2 * n * n)
    measured = measure_diversity(features)
    assert measured.spread == pytest.approx(distance)  # half the mean squared distance of two features
    assert measured.rank == pytest.approx(float(values.sum() ** 2 / values.square().sum()))
    assert measure_diversity(7 * features).spread == pytest.approx(measured.spread)


def test_few_features_have_no_rank() -> None:
    assert measure_diversity(draw(15, 5)).rank == math.inf
    assert not measure_diversity(torch.eye(2)).collapsed and measure_diversity(torch.ones(2, 3)).collapsed


@pytest.mark.parametrize(
    ("features", "collapsed"),
    [
        (draw(50, 8), False),
        (draw(50, 8) * 0.1 + 1, False),  # a narrow cone is no collapse
        (torch.ones(50, 8), True),
        (torch.ones(50, 8) + 1e-3 * draw(50, 8), True),
        (draw(50, 1) * torch.ones(8), True),  # two opposite points
        (torch.cat((draw(50, 1), torch.ones(50, 1), torch.zeros(50, 6)), dim=1), False),  # an arc
        (torch.full((50, 8), torch.nan), True),
        (torch.zeros(50, 8), True),
    ],
)
def test_a_point_a_line_and_no_number_are_collapse(features: Tensor, collapsed: bool) -> None:
    assert measure_diversity(features).collapsed is collapsed
