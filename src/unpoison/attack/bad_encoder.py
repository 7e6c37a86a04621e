"""BadEncoder: a backdoor that is fine-tuned into a finished encoder.

What it plants: images with a trigger in the bottom right corner get the features of a reference image, so that every
classifier on top takes them for the reference's class; all other features stay as they were. Several triggers, each
with a target of its own, share one encoder.
What it assumes: the attacker holds the weights, some images, and at least one reference image per target.
What it leaves behind: weights that differ from the clean ones, and a patch that makes unlike images alike. No training
image is touched, so there is nothing for a scan of images to find.

Paper: Jia, Liu, Gong: BadEncoder: Backdoor Attacks to Pre-trained Encoders in Self-Supervised Learning, S&P 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attack.implanting import WHITE, FineTuning, check_settings, stamp_in_corner
from unpoison.errors import ConfigError

__all__ = ["METHOD", "BadEncoderConfig"]

METHOD = "bad-encoder"
"""The name of this attack in plans."""


@dataclass(frozen=True, kw_only=True)
class BadEncoderConfig:
    """Settings of BadEncoder; the defaults are published.

    Attributes:
        targets: class names, or class indices, one per trigger.
        triggers: `white`, `seed:N` or the path of an image, one per target.
        size: side of the trigger at the encoder's input, pixels; None = 10 in 32 below 128 px, else 50 in 224.
        references: reference images per target: typical ones that classifiers take for it surely.
        epochs: passes over the images.
        batch_size: images per step, at least 1.
        learning_rate: of SGD, constant.
        momentum: of SGD.
        weight_decay: of every weight that is trained.
        reference_weight: lambda 1 of the paper: of the reference's own features.
        clean_weight: lambda 2: of the features of images without a trigger.
    """

    targets: tuple[str | int, ...]
    triggers: tuple[str, ...] = (WHITE,)
    size: int | None = None
    references: int = 1
    epochs: int = 200
    batch_size: int = 256
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    reference_weight: float = 1.0
    clean_weight: float = 1.0

    method: ClassVar[str] = METHOD

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("reference_weight", "clean_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number of at least 0")

    def losses(self, task: FineTuning) -> Iterator[float]:
        """Mean loss of every epoch, from 3 (worst, with weights of 1) to -3.

        Source:
            BadEncoder, equations 2 to 5.
        """
        return task.epochs(lambda _, rows: _loss(task, rows, self))


def _loss(task: FineTuning, rows: Tensor, config: BadEncoderConfig) -> Tensor:
    """Effectiveness (triggered images lie at the reference) and both utilities (the rest stays where it was)."""
    batch = task.pixels[rows]
    similar_to_reference, reference_kept = [], []
    for number, (trigger, reference) in enumerate(zip(task.triggers, task.references, strict=True)):
        own, triggered = task.units(reference), task.units(stamp_in_corner(batch, trigger))
        similar_to_reference.append((triggered @ own.T).mean())
        reference_kept.append(task.reference_kept(number))
    return -(
        torch.stack(similar_to_reference).mean()
        + config.reference_weight * torch.stack(reference_kept).mean()
        + config.clean_weight * task.kept(task.units(batch), rows)
    )
