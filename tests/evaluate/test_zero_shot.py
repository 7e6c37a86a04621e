"""Zero-shot classification against a loop, and the attack's rates on it."""

from __future__ import annotations

import pytest
import torch

from pairs import NAMES, coloured, untrained
from unpoison.attack.plan import Trigger
from unpoison.attack.ssl_backdoor import paste_everywhere
from unpoison.encoders.image_text import class_embeddings
from unpoison.errors import NoVerdictError, ShapeError
from unpoison.evaluate.attack_success import measure
from unpoison.evaluate.zero_shot import evaluate_zero_shot
from unpoison.records import ImageSet

TRIGGER = Trigger(torch.full((3, 4, 4), 255, dtype=torch.uint8), "white", 2, "blue sky", side=6)


def naive(images: ImageSet) -> torch.Tensor:
    pair = untrained()
    prompts, predicted = class_embeddings(pair, NAMES), []
    for row in range(len(images)):
        image = pair.words.images(pair.encoder.features(images.pixels[row : row + 1]))[0]
        predicted.append(max(range(len(NAMES)), key=lambda k, image=image: float(image @ prompts[k])))
    return torch.tensor(predicted)


def test_the_nearest_name_wins() -> None:
    images, labels = coloured(24, 5)
    report = evaluate_zero_shot(untrained(), images, labels, NAMES, triggers=(TRIGGER,), seed=4)
    probe = report.probe("zero-shot")
    assert probe.attacks[0].clean == measure(labels, naive(images), 2, 4)
    assert probe.attacks[0].patched == measure(labels, naive(paste_everywhere(images, TRIGGER, seed=4)), 2, 4)
    assert probe.accuracy == probe.attacks[0].clean.accuracy and probe.attacks[0].side == 6
    assert (report.n_train, report.n_test, report.n_classes) == (0, 24, 4)


def test_what_cannot_be_measured_is_refused() -> None:
    images, labels = coloured(8, 5)
    with pytest.raises(ShapeError, match=r"\(7,\) labels for 8 images"):
        evaluate_zero_shot(untrained(), images, labels[:7], NAMES)
    pair = untrained()
    pair.encoder.network.conv1.weight.data.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(NoVerdictError, match="gives NaN or infinite features"):
        evaluate_zero_shot(pair, images, labels, NAMES)
