"""BYOL's loss against loops, and what the module does with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unpoison.pretrain.byol import BYOL, prediction_error
from unpoison.pretrain.moving_average import rising_momentum


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_error(prediction: Tensor, target: Tensor) -> float:
    """Equation 2 as it stands: the squared distance of the two unit vectors."""
    errors = []
    for p, t in zip(prediction.double(), target.double(), strict=True):
        difference = p / p.norm() - t / t.norm()
        errors.append(float((difference * difference).sum()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_loss_agrees_with_its_twin(n: int) -> None:
    prediction, target = (3 * torch.randn(n, 5, generator=generator(s)) for s in (1, 2))
    assert float(prediction_error(prediction, target)) == pytest.approx(
        naive_error(prediction, target), abs=1e-5
    )
    assert float(prediction_error(2 * prediction, target / 3)) == pytest.approx(
        naive_error(prediction, target), abs=1e-5
    )


def test_the_loss_lies_between_equal_and_opposite() -> None:
    one = torch.eye(4)
    values = [float(prediction_error(one, other)) for other in (one, one.roll(1, 0), -one)]
    assert values == pytest.approx([0, 2, 4])


def test_the_loss_agrees_with_lightly() -> None:
    lightly = pytest.importorskip("lightly.loss")
    one, two = (torch.randn(6, 5, generator=generator(s)) for s in (1, 2))
    torch.testing.assert_close(
        prediction_error(one, two), 2 + 2 * lightly.NegativeCosineSimilarity()(one, two)
    )


def module() -> BYOL:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    return BYOL(backbone, 6, replace(BYOL.RECIPE, key_momentum=0.5, head_hidden=8, head_out=4))


def views() -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(4, 3, 2, 2, generator=generator(s)) for s in (1, 2))
    return first, second


@torch.no_grad()
def test_each_view_predicts_the_target_of_the_other() -> None:
    byol = module().eval()
    for parameter in byol.target_backbone.parameters():  # so that target and online network differ
        parameter.mul_(1.5)
    first, second = views()
    expected = 0.0
    for seen, hidden in ((first, second), (second, first)):
        prediction = byol.predictor(byol.projector(byol.backbone(seen)))
        expected += naive_error(prediction, byol.target_projector(byol.target_backbone(hidden)))
    assert float(byol(first, second)) == pytest.approx(expected, abs=1e-5)
    assert float(byol(second, first)) == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_the_online_network_only() -> None:
    byol = module()
    byol(*views()).backward()
    online = [*byol.backbone.parameters(), *byol.projector.parameters(), *byol.predictor.parameters()]
    target = [*byol.target_backbone.parameters(), *byol.target_projector.parameters()]
    assert all(p.grad is not None for p in online)
    assert all(p.grad is None and not p.requires_grad for p in target)


def test_the_target_follows_and_stands_still_at_the_end() -> None:
    byol = module()
    with torch.no_grad():
        for parameter in (*byol.backbone.parameters(), *byol.projector.parameters()):
            parameter.add_(1)
    before = byol.target_backbone[1].weight.clone()
    byol.after_step(0.5)
    share = rising_momentum(0.5, 0.5)
    torch.testing.assert_close(byol.target_backbone[1].weight, before + (1 - share))
    moved = byol.target_projector[0].weight.clone()
    byol.after_step(1.0)
    assert torch.equal(byol.target_projector[0].weight, moved)
