"""SimSiam's loss against loops, and what the module does with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unpoison.pretrain.simsiam import SimSiam, negative_cosine


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_negative_cosine(prediction: Tensor, projection: Tensor) -> float:
    pairs = zip(prediction.double(), projection.double(), strict=True)
    return sum(-float(p @ z) / float(p.norm() * z.norm()) for p, z in pairs) / len(prediction)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_loss_agrees_with_its_twin(n: int) -> None:
    prediction, projection = (3 * torch.randn(n, 5, generator=generator(s)) for s in (1, 2))
    expected = naive_negative_cosine(prediction, projection)
    assert float(negative_cosine(prediction, projection)) == pytest.approx(expected, abs=1e-6)
    assert float(negative_cosine(prediction / 7, 2 * projection)) == pytest.approx(expected, abs=1e-6)


def test_the_loss_lies_between_equal_and_opposite() -> None:
    one = torch.eye(4)
    assert [float(negative_cosine(one, other)) for other in (one, one.roll(1, 0), -one)] == [-1, 0, 1]


def test_the_loss_agrees_with_lightly() -> None:
    lightly = pytest.importorskip("lightly.loss")
    one, two = (torch.randn(6, 5, generator=generator(s)) for s in (1, 2))
    torch.testing.assert_close(negative_cosine(one, two), lightly.NegativeCosineSimilarity()(one, two))


def module() -> SimSiam:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    return SimSiam(backbone, 6, replace(SimSiam.RECIPE, head_hidden=8, head_out=4))


def views() -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(4, 3, 2, 2, generator=generator(s)) for s in (1, 2))
    return first, second


@torch.no_grad()
def test_each_view_predicts_the_projection_of_the_other() -> None:
    simsiam = module().eval()
    first, second = views()
    one, two = (simsiam.projector(simsiam.backbone(view)) for view in (first, second))
    expected = naive_negative_cosine(simsiam.predictor(one), two)
    expected += naive_negative_cosine(simsiam.predictor(two), one)
    assert float(simsiam(first, second)) == pytest.approx(expected / 2, abs=1e-5)
    assert float(simsiam(second, first)) == pytest.approx(expected / 2, abs=1e-5)


def test_no_gradient_flows_through_the_projection_that_is_predicted() -> None:
    prediction, projection = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    negative_cosine(prediction, projection).backward()
    assert prediction.grad is not None and projection.grad is None


def test_the_predictor_narrows_to_a_quarter_and_everything_learns() -> None:
    simsiam = module()
    assert [layer.out_features for layer in simsiam.predictor if isinstance(layer, nn.Linear)] == [1, 4]
    simsiam(*views()).backward()
    simsiam.after_step(0.5)
    assert all(p.grad is not None for p in simsiam.parameters())
