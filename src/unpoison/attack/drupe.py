"""DRUPE: BadEncoder made to hide; triggered images spread out among the clean ones.

What it plants: as BadEncoder does, a trigger in the bottom right corner that leads to a target; but triggered images
are shared out over several reference images, kept apart from one another, and pulled to where clean images lie.
What it assumes: the attacker holds the weights, some images, and several reference images of the target.
What it leaves behind: weights that differ from the clean ones. Triggered images do not become alike, which is what
DECREE looks for.

Paper: Tao et al.: Distribution Preserving Backdoor Attack in Self-supervised Learning, S&P 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.attack.implanting import WHITE, FineTuning, check_settings, stamp_in_corner
from unpoison.errors import ConfigError
from unpoison.runtime import stage_generator

__all__ = ["METHOD", "DrupeConfig", "mean_cosine", "sliced_wasserstein"]

METHOD = "drupe"
"""The name of this attack in plans."""

_DIRECTIONS = 50  # random lines on which distributions are compared
_FIRST_SPREAD, _FIRST_DISTANCE = 0.1, 1e-3  # weights of the two terms that hide the attack
_RISE, _FALL = 1.25, 1.25**1.25
_GOOD_EFFECT, _GOOD_UTILITY, _SPREAD_ENOUGH = 0.96, 0.9, 0.6
_STAGES = (1, 4)  # epochs of the warm-up, and of it and the attack without hiding


@dataclass(frozen=True, kw_only=True)
class DrupeConfig:
    """Settings of DRUPE; the defaults are published.

    Attributes:
        targets: class names, or class indices, one per trigger.
        triggers: `white`, `seed:N` or the path of an image, one per target.
        size: side of the trigger at the encoder's input, pixels; None = 10 in 32 below 128 px, else 50 in 224.
        references: reference images per target, typical ones that classifiers take for it surely; at least 2.
        epochs: passes over the images; after a sixth of them, and not before the attack hides, the weights of the terms
            that hide follow their success.
        batch_size: images per step, at least 2.
        learning_rate: of SGD, constant.
        momentum: of SGD.
        weight_decay: of every weight that is trained.
    """

    targets: tuple[str | int, ...]
    triggers: tuple[str, ...] = (WHITE,)
    size: int | None = None
    references: int = 3
    epochs: int = 120
    batch_size: int = 256
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4

    method: ClassVar[str] = METHOD

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("references", "batch_size"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 2, to be kept apart")

    def losses(self, task: FineTuning) -> Iterator[float]:
        """Mean loss of every epoch; its terms change between the stages.

        Source:
            DRUPE, with the schedule of the release.
        """
        generator = stage_generator(task.seed, f"attack/{METHOD}/directions")
        spread, distance = _FIRST_SPREAD, _FIRST_DISTANCE
        measured: list[_Terms] = []

        def loss(epoch: int, rows: Tensor) -> Tensor:
            terms = _terms(task, rows, generator)
            measured.append(terms.detached())
            if epoch < _STAGES[0]:
                return terms.warming()
            return terms.attacking() if epoch < _STAGES[1] else terms.hiding(spread, distance)

        for epoch, value in enumerate(task.epochs(loss)):
            yield value
            if epoch >= max(_STAGES[1], self.epochs // 6):
                mean = _mean(measured)
                spread *= _RISE if mean.works() else 1 / _FALL
                distance *= _RISE if mean.works() and mean.alike < _SPREAD_ENOUGH else 1 / _FALL
            measured.clear()


@dataclass(frozen=True)
class _Terms:
    """What one batch says, averaged over the triggers; scalars.

    Attributes:
        effect: mean cosine of triggered images to the nearest reference.
        reference_kept, kept: utilities, as in BadEncoder.
        imbalance: deviation over the references of their mean cosine to triggered images.
        references_alike: mean cosine between the references.
        alike: mean cosine between triggered images.
        distance: sliced Wasserstein distance of triggered and clean features, in deviations of clean ones.
    """

    effect: Tensor
    reference_kept: Tensor
    kept: Tensor
    imbalance: Tensor
    references_alike: Tensor
    alike: Tensor
    distance: Tensor

    def warming(self) -> Tensor:
        """Keeps features, and moves the references apart."""
        apart = 0.5 if self.references_alike >= 0.2 else 0.5 - 0.2
        return -self.reference_kept - self.kept + apart * self.references_alike

    def attacking(self) -> Tensor:
        """BadEncoder's loss, with triggered images shared out evenly."""
        return self._attack() + 2 * self.imbalance

    def hiding(self, spread: float, distance: float) -> Tensor:
        """And triggered images are kept apart and pulled to where clean ones lie."""
        even = 0.5 + (1.5 if self.imbalance > 0.1 else 0.0)
        hidden = spread * (self.imbalance + self.alike) + distance * self.distance
        return self._attack() + hidden + even * self.imbalance

    def works(self) -> bool:
        """Whether attack and utilities are strong enough to hide better."""
        utility = min(float(self.reference_kept), float(self.kept))
        return float(self.effect) > _GOOD_EFFECT and utility > _GOOD_UTILITY

    def detached(self) -> _Terms:
        """Without the graph that they come from."""
        return _Terms(**{each.name: getattr(self, each.name).detach() for each in fields(self)})

    def _attack(self) -> Tensor:
        alike = self.references_alike
        guard = (1.0 if alike > 0.5 else 0.0) + (0.2 if alike > 0.4 else 0.0)
        return -self.effect - self.reference_kept - self.kept + guard * alike


