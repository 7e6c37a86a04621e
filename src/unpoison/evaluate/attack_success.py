"""Does the backdoor work? Accuracy on clean and on triggered images, false positives, and the attack's success.

All rates here are percentages, because the papers' tables are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unpoison.attack.plan import Trigger, default_side
from unpoison.attack.ssl_backdoor import paste_everywhere
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import raw_features
from unpoison.errors import ConfigError, NoVerdictError, ShapeError
from unpoison.evaluate.probes import LinearProbeConfig, fit_linear_probe, knn
from unpoison.records import ImageSet
from unpoison.runtime import Progress, silent, stage_generator

__all__ = [
    "AttackOutcome",
    "EncoderReport",
    "Metrics",
    "ProbeReport",
    "accuracy",
    "attack_success",
    "confusion_matrix",
    "evaluate_encoder",
    "false_positives",
    "measure",
]

REPORT_SCHEMA = 1


@dataclass(frozen=True)
class Metrics:
    """One set of predictions, seen from one target class.

    Attributes:
        accuracy: ACC, % of all images, those of the target class included.
        false_positives: FP, images of other classes predicted as the target; a count.
        attack_success: FP in % of the images of other classes; on images without trigger it is the target's
            untriggered rate. None if there are no such images.
    """

    accuracy: float
    false_positives: int
    attack_success: float | None


@dataclass(frozen=True)
class AttackOutcome:
    """One (trigger, target) pair under one probe.

    Attributes:
        trigger: its name.
        target: index of the target class.
        target_name: its name.
        side: width of the trigger at the encoder's input, pixels.
        clean: on images without trigger; `clean.attack_success` is the rate that the attack must beat.
        patched: the same images, all of them with the trigger.
    """

    trigger: str
    target: int
    target_name: str
    side: int
    clean: Metrics
    patched: Metrics

    @property
    def untriggered_rate(self) -> float | None:
        """% of clean images of other classes that are predicted as the target anyway."""
        return self.clean.attack_success


@dataclass(frozen=True)
class ProbeReport:
    """What one probe says.

    Attributes:
        probe: `linear` or `knn`.
        accuracy: ACC on clean images, %.
        attacks: one per trigger.
    """

    probe: str
    accuracy: float
    attacks: tuple[AttackOutcome, ...]


@dataclass(frozen=True)
class EncoderReport:
    """How good an encoder is, and how well attacks on it work; `probes` holds `linear` and `knn`, in this order."""

    encoder: str
    n_train: int
    n_test: int
    n_classes: int
    seed: int
    probes: tuple[ProbeReport, ...]

    def probe(self, name: str) -> ProbeReport:
        """The report of `linear` or `knn`."""
        found = {probe.probe: probe for probe in self.probes}
        if name not in found:
            raise ConfigError(f"probe {name!r}: expected one of {', '.join(found)}")
        return found[name]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; every attack also has its `untriggered_rate`."""
        value = {"schema": REPORT_SCHEMA, **asdict(self)}
        for probe, plain in zip(self.probes, value["probes"], strict=True):
            for attack, entry in zip(probe.attacks, plain["attacks"], strict=True):
                entry["untriggered_rate"] = attack.untriggered_rate
        return value


