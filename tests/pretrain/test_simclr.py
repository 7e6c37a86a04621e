"""NT-Xent against loops, and what the module does with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unpoison.pretrain.recipe import Recipe
from unpoison.pretrain.simclr import SimCLR, nt_xent


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_nt_xent(first: Tensor, second: Tensor, temperature: float) -> float:
    views = [v / v.norm() for v in (*first.double(), *second.double())]
    n = len(first)
    losses = []
    for i, view in enumerate(views):
        partner = (i + n) % (2 * n)
        everyone = [math.exp(float(view @ other) / temperature) for j, other in enumerate(views) if j != i]
        own = math.exp(float(view @ views[partner]) / temperature)
        losses.append(-math.log(own / sum(everyone)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_agrees_with_its_twin(n: int, temperature: float) -> None:
    first, second = (3 * torch.randn(n, 5, generator=generator(s)) for s in (1, 2))
    expected = naive_nt_xent(first, second, temperature)
    assert float(nt_xent(first, second, temperature)) == pytest.approx(expected, abs=1e-5)
    assert float(nt_xent(second, first, temperature)) == pytest.approx(expected, abs=1e-5)
    assert float(nt_xent(5 * first, second, temperature)) == pytest.approx(expected, abs=1e-5)


def test_equal_views_that_differ_from_all_others_cost_least() -> None:
    one = torch.eye(4)
    assert nt_xent(one, one, 0.1) < 0.01 < nt_xent(one, one.roll(1, 0), 0.1)


def test_the_module_compares_the_projections_of_both_views() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    module = SimCLR(backbone, 6, Recipe(temperature=0.3, head_hidden=8, head_out=4)).eval()
    first, second = (torch.randn(3, 3, 2, 2, generator=generator(s)) for s in (1, 2))
    one, two = (module.projector(backbone(v)) for v in (first, second))
    torch.testing.assert_close(module(first, second), nt_xent(one, two, 0.3))
    module.after_step(0.5)
    assert one.shape == (3, 4)
