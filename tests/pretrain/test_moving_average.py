"""The network that follows another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unpoison.pretrain.moving_average import follow, follower, rising_momentum


def test_a_follower_starts_as_a_copy_and_gets_no_gradients() -> None:
    module = nn.Linear(3, 2)
    copy = follower(module)
    assert torch.equal(copy.weight, module.weight) and copy.weight is not module.weight
    assert not copy.weight.requires_grad and module.weight.requires_grad


def test_each_weight_is_the_weighted_mean_and_the_original_stays() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    copy = follower(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    before, original = ([p.clone() for p in m.parameters()] for m in (copy, module))
    module(
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    )  # moves statistics, which stay apart
    follow(copy, module, 0.75)
    for moved, old, new in zip(copy.parameters(), before, original, strict=True):
        torch.testing.assert_close(moved, 0.75 * old + 0.25 * new)
    assert all(torch.equal(p, o) for p, o in zip(module.parameters(), original, strict=True))
    assert torch.equal(copy[1].running_mean, torch.zeros(2))


def test_it_agrees_with_lightly() -> None:
    lightly = pytest.importorskip("lightly.models.utils")
    module = nn.Linear(3, 2)
    ours, theirs = follower(module), follower(module)
    with torch.no_grad():
        module.weight.add_(1)
    follow(ours, module, 0.9)
    lightly.update_momentum(module, theirs, m=0.9)
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_the_momentum_rises_as_half_a_cosine() -> None:
    rising = [rising_momentum(0.9, step / 10) for step in range(11)]
    assert rising[0] == pytest.approx(0.9) and rising[-1] == 1.0
    assert rising == sorted(rising)
    assert rising[5] == pytest.approx(0.95)
