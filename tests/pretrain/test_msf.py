"""Mean shift's loss against loops, and what the module does with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unpoison.pretrain.msf import MSF, NEIGHBOURS, neighbour_error


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(n: int, seed: int) -> Tensor:
    return normalize(torch.randn(n, 5, generator=generator(seed)), dim=1)


def naive_error(prediction: Tensor, target: Tensor, memory: Tensor, neighbours: int) -> float:
    """Squared distances to the rows of the memory, sorted by their distance to the target."""
    errors = []
    for p, t in zip(prediction.double(), target.double(), strict=True):
        nearest = sorted(memory.double(), key=lambda row: float((row - t).square().sum()))[:neighbours]
        errors += [float((p / p.norm() - row).square().sum()) for row in nearest]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("neighbours", [1, 3, 20])
def test_the_loss_agrees_with_its_twin(n: int, neighbours: int) -> None:
    prediction, target, memory = 3 * torch.randn(n, 5, generator=generator(1)), unit(n, 2), unit(9, 3)
    expected = naive_error(prediction, target, memory, neighbours)
    assert float(neighbour_error(prediction, target, memory, neighbours)) == pytest.approx(expected, abs=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the loss stays in float32
        got = float(neighbour_error(prediction, target, memory, neighbours))
    assert got == pytest.approx(expected, abs=1e-5)


def test_with_one_neighbour_it_is_byols_error() -> None:
    from unpoison.pretrain.byol import prediction_error

    prediction, target = torch.randn(6, 5, generator=generator(1)), unit(6, 2)
    memory = torch.cat((target, unit(9, 3)))
    torch.testing.assert_close(
        neighbour_error(prediction, target, memory, 1), prediction_error(prediction, target)
    )


def module() -> MSF:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    return MSF(backbone, 6, replace(MSF.RECIPE, key_momentum=0.75, queue_size=9, head_hidden=8, head_out=5))


def views() -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(4, 3, 2, 2, generator=generator(s)) for s in (1, 2))
    return first, second


@torch.no_grad()
def test_a_target_is_among_its_own_neighbours() -> None:
    msf = module().eval()
    for parameter in msf.target_backbone.parameters():  # so that target and online network differ
        parameter.mul_(1.5)
    first, second = views()
    old = msf.memory.rows.clone()
    target = normalize(msf.target_projector(msf.target_backbone(second)), dim=1)
    prediction = msf.predictor(msf.projector(msf.backbone(first)))
    memory = torch.cat((target, old[4:]))
    loss = msf(first, second)
    torch.testing.assert_close(msf.memory.rows, memory)
    assert float(loss) == pytest.approx(naive_error(prediction, target, memory, NEIGHBOURS), abs=1e-5)


def test_gradients_reach_the_online_network_only() -> None:
    msf = module()
    msf(*views()).backward()
    online = [*msf.backbone.parameters(), *msf.projector.parameters(), *msf.predictor.parameters()]
    target = [*msf.target_backbone.parameters(), *msf.target_projector.parameters()]
    assert all(p.grad is not None for p in online)
    assert all(p.grad is None and not p.requires_grad for p in target)


def test_the_target_follows_as_fast_at_the_end_as_before() -> None:
    msf = module()
    before = msf.target_backbone[1].weight.clone()
    with torch.no_grad():
        for parameter in (*msf.backbone.parameters(), *msf.projector.parameters()):
            parameter.add_(1)
    msf.after_step(1.0)
    torch.testing.assert_close(msf.target_backbone[1].weight, before + 0.25)
