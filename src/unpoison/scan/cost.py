"""What will a scan cost? Passes per stage from the settings alone, and memory.

Passes are counted by the formulas of docs/methods.md. Two things are not known before a scan: how many directions the
candidates elect, and how many patterns become finalists. `expected` takes one of each, as in a scan that finds one
trigger; `most` takes as many as there can be, and is never exceeded. A scan that finds nothing costs less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from unpoison.errors import ConfigError
from unpoison.functional.windows import grid_masks
from unpoison.records import Cost, StageCost
from unpoison.scan.config import (
    CARRIERS,
    MOST_BENIGN,
    MOST_DIRECTIONS,
    MOST_FINALISTS,
    MOST_OTHERS,
    MOST_PLACES,
    PICTURES,
    SHARING,
    TRIALS,
    ScanConfig,
    held_out_count,
)
from unpoison.scan.confirm import MOST_COMPARED
from unpoison.scan.flip_test import RACE
from unpoison.scan.patchsearch import PASSES_PER_MAP
from unpoison.scan.poison_classifier import ClassifierConfig
from unpoison.scan.search import n_scored

__all__ = ["ScanCost", "expected_cost", "fit_budget", "fit_second_look"]

_RACE_SURVIVORS = 0.25
"""Share of raced candidates that we expect to need the whole flip set."""


@dataclass(frozen=True, kw_only=True)
class ScanCost(Cost):
    """What a scan is expected to cost.

    Attributes:
        stages: named as in verdict.json.
        classifier_trained: images shown to the classifier's own networks in training, only when poison is confirmed.
        classifier_judged: images shown to them afterwards.
        memory: bytes of the data that the scan holds, without the networks and what they need while they run.
        disk: bytes of decoded pixels in the run folder.
    """

    classifier_trained: int
    classifier_judged: int
    memory: int
    disk: int


def expected_cost(
    config: ScanConfig, n_images: int, image_size: int, *, features: int = 512, batch_size: int = 512
) -> ScanCost:
    """The cost of a scan with these settings.

    Args:
        config: resolved settings.
        n_images: readable images.
        image_size: side of the encoder's input, pixels.
        features: D, columns of the encoder's features; for the memory.
        batch_size: images per pass; for the memory.
    """
    assert config.clusters is not None and config.n_flips is not None and config.window is not None, (
        "the config is resolved before its cost is counted"
    )
    held_out = held_out_count(n_images)
    allowed = n_images - held_out
    n_flips = min(config.n_flips, allowed)
    flips = n_flips * (1 if config.faithful else 2)
    # The first look at which someone can be dropped.
    looks = [n for n in RACE.looks(n_flips) if RACE.most_hits_dropped(n, n_flips) >= 0] if config.race else []
    raced = round(flips * _RACE_SURVIVORS + 2 * looks[0] * (1 - _RACE_SURVIVORS)) if looks else flips
    masks = _mask_count(config, image_size)
    by_gradient = config.attention == "gradcam"
    explored = min(n_scored(config.clusters, config.samples, config.prune), allowed)
    heat = PASSES_PER_MAP if by_gradient else 1 + masks

    def look_again(n: int, directions: int) -> int:
        return n * _passes_of_a_look(config, image_size, allowed, directions)

    def confirmation(finalists: int) -> int:
        # Of each, pasted in pairs, then hidden: its images, no more than were scored, and others.
        hidden = min(MOST_OTHERS, n_images) + min(MOST_COMPARED, explored + exploited + shared)
        return min(MOST_BENIGN, allowed) * flips + finalists * (2 * held_out + hidden)

    directed = config.score == "directed"
    shared = MOST_PLACES * SHARING if directed else 0
    trials, exploited = min(TRIALS, explored), min(config.exploit, allowed)
    along = PASSES_PER_MAP if by_gradient else masks
    pictures = min(PICTURES, explored + exploited + shared)
    stages = [
        StageCost("features", n_images, n_images),
        StageCost("flip set", n_flips, n_flips),
        StageCost(
            "explore",
            _explored(config, allowed) * (heat + config.patches * raced),
            explored * (heat + config.patches * flips),
        ),
    ]
    if directed:
        stages += [
            # Each direction is tried for itself, and hides the masks anew.
            StageCost("trial", look_again(trials, 1), MOST_DIRECTIONS * look_again(trials, 1)),
            StageCost("exploit", look_again(exploited, 1), look_again(exploited, MOST_DIRECTIONS)),
            StageCost("places", 0, shared * flips),
        ]
    stages += [
        StageCost("confirm", confirmation(1), confirmation(MOST_FINALISTS)),
        StageCost("evidence", pictures * (along if directed else heat), pictures * max(along, heat)),
    ]
    classifier = ClassifierConfig.of_scan(config)
    networks = 0 if config.filter_steps == 0 else classifier.networks
    side = 3 * image_size**2
    per_chunk = max(batch_size, masks, n_flips)
    return ScanCost(
        stages=tuple(stages),
        classifier_trained=networks * classifier.iterations * classifier.batch_size,
        classifier_judged=networks * n_images,
        # Pixels may be a memory map, but are all read; features twice, while they are made unit length; a batch as
        # bytes and as floats.
        memory=n_images * (side + 8 * features) + per_chunk * (5 * side + 4 * features + 4 * config.clusters),
        disk=n_images * side,
    )


def _passes_of_a_look(config: ScanConfig, image_size: int, allowed: int, directions: int) -> int:
    """Of one image that is looked at again: its map, and for each direction sharpening and pasting."""
    assert config.n_flips is not None and config.window is not None, "resolved before its cost is counted"
    n_flips = min(config.n_flips, allowed)
    by_gradient = config.attention == "gradcam"
    along = PASSES_PER_MAP * directions if by_gradient else _mask_count(config, image_size)
    sharpen = 9 * (1 + min(CARRIERS, n_flips)) * _sharpening_steps(config.window)
    return along + directions * (sharpen + n_flips * (1 if config.faithful else 2))


def _explored(config: ScanConfig, allowed: int) -> int:
    """Images that the rounds score when every cluster has as many as the average one and runs dry as it does."""
    assert config.clusters is not None, "the config is resolved before its cost is counted"
    alive, left, total = config.clusters, allowed / config.clusters, 0.0
    while True:
        drawn = min(float(config.samples), left)
        total, left = total + alive * drawn, left - drawn
        dropped = int(config.prune * alive)
        if dropped == 0:
            return round(total)
        alive -= dropped


def _mask_count(config: ScanConfig, image_size: int) -> int:
    assert config.window is not None, "the config is resolved before its cost is counted"
    if config.masks == "grid":
        return len(grid_masks(image_size, config.window, max(1, config.window // 2)))
    return config.n_masks


def _sharpening_steps(window: int) -> int:
    """Rounds of `sharpen_windows`: a third of the side, then half of that, and so on down to one pixel.

    >>> _sharpening_steps(9), _sharpening_steps(60)
    (3, 6)
    """
    step, rounds = -(-window // 3), 1
    while step > 1:
        step, rounds = -(-step // 2), rounds + 1
    return rounds


def fit_budget(config: ScanConfig, n_images: int, image_size: int, max_passes: int) -> ScanConfig:
    """The largest search that takes no more than `max_passes`; the confirmation stays as it is.

    In turn fewer images are looked at again, each patch is pasted on fewer images, one image less per cluster and
    round is drawn, and more clusters are dropped per round. What this costs is said by `power.power_statement`.
    The second look is counted along one direction here; once it is known how many there are, `fit_second_look` bounds
    it.

    Args:
        config: resolved settings; unchanged where they fit.
        n_images: readable images.
        image_size: side of the encoder's input, pixels.
        max_passes: budget, encoder passes, without pre-training and classifier.

    Raises:
        ConfigError: even the smallest search would take more.
    """
    assert config.n_flips is not None, "the config is resolved before it is fitted"

    def most(config: ScanConfig) -> int:
        return sum(
            stage.expected if stage.name == "exploit" else stage.most
            for stage in expected_cost(config, n_images, image_size).stages
        )

    smaller, needed = config, most(config)
    for exploit, n_flips, samples, prune in (
        (200, 96, 2, 0.25),
        (100, 96, 2, 0.25),
        (100, 64, 2, 0.25),
        (60, 48, 2, 0.25),
        (60, 48, 2, 0.4),
        (60, 48, 1, 0.25),
        (60, 48, 1, 0.4),
        (40, 32, 1, 0.4),
        (40, 32, 1, 0.6),
        (20, 32, 1, 0.9),
    ):
        if needed <= max_passes:
            break
        smaller = replace(
            config,
            exploit=min(config.exploit, exploit),
            n_flips=min(config.n_flips, n_flips),
            samples=min(config.samples, samples),
            prune=max(config.prune, prune),
        )
        needed = most(smaller)
    if needed > max_passes:
        raise ConfigError(
            f"max_passes={max_passes}: the smallest search of {n_images} images may take {needed}; raise it, or scan "
            "fewer images with --sample"
        )
    return smaller


def fit_second_look(
    config: ScanConfig, n_images: int, image_size: int, n_directions: int, passes_left: int
) -> ScanConfig:
    """The settings with as many images looked at again as leave enough passes for the confirmation.

    Args:
        config: resolved settings, fitted by `fit_budget`; unchanged where they fit.
        n_images: readable images.
        image_size: side of the encoder's input, pixels.
        n_directions: that the rounds elected.
        passes_left: of the budget, after the rounds and the trials.
    """
    allowed = n_images - held_out_count(n_images)
    after = sum(
        stage.most
        for stage in expected_cost(config, n_images, image_size).stages
        if stage.name in ("places", "confirm", "evidence")
    )
    each = _passes_of_a_look(config, image_size, allowed, n_directions)
    return replace(config, exploit=min(config.exploit, max(1, (passes_left - after) // max(each, 1))))
