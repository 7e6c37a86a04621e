"""The power statement against a simulation, and against common sense."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from unpoison.scan.config import ScanConfig, held_out_count
from unpoison.scan.power import Attack, detection_probability, power_statement

CONFIG = ScanConfig().resolve(5000, 32)


def simulated(count: int, config: ScanConfig, n_images: int, localised: float, runs: int) -> float:
    """Share of searches that score three images that show the trigger: one cluster after another, image by image."""
    generator = torch.Generator().manual_seed(0)
    assert config.clusters is not None
    allowed = n_images - held_out_count(n_images)
    size, found = allowed // config.clusters, 0
    poison = round(count * allowed / n_images)
    for _ in range(runs):
        filled = [min(size, poison - start) for start in range(0, poison, size)]
        hits, alive, position = 0, config.clusters, 0
        living = [torch.randperm(size, generator=generator) < n for n in filled]
        seen = [0] * len(living)
        while True:
            for index, cluster in enumerate(living):
                drawn = cluster[position : position + config.samples]
                shows = int((drawn & (torch.rand(len(drawn), generator=generator) < localised)).sum())
                seen[index] += shows
                hits += shows
            position += config.samples
            dropped = int(config.prune * alive)
            if not dropped or hits >= 3:
                break
            alive -= dropped
            stays = [s > 0 or float(torch.rand((), generator=generator)) >= config.prune for s in seen]
            living = [c for c, keep in zip(living, stays, strict=True) if keep]
            seen = [s for s, keep in zip(seen, stays, strict=True) if keep]
        found += hits >= 3
    return found / runs


@pytest.mark.parametrize("count", [10, 25, 50, 120])
@pytest.mark.parametrize("localised", [0.3, 0.9])
def test_the_probability_is_that_of_a_simulated_search(count: int, localised: float) -> None:
    expected = detection_probability(count, CONFIG, 5000, attack=Attack(localised=localised))
    assert simulated(count, CONFIG, 5000, localised, 600) == pytest.approx(expected, abs=0.07)


def test_more_poison_is_caught_more_surely() -> None:
    chances = [detection_probability(count, CONFIG, 5000) for count in (0, 5, 20, 60, 150, 400, 5000)]
    assert chances == sorted(chances) and chances[0] == 0 and chances[-1] > 0.99


def test_the_smallest_count_is_the_smallest() -> None:
    power = power_statement(CONFIG, 5000, 32)
    assert power.smallest_count is not None and power.share == power.smallest_count / 5000
    assert detection_probability(power.smallest_count, CONFIG, 5000) >= power.probability == 0.95
    assert detection_probability(power.smallest_count - 1, CONFIG, 5000) < 0.95
    assert f"at least 95% in {power.smallest_count} images" in power.sentence
    assert "up to about 9 of 32 pixels" in power.sentence


@pytest.mark.parametrize("worse", [{"samples": 1}, {"prune": 0.6}])
def test_a_smaller_search_has_less_power(worse: dict[str, float]) -> None:
    smaller = dataclasses.replace(CONFIG, **worse)  # type: ignore[arg-type]
    before, after = (power_statement(c, 5000, 32).smallest_count for c in (CONFIG, smaller))
    assert before is not None and (after is None or after > before)


def test_without_a_second_look_more_of_the_images_must_be_scored() -> None:
    plain = dataclasses.replace(CONFIG, score="any")
    for count in (20, 30, 50):
        assert detection_probability(count, plain, 5000) < detection_probability(count, CONFIG, 5000)


@pytest.mark.parametrize(
    ("n_images", "tau", "why"),
    [
        (
            5000,
            0.3,
            "a patch had to move more than 30% of the images to stand out from innocent windows, and 20% are assumed",
        ),
        (60, 0.05, "there are too few images to confirm a patch that moves 20% of them"),
    ],
)
def test_a_scan_that_cannot_confirm_says_so(n_images: int, tau: float, why: str) -> None:
    power = power_statement(ScanConfig().resolve(n_images, 32), n_images, 32, tau=tau)
    assert power.smallest_count is None and power.share is None
    assert re.fullmatch(rf"No amount of poison .* of 95%, at best with \d+%: {why}", power.sentence)


def test_the_clusters_follow_the_smallest_poison() -> None:
    assert [ScanConfig(min_poison=m).resolve(20_000, 32).clusters for m in (400, 100, 0.005, 1)] == [
        200,
        800,
        800,
        2000,
    ]
    counts = [
        power_statement(ScanConfig(min_poison=m).resolve(20_000, 32), 20_000, 32).smallest_count
        for m in (400, 100)
    ]
    assert counts[0] is not None and counts[1] is not None and counts[1] < counts[0]
