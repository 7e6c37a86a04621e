"""What a scan is expected to cost, beside what it costs; budgets are kept."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from toys import planted_encoder
from unpoison.errors import ConfigError
from unpoison.functional.windows import grid_masks
from unpoison.scan.config import MOST_DIRECTIONS, ScanConfig
from unpoison.scan.cost import ScanCost, expected_cost, fit_budget, fit_second_look
from unpoison.scan.poison_classifier import ClassifierConfig
from unpoison.scan.poisoncam import sharpen_windows
from unpoison.scan.search import n_scored


def cost(n_images: int = 10_000, size: int = 32, **settings: Any) -> ScanCost:
    return expected_cost(ScanConfig(**settings).resolve(n_images, size), n_images, size)


def stages(found: ScanCost) -> dict[str, tuple[int, int]]:
    return {stage.name: (stage.expected, stage.most) for stage in found.stages}


def test_the_published_search_costs_what_its_paper_says() -> None:
    found = stages(cost(126_689, 224, faithful=True))
    # 8 054 images, of which 256 masked views and itself, and 1 000 flips: algorithms, 10.1 million.
    assert found["features"] == (126_689, 126_689) and found["flip set"] == (1000, 1000)
    assert found["explore"] == (8054 * (1 + 256 + 1000),) * 2
    assert "exploit" not in found and "trial" not in found


def test_the_default_follows_the_formulas() -> None:
    config = ScanConfig().resolve(10_000, 32)
    found, masks = stages(cost()), len(grid_masks(32, 9, 4))
    again = (
        masks + 3 * 27 + 192
    )  # masks, three steps of nine places on the image and two others, patch and control
    assert found == {
        "features": (10_000, 10_000),
        "flip set": (96, 96),
        "explore": (n_scored(config.clusters or 0, 2, 0.25) * (1 + masks + 192),) * 2,
        "trial": (64 * again, 3 * 64 * again),
        "exploit": (300 * again, 300 * (masks + 3 * (3 * 27 + 192))),
        "places": (0, 5 * 16 * 192),
        "confirm": (64 * 192 + 3240, 64 * 192 + 5 * 3240),
        "evidence": (24 * masks, 24 * (1 + masks)),
    }
    assert cost().expected == sum(expected for expected, _ in found.values()) <= cost().most


def test_gradients_cost_three_passes_in_place_of_the_masks() -> None:
    by_masks, by_gradient = stages(cost()), stages(cost(attention="gradcam"))
    n = n_scored(100, 2, 0.25)
    assert by_masks["explore"][0] - by_gradient["explore"][0] == n * (1 + len(grid_masks(32, 9, 4)) - 3)
    assert by_gradient["evidence"] == (24 * 3, 24 * 3)


def test_a_race_is_expected_to_cost_less_and_never_more() -> None:
    whole, raced = stages(cost())["explore"], stages(cost(race=True))["explore"]
    assert raced[0] < 0.7 * whole[0] and raced[1] == whole[1]


@pytest.mark.parametrize("window", [3, 7, 9, 12])
def test_the_steps_that_sharpen_a_window_are_counted(window: int) -> None:
    encoder = planted_encoder()
    pixels = torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    direction = torch.nn.functional.one_hot(torch.tensor(0), 55).float()
    corners = torch.zeros(2, 2, dtype=torch.int64)
    sharpen_windows(encoder, pixels, corners, direction, window, carriers=pixels, batch_size=64)
    config = ScanConfig(window=window, exploit=2, n_flips=24).resolve(400, 32)
    exploit = stages(expected_cost(config, 400, 32))["exploit"][0]
    assert exploit == 2 * (len(grid_masks(32, window, max(1, window // 2))) + 48) + encoder.images_shown


def test_classifier_and_memory_are_counted() -> None:
    found, config = cost(1000), ClassifierConfig()
    assert found.classifier_trained == config.networks * config.iterations * config.batch_size
    assert found.classifier_judged == config.networks * 1000
    assert found.disk == 1000 * 3 * 32 * 32 < found.memory < 100 * found.disk
    assert cost(20_000).memory > 2 * found.memory
    unfiltered = cost(1000, filter_steps=0)
    assert (unfiltered.classifier_trained, unfiltered.classifier_judged) == (0, 0)
    assert cost(1000, filter_steps=7).classifier_trained == config.networks * 7 * config.batch_size


@pytest.mark.parametrize("directions", range(1, MOST_DIRECTIONS + 1))
@pytest.mark.parametrize("share", [1.0, 0.8, 0.7, 0.5, 0.35])
def test_a_budget_is_kept_and_only_the_search_shrinks(share: float, directions: int) -> None:
    config = ScanConfig().resolve(10_000, 32)
    most = expected_cost(config, 10_000, 32).most
    fitted = fit_budget(config, 10_000, 32, int(share * most))
    before = sum(
        stage.most
        for stage in expected_cost(fitted, 10_000, 32).stages
        if stage.name not in ("exploit", "confirm", "evidence")
    )
    looked = fit_second_look(fitted, 10_000, 32, directions, int(share * most) - before)
    last = {stage.name: stage for stage in expected_cost(looked, 10_000, 32).stages}
    one, all_of_them = last["exploit"].expected, last["exploit"].most  # linear in the directions
    second_look = one + (all_of_them - one) * (directions - 1) / (MOST_DIRECTIONS - 1)
    assert before + second_look + last["confirm"].most + last["evidence"].most <= share * most
    assert looked.exploit >= fitted.exploit / MOST_DIRECTIONS
    assert (fitted == config) == (share > 0.7)
    for name in ("clusters", "window", "alpha", "masks", "patches", "score"):
        assert getattr(fitted, name) == getattr(config, name)


def test_too_small_a_budget_is_refused() -> None:
    message = (
        r"max_passes=20000: the smallest search of 10000 images may take \d+; raise it, or scan fewer images"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        fit_budget(ScanConfig().resolve(10_000, 32), 10_000, 32, 20_000)
    assert "\n" not in str(caught.value) and re.search("--sample", str(caught.value))
