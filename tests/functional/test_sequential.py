"""The sequential test keeps its error rates, whatever the batch, with and without replacement."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from unpoison.errors import ConfigError, ShapeError
from unpoison.functional.sequential import (
    DROPPED,
    KEPT,
    OPEN,
    SequentialTest,
    e_benjamini_hochberg,
)

RUNS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flips(rate: float, length: int, *, runs: int = RUNS, seed: int = 0) -> Tensor:
    """(runs, length) independent Bernoulli draws."""
    return torch.rand(runs, length, generator=generator(seed)) < rate


def shuffled(marked: int, population: int, *, runs: int = RUNS, seed: int = 0) -> Tensor:
    """(runs, population): a whole set with this many hits, in random orders."""
    return torch.rand(runs, population, generator=generator(seed)).argsort(dim=1) < marked


def race(test: SequentialTest, draws: Tensor, population: int | None = None) -> Tensor:
    """The first decision of each run, `OPEN` where there is none."""
    final = torch.full((len(draws),), OPEN, dtype=torch.int8)
    for look in test.looks(draws.shape[1] + (population is None)):
        decision = test.decide(draws[:, :look].sum(dim=1), look, population)
        final = torch.where(final == OPEN, decision, final)
    return final


def within(measured: int, runs: int, rate: float) -> bool:
    """Whether so many errors are in keeping with a rate of at most `rate`: at most 3 standard errors above."""
    return measured <= runs * rate + 3 * math.sqrt(runs * rate * (1 - rate))


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("rate", [0.1, 0.15, 0.4])
def test_misses_stay_below_beta(batch: int, rate: float) -> None:
    test = SequentialTest(null_rate=0.01, rate=0.1, alpha=0.001, beta=0.05, batch=batch)
    decisions = race(test, flips(rate, 256, runs=4000))
    assert within(int((decisions == DROPPED).sum()), 4000, test.beta)
    assert (decisions == KEPT).float().mean() > 0.9


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("rate", [0.0, 0.005, 0.01])
def test_false_survivors_stay_below_alpha_and_most_are_dropped(batch: int, rate: float) -> None:
    test = SequentialTest(null_rate=0.01, rate=0.1, alpha=0.01, beta=0.05, batch=batch)
    decisions = race(test, flips(rate, 256, runs=4000, seed=1))
    assert within(int((decisions == KEPT).sum()), 4000, test.alpha)
    assert (decisions == DROPPED).float().mean() > 0.9


@pytest.mark.parametrize("batch", [4, 32])
@pytest.mark.parametrize(("marked", "error"), [(10, DROPPED), (15, DROPPED), (4, KEPT), (0, KEPT)])
def test_the_same_without_replacement(batch: int, marked: int, error: int) -> None:
    """Of 96 images; a tenth is 10 of them, a null rate of 0.05 is 4."""
    test = SequentialTest(null_rate=0.05, rate=0.1, alpha=0.05, beta=0.05, batch=batch)
    decisions = race(test, shuffled(marked, 96, runs=4000), 96)
    assert within(int((decisions == error).sum()), 4000, 0.05)


@pytest.mark.parametrize("trials", [1, 16, 64])
def test_e_values_average_one_under_the_null(trials: int) -> None:  # invariant 9
    test = SequentialTest(null_rate=0.02, rate=0.05)
    values = test.log_e_value(flips(0.02, trials, seed=2).sum(dim=1), trials).exp()
    assert float(values.mean()) == pytest.approx(1, abs=4 * float(values.std()) / math.sqrt(RUNS))
    below = test.log_e_value(flips(0.01, trials, seed=3).sum(dim=1), trials).exp()
    assert float(below.mean()) <= 1
    count = shuffled(2, 100, seed=4)[:, :trials].sum(dim=1)  # 0.02 of 100 images
    without = test.log_e_value(count, trials, 100).exp()
    assert float(without.mean()) <= 1 + 4 * float(without.std()) / math.sqrt(RUNS)


def test_e_values_average_exactly_one_over_all_counts() -> None:
    test = SequentialTest(null_rate=0.02, rate=0.05)
    counts = torch.arange(31)
    likelihood = torch.distributions.Binomial(30, torch.tensor(0.02).double()).log_prob(counts.double())
    assert float((likelihood + test.log_e_value(counts, 30)).exp().sum()) == pytest.approx(1)
    # Without replacement, 2 of 100 against 5 of 100: the counts that 2 cannot give are missing from the sum.
    orders = math.comb(100, 30)
    few = torch.tensor([math.comb(2, k) * math.comb(98, 30 - k) / orders for k in range(3)])
    values = test.log_e_value(torch.arange(3), 30, 100).exp()
    expected = sum(math.comb(5, k) * math.comb(95, 30 - k) / orders for k in range(3))
    constant = math.comb(98, 30) * math.comb(2, 0) / orders  # checks the ratio itself, at no hit
    assert float(values[0]) == pytest.approx(math.comb(95, 30) / orders / constant, rel=1e-6)
    assert float((few * values).sum()) == pytest.approx(expected, rel=1e-5) and expected < 1


def test_with_error_rates_of_zero_nothing_is_decided_early() -> None:  # invariant 9
    test = SequentialTest(alpha=0.0, beta=0.0)
    assert test.looks(1000) == []
    for trials in (0, 32, 96):
        assert (test.decide(torch.arange(trials + 1), trials, 96) == OPEN).all()
    assert test.most_hits_dropped(96, 96) == -1


def test_more_hits_speak_for_the_larger_rate() -> None:
    for population in (None, 96):
        values = SequentialTest().log_e_value(torch.arange(33), 32, population)
        assert not values.isnan().any() and bool((values[1:] >= values[:-1]).all())
    assert SequentialTest().log_e_value(torch.tensor([0]), 0).tolist() == [0.0]


def test_a_whole_set_below_the_rate_is_dropped_at_its_end() -> None:
    test = SequentialTest(null_rate=0.05, rate=0.1)  # 4 and 10 of 96 images
    decisions = test.decide(torch.arange(97), 96, 96)
    assert decisions.tolist() == [DROPPED] * 5 + [OPEN] * 5 + [KEPT] * 87


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"null_rate": 0.2}, "null_rate=0.2, rate=0.1: expected shares, 0 <= null_rate < rate < 1"),
        ({"rate": 1.0}, "null_rate=0.01, rate=1.0: expected shares"),
        ({"alpha": 1.0}, "alpha=1.0: expected an error rate in [0, 1)"),
        ({"beta": -0.1}, "beta=-0.1: expected an error rate in [0, 1)"),
        ({"batch": 0}, "batch=0: expected at least 1 image between two looks"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SequentialTest(**settings)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ShapeError, match=re.escape("hits must be 0..4, got 1..5")):
        SequentialTest().log_e_value(torch.tensor([1, 5]), 4)
    with pytest.raises(ShapeError, match=re.escape("trials must be 0..10, got 11")):
        SequentialTest().log_e_value(torch.tensor([1]), 11, 10)


def test_false_discoveries_stay_below_the_level_though_candidates_share_their_images() -> None:
    """90 harmless candidates that all flip the same images, and 10 triggers."""
    test, level, shares = SequentialTest(null_rate=0.02, rate=0.2), 0.1, []
    for seed in range(300):
        harmless = flips(0.02, 64, runs=1, seed=seed).expand(90, 64)
        triggers = flips(0.2, 64, runs=10, seed=1000 + seed)
        values = test.log_e_value(torch.cat((harmless, triggers)).sum(dim=1), 64).exp()
        called = e_benjamini_hochberg(values, level)
        shares.append(int(called[:90].sum()) / max(1, int(called.sum())))
    assert sum(shares) / len(shares) <= level
    assert not e_benjamini_hochberg(torch.ones(5), level).any()
    with pytest.raises(ConfigError, match="level=1: expected a false-discovery rate between 0 and 1"):
        e_benjamini_hochberg(torch.ones(2), 1)
