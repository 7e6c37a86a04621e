"""Settings of a scan: what is refused, and what is filled in."""

from __future__ import annotations

import re
from typing import Any

import pytest

from unpoison.errors import ConfigError
from unpoison.scan.config import DETECTORS, ScanConfig
from unpoison.scan.detector import METHODS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method='magic': expected auto or poisoncam or patchsearch or backdoor-ids"),
        ({"attention": "eyes"}, "attention='eyes': expected mask or gradcam"),
        ({"masks": "none"}, "masks='none': expected grid or random or blocks or pixels"),
        ({"fill": "pink"}, "fill='pink': expected mean or black"),
        ({"score": "best"}, "score='best': expected directed or concentrated or any or source"),
        ({"n_masks": 0}, "n_masks=0: expected at least 1"),
        ({"samples": 0}, "samples=0: expected at least 1"),
        ({"patches": 0}, "patches=0: expected at least 1"),
        ({"top_k": 0}, "top_k=0: expected at least 1"),
        ({"filter_steps": -1}, "filter_steps=-1: expected 0 or more"),
        ({"exploit": -1}, "exploit=-1: expected at least 1"),
        ({"clusters": 1}, "clusters=1: expected at least 2"),
        ({"window": 1}, "window=1: expected at least 2"),
        ({"n_flips": 0}, "n_flips=0: expected at least 2"),
        ({"prune": 0.0}, "prune=0.0: expected a fraction between 0 and 1"),
        ({"prune": 1.0}, "prune=1.0: expected a fraction between 0 and 1"),
        ({"alpha": 0.0}, "alpha=0.0: expected a false-alarm rate between 0 and 0.5"),
        ({"alpha": 0.5}, "alpha=0.5: expected a false-alarm rate between 0 and 0.5"),
        ({"alpha": float("nan")}, "alpha=nan: expected a false-alarm rate"),
        ({"min_poison": 0}, "min_poison=0: expected a whole number of images, or a share between 0 and 1"),
        ({"min_poison": 2.5}, "min_poison=2.5: expected a whole number of images, or a share"),
        ({"max_passes": 0}, "max_passes=0: expected a number above 0"),
        ({"max_seconds": -1.0}, "max_seconds=-1.0: expected a number above 0"),
        ({"max_seconds": float("inf")}, "max_seconds=inf: expected a number above 0"),
        ({"min_poison": float("inf")}, "min_poison=inf: expected a whole number of images"),
        (
            {"faithful": True, "race": True},
            "faithful contradicts race: the published search is not cut short",
        ),
        ({"faithful": True, "max_passes": 9}, "faithful contradicts max_passes"),
        ({"faithful": True, "masks": "grid"}, "faithful contradicts masks=grid"),
        ({"faithful": True, "score": "directed"}, "faithful contradicts score=directed"),
        ({"faithful": True, "score": "concentrated"}, "random masks and the scores any or source"),
        (
            {"method": "dede", "clusters": 9},
            "clusters=9: dede judges images one by one and has no such setting",
        ),
        ({"method": "spectral-dct", "max_passes": 9}, "max_passes=9: spectral-dct judges images one by one"),
        ({"method": "backdoor-ids", "faithful": True}, "faithful: backdoor-ids has no published settings"),
        ({"method": "dede", "false_positive_rate": 0}, "false_positive_rate=0: expected a share above 0"),
        (
            {"false_positive_rate": 0.05},
            "false_positive_rate=0.05: is a setting of detectors; leave it out, or",
        ),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        ScanConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("n_images", "clusters", "as_published", "n_flips"),
    [
        (50, 5, 5, 25),
        (200, 20, 20, 96),
        (1293, 50, 129, 96),
        (5000, 50, 500, 96),
        (10_000, 100, 1000, 96),
        (126_689, 800, 1000, 96),
    ],
)
def test_the_number_of_clusters_follows_the_number_of_images(
    n_images: int, clusters: int, as_published: int, n_flips: int
) -> None:
    resolved = ScanConfig().resolve(n_images, 32)
    assert (resolved.clusters, resolved.n_flips) == (clusters, n_flips)
    faithful = ScanConfig(faithful=True).resolve(n_images, 32)
    assert (faithful.clusters, faithful.n_flips) == (as_published, min(1000, n_images // 2))


@pytest.mark.parametrize(("image_size", "window"), [(8, 3), (32, 9), (64, 17), (224, 60)])
def test_the_window_follows_the_image(image_size: int, window: int) -> None:
    assert ScanConfig().resolve(1000, image_size).window == window


def test_defaults_are_ours_and_faithful_ones_the_papers() -> None:
    def chosen(**settings: Any) -> tuple[str | None, ...]:
        config = ScanConfig(**settings).resolve(1000, 32)
        return config.attention, config.masks, config.score

    assert chosen() == ("mask", "grid", "directed")
    assert chosen(faithful=True) == ("mask", "random", "any")
    assert chosen(method="patchsearch") == ("gradcam", "grid", "directed")
    assert chosen(method="patchsearch", faithful=True) == ("gradcam", "random", "source")


@pytest.mark.parametrize("masks", ["random", "blocks", "pixels"])
def test_every_mask_strategy_of_the_paper_goes_with_faithful(masks: str) -> None:
    assert ScanConfig(masks=masks, faithful=True).resolve(1000, 32).masks == masks


def test_what_was_asked_for_stays() -> None:
    asked = ScanConfig(clusters=7, window=5, attention="gradcam", masks="random", score="any", n_flips=11)
    assert asked.resolve(1000, 32) == asked


def test_detectors_are_those_of_the_table_and_complete_as_they_are() -> None:
    assert sorted(METHODS) == list(DETECTORS)
    for method in DETECTORS:
        config = ScanConfig(method=method, alpha=0.05, false_positive_rate=0.02)
        assert config.resolve(100, 32) == config and config.by_detector and not config.with_screen


def test_only_the_plan_that_fits_has_a_screen() -> None:
    assert ScanConfig().with_screen and not ScanConfig().by_detector
    assert not ScanConfig(faithful=True).with_screen
    assert not ScanConfig(method="poisoncam").with_screen and not ScanConfig(method="patchsearch").with_screen


def test_resolving_twice_changes_nothing() -> None:
    for config in (ScanConfig(), ScanConfig(faithful=True)):
        once = config.resolve(500, 32)
        assert once.resolve(500, 32) == once


def test_what_does_not_fit_the_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="window=33: the encoder sees 32 pixels; expected at most that"):
        ScanConfig(window=33).resolve(1000, 32)
    with pytest.raises(ConfigError, match="clusters=61: there are 60 readable images; expected at most that"):
        ScanConfig(clusters=61).resolve(60, 32)
    assert ScanConfig(window=32, clusters=60).resolve(60, 32).window == 32
