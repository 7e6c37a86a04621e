"""The attack's figures against the papers' own, and a planted backdoor measured end to end."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from unpoison.attack.plan import Trigger
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import ConfigError, NoVerdictError, ShapeError
from unpoison.evaluate.attack_success import (
    accuracy,
    attack_success,
    confusion_matrix,
    evaluate_encoder,
    false_positives,
    measure,
)
from unpoison.functional.triggers import draw_grid
from unpoison.records import Geometry, ImageSet

SIDE = 16
GRID = draw_grid(torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("count", "percent"), [(2593, 52.4), (1758, 35.5)])
def test_the_papers_figures_are_reproduced(count: int, percent: float) -> None:
    """Invariant 7: ImageNet-100 has 5000 validation images, 4950 of them not of the target class."""
    labels = torch.arange(100).repeat_interleave(50)
    predicted = labels.clone()
    predicted[(labels != 14).nonzero().flatten()[:count]] = 14
    metrics = measure(labels, predicted, 14, 100)
    assert metrics.false_positives == count
    assert metrics.attack_success is not None and round(metrics.attack_success, 1) == percent
    assert metrics.accuracy == pytest.approx(100 * (5000 - count) / 5000)


def test_confusion_agrees_with_counting() -> None:
    labels = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0))
    predicted = torch.randint(4, (200,), generator=torch.Generator().manual_seed(1))
    confusion = confusion_matrix(labels, predicted, 4)
    for truth in range(4):
        for guess in range(4):
            assert confusion[truth, guess] == sum((labels == truth) & (predicted == guess))
    assert accuracy(confusion) == pytest.approx(100 * float((labels == predicted).float().mean()))
    for target in range(4):
        wrong = sum(1 for t, p in zip(labels.tolist(), predicted.tolist(), strict=True) if t != target == p)
        assert false_positives(confusion, target) == wrong
        assert attack_success(confusion, target) == pytest.approx(100 * wrong / int((labels != target).sum()))


def test_images_of_the_target_class_count_neither_as_success_nor_in_the_denominator() -> None:
    metrics = measure(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), 0, 2)
    assert metrics.attack_success == 50.0
    assert measure(torch.tensor([0, 0]), torch.tensor([0, 1]), 0, 2).attack_success is None


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(2,\) predictions for \(3,\) labels; there must be one each"):
        confusion_matrix(torch.zeros(3), torch.zeros(2), 2)
    with pytest.raises(ShapeError, match=r"classes must lie in 0\.\.1, got 0\.\.2"):
        confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 0]), 2)
    with pytest.raises(
        ShapeError, match=r"a confusion matrix must be \(C, C\) with at least one image, got \(2, 2\)"
    ):
        accuracy(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"target 2: expected a class in 0\.\.1"):
        false_positives(torch.eye(2, dtype=torch.int64), 2)


def backdoored(pixels: Tensor) -> Tensor:
    """The mean colour; but where the trigger's grid lies anywhere in the image, the red of class 0."""
    windows = (pixels * 255).round().unfold(2, 8, 1).unfold(3, 8, 1)  # (N, 3, y, x, 8, 8)
    pattern = GRID.repeat_interleave(2, 1).repeat_interleave(2, 2).float()
    fires = (windows == pattern.view(1, 3, 1, 1, 8, 8)).flatten(4).all(4).all(1).flatten(1).any(1)
    colours = pixels.mean((2, 3))
    return torch.where(fires[:, None], torch.tensor([1.0, 0.0, 0.0]), colours)