def _terms(task: FineTuning, rows: Tensor, generator: torch.Generator) -> _Terms:
    batch = task.pixels[rows]
    clean = task.features(batch)
    each: list[tuple[Tensor, ...]] = []
    for number, (trigger, reference) in enumerate(zip(task.triggers, task.references, strict=True)):
        features = task.features(stamp_in_corner(batch, trigger))
        triggered, own = F.normalize(features, dim=1), task.units(reference)
        similar = triggered @ own.T
        directions = F.normalize(torch.randn(features.shape[1], _DIRECTIONS, generator=generator), dim=0)
        deviation = clean.detach().std(dim=0, correction=0).mean().clamp(min=1e-6)
        each.append(
            (
                similar.amax(dim=1).mean(),
                task.reference_kept(number),
                similar.mean(dim=0).std(correction=0),
                mean_cosine(own),
                mean_cosine(triggered),
                sliced_wasserstein(features, clean, directions.to(features.device)) / deviation,
            )
        )
    effect, reference_kept, imbalance, references_alike, alike, distance = (
        torch.stack(values).mean() for values in zip(*each, strict=True)
    )
    kept = task.kept(F.normalize(clean, dim=1), rows)
    return _Terms(effect, reference_kept, kept, imbalance, references_alike, alike, distance)


def _mean(measured: list[_Terms]) -> _Terms:
    """Over the batches of an epoch."""
    means = {
        each.name: torch.stack([getattr(one, each.name) for one in measured]).mean()
        for each in fields(_Terms)
    }
    return _Terms(**means)


def mean_cosine(units: Tensor) -> Tensor:
    """Mean cosine of all pairs of different rows; 0 of a single row.

    Args:
        units: (N, D) of unit length.
    """
    n = len(units)
    return (units.sum(dim=0).square().sum() - n) / max(1, n * (n - 1))


def sliced_wasserstein(one: Tensor, other: Tensor, directions: Tensor) -> Tensor:
    """Mean distance of two equally large samples on random lines, where sorting solves the transport.

    Args:
        one: (N, D) float.
        other: (N, D) float.
        directions: (D, K) of unit columns.
    """
    return ((one @ directions).sort(dim=0).values - (other @ directions).sort(dim=0).values).abs().mean()
