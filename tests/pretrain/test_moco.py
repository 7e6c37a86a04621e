"""InfoNCE, the queue and the moving average, each against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unpoison.pretrain.moco import MoCoV2, info_nce
from unpoison.pretrain.recipe import Recipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(n: int, d: int, seed: int) -> Tensor:
    return normalize(torch.randn(n, d, generator=generator(seed)), dim=1)


def naive_info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> float:
    losses = []
    for q, k in zip(query.double(), key.double(), strict=True):
        own = math.exp(float(q @ k) / temperature)
        others = sum(math.exp(float(q @ old) / temperature) for old in queue.double())
        losses.append(-math.log(own / (own + others)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_agrees_with_its_twin(temperature: float) -> None:
    query, key, queue = unit(4, 6, 1), unit(4, 6, 2), unit(9, 6, 3)
    expected = naive_info_nce(query, key, queue, temperature)
    assert float(info_nce(query, key, queue, temperature)) == pytest.approx(expected, abs=1e-5)


def module(queue_size: int = 8, momentum: float = 0.9) -> MoCoV2:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    recipe = Recipe(temperature=0.2, key_momentum=momentum, queue_size=queue_size, head_hidden=8, head_out=4)
    return MoCoV2(backbone, 6, recipe)


def step(moco: MoCoV2, seed: int, n: int = 3) -> Tensor:
    """One step; returns its keys as they were made."""
    first, second = (torch.randn(n, 3, 2, 2, generator=generator(seed + s)) for s in (0, 100))
    moco.eval()
    with torch.no_grad():
        key = normalize(moco.key_projector(moco.key_backbone(second)), dim=1)
        moco(first, second)
    moco.after_step(0.5)
    return key


def test_the_queue_is_a_ring_that_drops_the_oldest_keys() -> None:
    moco = module(queue_size=8)
    expected = list(moco.queue.rows.clone())
    position = 0
    for seed in range(7):
        for key in step(moco, seed):  # the slow twin: one key after the other
            expected[position % 8] = key
            position += 1
        torch.testing.assert_close(moco.queue.rows, torch.stack(expected))
        assert int(moco.queue.position) == position % 8


def test_a_batch_larger_than_the_queue_fills_it() -> None:
    moco = module(queue_size=2)
    key = step(moco, 0, n=5)
    torch.testing.assert_close(moco.queue.rows, key[:2])


def test_the_key_network_is_the_moving_average_of_the_query_network() -> None:
    moco = module(momentum=0.75)
    pairs = list(zip(moco.key_backbone.parameters(), moco.backbone.parameters(), strict=True))
    pairs += list(zip(moco.key_projector.parameters(), moco.projector.parameters(), strict=True))
    assert all(
        torch.equal(key, query) and not key.requires_grad and query.requires_grad for key, query in pairs
    )
    with torch.no_grad():
        for _, query in pairs:
            query.add_(1)
    before = [key.clone() for key, _ in pairs]
    queries = [query.clone() for _, query in pairs]
    step(moco, 0)
    for (key, query), old, unmoved in zip(pairs, before, queries, strict=True):
        torch.testing.assert_close(key, 0.75 * old + 0.25 * query)
        assert torch.equal(query, unmoved)


def test_gradients_reach_the_query_network_only() -> None:
    moco = module()
    loss = moco(
        torch.randn(4, 3, 2, 2, generator=generator(1)), torch.randn(4, 3, 2, 2, generator=generator(2))
    )
    loss.backward()
    assert all(p.grad is not None for p in moco.backbone.parameters())
    assert all(p.grad is None for p in moco.key_backbone.parameters())


def test_the_loss_is_info_nce_against_the_queue_before_the_step() -> None:
    moco = module().eval()
    first, second = (torch.randn(4, 3, 2, 2, generator=generator(s)) for s in (1, 2))
    query = normalize(moco.projector(moco.backbone(first)), dim=1)
    key = normalize(moco.key_projector(moco.key_backbone(second)), dim=1)
    torch.testing.assert_close(moco(first, second), info_nce(query, key, moco.queue.rows, 0.2))
