"""How well does an image-text model name classes that it was never taught, and how well does an attack on it work?

An image gets the class whose name, in the sentences of `data.captions`, has the nearest embedding. The rates are
those of `evaluate.attack_success`, and defined there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unpoison.attack.plan import Trigger, default_side
from unpoison.attack.ssl_backdoor import paste_everywhere
from unpoison.encoders.extract import raw_features
from unpoison.encoders.image_text import ImageText, class_embeddings
from unpoison.errors import NoVerdictError, ShapeError
from unpoison.evaluate.attack_success import (
    AttackOutcome,
    EncoderReport,
    ProbeReport,
    accuracy,
    confusion_matrix,
    measure,
)
from unpoison.records import ImageSet
from unpoison.runtime import Progress, silent

__all__ = ["evaluate_zero_shot"]


def evaluate_zero_shot(
    pair: ImageText,
    test: ImageSet,
    test_labels: Tensor,
    class_names: Sequence[str],
    *,
    triggers: Sequence[Trigger] = (),
    size: int | None = None,
    seed: int = 0,
    batch_size: int = 512,
    progress: Progress = silent,
) -> EncoderReport:
    """Classify test images by the names of their classes, without and with each trigger.

    Args:
        pair: both towers.
        test: decoded at the side of the image tower's input.
        test_labels: (M,) integers into `class_names`.
        class_names: what is told apart; words that no caption had are unknown to the text tower.
        triggers: each with its target numbered like the labels (see `Plan.for_classes`); none = accuracy only.
        size: width of the triggers at the encoder's input, pixels; None = each trigger's own, or 50/224 of the side.
        seed: of where triggers lie.
        batch_size: images per pass.
        progress: called after every batch.

    Returns:
        A report with the one probe `zero-shot`; no image was learned from.

    Raises:
        ShapeError: not one label per image, or a label without a name.
        ConfigError: a trigger does not fit in the images.
        NoVerdictError: the features are not finite.
    """
    if test_labels.shape != (len(test),) or not len(test):
        raise ShapeError(
            f"{tuple(test_labels.shape)} labels for {len(test)} images; there must be one each, and some"
        )
    prompts = class_embeddings(pair, class_names)

    def predict(images: ImageSet, stage: str) -> Tensor:
        features = raw_features(
            pair.encoder, images.pixels, batch_size=batch_size, stage=stage, progress=progress
        )
        if not bool(torch.isfinite(features).all()):
            raise NoVerdictError(
                f"{pair.encoder.name} gives NaN or infinite features; check its weights and preprocessing"
            )
        with torch.inference_mode():
            return (pair.words.images(features.to(pair.encoder.device)) @ prompts.T).argmax(dim=1).cpu()

    n_classes = len(class_names)
    clean = predict(test, "embed test images")
    outcomes = []
    for trigger in triggers:
        patched = paste_everywhere(test, trigger, seed=seed, side=size)
        predicted = predict(patched, f"embed test images with {trigger.name}")
        outcomes.append(
            AttackOutcome(
                trigger=trigger.name,
                target=trigger.target,
                target_name=trigger.target_name,
                side=test.size if trigger.is_global else size or trigger.side or default_side(test.size),
                clean=measure(test_labels, clean, trigger.target, n_classes),
                patched=measure(test_labels, predicted, trigger.target, n_classes),
            )
        )
    correct = accuracy(confusion_matrix(test_labels, clean, n_classes))
    probe = ProbeReport("zero-shot", correct, tuple(outcomes))
    return EncoderReport(pair.encoder.name, 0, len(test), n_classes, seed, (probe,))