def confusion_matrix(labels: Tensor, predicted: Tensor, n_classes: int) -> Tensor:
    """Counts, rows = truth, columns = prediction.

    Args:
        labels: (N,) integers in 0..n_classes - 1.
        predicted: (N,) likewise.
        n_classes: C.

    Returns:
        (C, C) int64.

    Raises:
        ShapeError: the two differ in length, or hold another class.

    >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    if labels.ndim != 1 or labels.shape != predicted.shape:
        raise ShapeError(
            f"{tuple(predicted.shape)} predictions for {tuple(labels.shape)} labels; there must be one each"
        )
    both = torch.stack((labels, predicted)).long()
    if both.numel() and not 0 <= int(both.min()) <= int(both.max()) < n_classes:
        raise ShapeError(f"classes must lie in 0..{n_classes - 1}, got {int(both.min())}..{int(both.max())}")
    counts = torch.bincount(both[0] * n_classes + both[1], minlength=n_classes * n_classes)
    return counts.view(n_classes, n_classes)


def accuracy(confusion: Tensor) -> float:
    """ACC = trace(C) / sum(C), in %, over all images.

    Args:
        confusion: (C, C) int64 of at least one image.
    """
    _check_confusion(confusion)
    return 100 * int(confusion.trace()) / int(confusion.sum())


def false_positives(confusion: Tensor, target: int) -> int:
    """FP = images of other classes that are predicted as the target; a count.

    Args:
        confusion: (C, C) int64.
        target: index of the target class.
    """
    _check_confusion(confusion)
    if not 0 <= target < len(confusion):
        raise ConfigError(f"target {target}: expected a class in 0..{len(confusion) - 1}")
    return int(confusion[:, target].sum() - confusion[target, target])


def attack_success(confusion: Tensor, target: int) -> float | None:
    """ASR = 100 · FP / images of other classes; None if all images are of the target class.

    Images of the target class are left out: predicting them as the target is no success of the attack. (BadEncoder,
    DRUPE and CTRL divide by all images instead.)

    Args:
        confusion: (C, C) int64.
        target: index of the target class.
    """
    others = int(confusion.sum() - confusion[target].sum())
    return 100 * false_positives(confusion, target) / others if others else None


def measure(labels: Tensor, predicted: Tensor, target: int, n_classes: int) -> Metrics:
    """All three figures of one set of predictions.

    Args:
        labels: (N,) integers in 0..n_classes - 1.
        predicted: (N,) likewise.
        target: index of the target class.
        n_classes: C.
    """
    confusion = confusion_matrix(labels, predicted, n_classes)
    return Metrics(accuracy(confusion), false_positives(confusion, target), attack_success(confusion, target))


def evaluate_encoder(
    encoder: Encoder,
    train: ImageSet,
    train_labels: Tensor,
    test: ImageSet,
    test_labels: Tensor,
    *,
    triggers: Sequence[Trigger] = (),
    n_classes: int | None = None,
    size: int | None = None,
    seed: int = 0,
    batch_size: int = 512,
    neighbors: int = 200,
    probe: LinearProbeConfig | None = None,
    progress: Progress = silent,
) -> EncoderReport:
    """Fit both probes on clean labelled images, then show them test images without and with each trigger.

    Every image is embedded once per trigger and once without; both probes share the features.

    Args:
        encoder: any encoder.
        train: clean images; poison among them would be measured as if it were clean.
        train_labels: (N,) integers.
        test: images that `train` does not hold.
        test_labels: (M,) integers, numbered like `train_labels`.
        triggers: each with its target numbered like the labels (see `Plan.for_classes`); none = accuracy only.
        n_classes: None = one more than the largest label.
        size: width of the triggers at the encoder's input, pixels; None = each trigger's own, or 50/224 of the side.
        seed: of the linear probe, and of where triggers lie: between 10 and 90 % of the sides.
        batch_size: images per pass.
        neighbors: voters of the kNN probe.
        probe: settings of the linear probe.
        progress: called after every batch.

    Raises:
        ShapeError: not one label per image.
        ConfigError: a trigger does not fit in the images, or its target is no class.
        NoVerdictError: the features are not finite.
    """
    for images, labels in ((train, train_labels), (test, test_labels)):
        if labels.shape != (len(images),) or not len(images):
            raise ShapeError(
                f"{tuple(labels.shape)} labels for {len(images)} images; there must be one each, and some"
            )
    if n_classes is None:
        n_classes = int(max(train_labels.max(), test_labels.max())) + 1

    def embed(images: ImageSet, stage: str) -> Tensor:
        features = raw_features(encoder, images.pixels, batch_size=batch_size, stage=stage, progress=progress)
        if not bool(torch.isfinite(features).all()):
            raise NoVerdictError(
                f"{encoder.name} gives NaN or infinite features; check its weights and preprocessing"
            )
        return features

    known = embed(train, "embed labelled images")
    clean = embed(test, "embed test images")
    patched = [
        embed(paste_everywhere(test, trigger, seed=seed, side=size), f"embed test images with {trigger.name}")
        for trigger in triggers
    ]
    linear = fit_linear_probe(
        known,
        train_labels,
        n_classes=n_classes,
        config=probe,
        generator=stage_generator(seed, "evaluate/linear probe"),
    )
    predictors: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": linear.predict,
        "knn": lambda queries: knn(known, train_labels, queries, n_classes=n_classes, neighbors=neighbors),
    }
    reports = []
    for name, predict in predictors.items():
        unpatched = predict(clean)
        outcomes = tuple(
            AttackOutcome(
                trigger=trigger.name,
                target=trigger.target,
                target_name=trigger.target_name,
                side=test.size if trigger.is_global else size or trigger.side or default_side(test.size),
                clean=measure(test_labels, unpatched, trigger.target, n_classes),
                patched=measure(test_labels, predict(features), trigger.target, n_classes),
            )
            for trigger, features in zip(triggers, patched, strict=True)
        )
        reports.append(
            ProbeReport(name, accuracy(confusion_matrix(test_labels, unpatched, n_classes)), outcomes)
        )
    return EncoderReport(encoder.name, len(train), len(test), n_classes, seed, tuple(reports))


def _check_confusion(confusion: Tensor) -> None:
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or not int(confusion.sum()):
        raise ShapeError(
            f"a confusion matrix must be (C, C) with at least one image, got {tuple(confusion.shape)}"
        )