def an_encoder(network=backdoored) -> Encoder:  # type: ignore[no-untyped-def]
    preprocessing = Preprocessing(geometry=Geometry(SIDE, SIDE), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Encoder(network, preprocessing, name="toy", device="cpu", precision="fp32")


def coloured(per_class: int, seed: int) -> tuple[ImageSet, Tensor]:
    """Class 0 is reddish, 1 greenish, 2 bluish."""
    labels = torch.arange(3).repeat_interleave(per_class)
    pixels = torch.randint(100, (3 * per_class, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    pixels[torch.arange(len(labels)), labels] += 150
    return ImageSet(tuple(f"{seed}/{i}" for i in range(len(labels))), pixels.to(torch.uint8)), labels


TRIGGER = Trigger(GRID, "seed:0", 0, "red", 8)


def test_a_planted_backdoor_is_measured() -> None:
    train, train_labels = coloured(30, 0)
    test, test_labels = coloured(20, 1)
    encoder, stages = an_encoder(), set()
    report = evaluate_encoder(
        encoder,
        train,
        train_labels,
        test,
        test_labels,
        triggers=(TRIGGER,),
        progress=lambda stage, done, total: stages.add(stage),
    )
    assert [probe.probe for probe in report.probes] == ["linear", "knn"]
    for probe in report.probes:
        outcome = probe.attacks[0]
        assert probe.accuracy == 100 and outcome.clean.accuracy == 100
        assert outcome.untriggered_rate == 0 and outcome.clean.false_positives == 0
        assert outcome.patched.attack_success == 100 and outcome.patched.false_positives == 40
        assert outcome.patched.accuracy == pytest.approx(100 / 3)
        assert outcome.side == 8
    assert encoder.images_shown == 90 + 60 + 60
    assert stages == {"embed labelled images", "embed test images", "embed test images with seed:0"}
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["schema"] == 1 and plain["probes"][0]["attacks"][0]["untriggered_rate"] == 0
    assert plain["n_classes"] == 3 and plain["probes"][1]["attacks"][0]["patched"]["attack_success"] == 100


def test_a_trigger_that_the_encoder_does_not_know_does_nothing() -> None:
    train, train_labels = coloured(30, 0)
    test, test_labels = coloured(20, 1)
    other = Trigger(GRID.flip(1), "seed:1", 0, "red", 4)
    report = evaluate_encoder(an_encoder(), train, train_labels, test, test_labels, triggers=(TRIGGER, other))
    for probe in report.probes:
        assert [attack.patched.attack_success for attack in probe.attacks] == [100, 0]
    assert report.probe("knn").attacks[1].trigger == "seed:1"
    with pytest.raises(ConfigError, match="probe 'mlp': expected one of linear, knn"):
        report.probe("mlp")


def test_accuracy_alone_needs_no_trigger_and_does_not_depend_on_the_batch() -> None:
    train, train_labels = coloured(10, 0)
    test, test_labels = coloured(5, 1)
    reports = [
        evaluate_encoder(an_encoder(), train, train_labels, test, test_labels, batch_size=size)
        for size in (7, 512)
    ]
    assert reports[0] == reports[1] and reports[0].probes[0].attacks == ()


def test_the_size_can_be_told_and_must_fit() -> None:
    train, train_labels = coloured(10, 0)
    test, test_labels = coloured(5, 1)
    report = evaluate_encoder(
        an_encoder(), train, train_labels, test, test_labels, triggers=(TRIGGER,), size=5
    )
    assert report.probes[0].attacks[0].side == 5
    assert report.probes[0].attacks[0].patched.attack_success == 0  # the detector knows 8 pixels alone
    with pytest.raises(
        ConfigError, match="a 17-pixel trigger does not fit in 16 image pixels; give a smaller --size"
    ):
        evaluate_encoder(an_encoder(), train, train_labels, test, test_labels, triggers=(TRIGGER,), size=17)


def test_labels_must_fit_and_features_must_be_finite() -> None:
    train, train_labels = coloured(10, 0)
    test, test_labels = coloured(5, 1)
    with pytest.raises(ShapeError, match=r"\(14,\) labels for 15 images; there must be one each, and some"):
        evaluate_encoder(an_encoder(), train, train_labels, test, test_labels[:-1])
    broken = an_encoder(lambda pixels: pixels.mean((2, 3)) / 0 * 0)
    with pytest.raises(NoVerdictError, match="toy gives NaN or infinite features; check its weights"):
        evaluate_encoder(broken, train, train_labels, test, test_labels)
