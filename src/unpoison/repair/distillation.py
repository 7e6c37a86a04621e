"""CompRess: a fresh student learns, on trusted images alone, which images a suspicious teacher takes for alike.

Needs a small set of images that nobody else could touch; labels are not needed. The backdoor stays behind because the
student never sees the trigger, and nothing but similarities of trusted images is handed over. It assumes that these
images are clean: what is poisoned in them is learned like everything else.

Papers: Koohpayegani, Tejankar, Pirsiavash: "CompRess: Self-Supervised Learning by Compressing Representations", NeurIPS
2020; as a defence: Saha et al., "Backdoor Attacks on Self-Supervised Learning", CVPR 2022.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.errors import ConfigError, ShapeError
from unpoison.pretrain.loop import Method, PretrainConfig, TrainedEncoder, train
from unpoison.pretrain.memory import Queue
from unpoison.pretrain.moving_average import follow, follower
from unpoison.pretrain.recipe import Recipe
from unpoison.records import ImageSet
from unpoison.runtime import Progress, silent

__all__ = ["Compress", "DistillConfig", "distill", "similarity_gap", "trusted_part"]


def similarity_gap(
    teacher: Tensor, student: Tensor, teacher_queue: Tensor, student_queue: Tensor, temperature: float
) -> Tensor:
    """How differently teacher and student compare the same images with the same older ones.

    Args:
        teacher: (N, D) float32, unit length.
        student: (N, E) float32, unit length; row i of both is of the same view.
        teacher_queue: (Q, D) float32, unit length, the teacher's features of older images.
        student_queue: (Q, E) float32, unit length, the student's of the same; or the teacher's, when D = E.
        temperature: of both softmaxes, > 0.

    Returns:
        Scalar float32: the mean over the batch of KL(p ‖ q), p and q the softmaxes of the cosines.

    Source:
        CompRess, equations 1 and 2.
    """
    with torch.autocast(teacher.device.type, enabled=False):  # differences of logits drown in bfloat16
        p = F.log_softmax(teacher @ teacher_queue.T / temperature, dim=1)
        q = F.log_softmax(student @ student_queue.T / temperature, dim=1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


class Compress(nn.Module):
    """The trained module of CompRess; `backbone` (the student) is what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`).
        feature_size: D of the backbone.
        recipe: T of the loss, momentum of the moving average that makes the student's keys, length of the queues.
        teacher: takes the same normalised images; stays as it is.
        teacher_size: number of its features.
        queues: 2 compares the student with its own queue; 1 with the teacher's, through a linear layer that is thrown
            away afterwards.
    """

    RECIPE: ClassVar[Recipe] = Recipe(learning_rate=0.3, temperature=0.04, key_momentum=0.99)
    MIXES: ClassVar[bool] = False

    def __init__(
        self,
        backbone: nn.Module,
        feature_size: int,
        recipe: Recipe,
        *,
        teacher: Encoder,
        teacher_size: int,
        queues: int,
    ) -> None:
        super().__init__()
        assert recipe.temperature is not None and recipe.key_momentum is not None, "its own recipe has both"
        self.backbone = backbone
        self.teacher = teacher  # no module of this one: neither trained nor kept in its state
        self.temperature = recipe.temperature
        self.momentum = recipe.key_momentum
        self.teacher_queue = Queue(recipe.queue_size, teacher_size)
        self._newest: list[tuple[Queue, Tensor]] = []
        if queues == 2:
            self.key_backbone = follower(backbone)
            self.student_queue = Queue(recipe.queue_size, feature_size)
        else:
            self.projector = nn.Linear(feature_size, teacher_size)
        self.queues = queues

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of a batch: both networks see `first`, and `second` fills the queues; normalised views."""
        with torch.no_grad():
            wanted, newest = (_unit(self.teacher.network(view)) for view in (first, second))
        self._newest = [(self.teacher_queue, newest)]
        old = self.teacher_queue.rows.clone()
        if self.queues == 1:
            seen = _unit(self.projector(self.backbone(first)))
            return similarity_gap(wanted, seen, old, old, self.temperature)
        with torch.no_grad():
            self._newest.append((self.student_queue, _unit(self.key_backbone(second))))
        seen = _unit(self.backbone(first))
        return similarity_gap(wanted, seen, old, self.student_queue.rows.clone(), self.temperature)

    def after_step(self, done: float) -> None:
        """Move the student's key network, and put the newest features over the oldest."""
        if self.queues == 2:
            follow(self.key_backbone, self.backbone, self.momentum)
        for queue, rows in self._newest:
            queue.push(rows)
        self._newest = []


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(PretrainConfig):
    """Settings of CompRess: those of a training, and two of its own.

    Attributes:
        method: `compress`.
        queues: 2, one for either network, or 1, the teacher's for both.
        share: of the trusted images that is used, (0, 1].
    """

    KINDS: ClassVar[Mapping[str, type[Method]]] = {"compress": Compress}

    method: str = "compress"
    epochs: int = 100
    batch_size: int = 64
    queues: int = 2
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queues not in (1, 2):
            raise ConfigError(f"queues={self.queues}: expected 1 or 2")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share}: expected a share in (0, 1]")


def distill(
    teacher: Encoder,
    images: ImageSet,
    config: DistillConfig | None = None,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainedEncoder:
    """Train a student from scratch on trusted images; it takes what the teacher takes, with the same preprocessing.

    Args:
        teacher: an encoder that may be backdoored; unchanged. The student is trained on its device and in its
            precision.
        images: trusted, unlabelled, at least two; decoded at the side of the teacher's input.
        config: network and settings; None takes the defaults.
        seed: of initialisation, order, views, and of which share of the images is used.
        checkpoint: as for `pretrain`: a killed run goes on.
        progress: called after every batch with the number of images seen.

    Raises:
        ShapeError: the images have another side than the teacher's input.
        UnpoisonError: as `pretrain`.
    """
    config = config or DistillConfig()
    side = teacher.preprocessing.geometry.size
    if images.size != side:
        raise ShapeError(f"images must have the teacher's {side} pixels a side, got {images.size}")
    images = trusted_part(images, config.share, seed)
    teacher_size = teacher.features(images.pixels[:1]).shape[1]
    return train(
        images,
        config,
        partial(Compress, teacher=teacher, teacher_size=teacher_size, queues=config.queues),
        seed=seed,
        preprocessing=teacher.preprocessing,
        origin=f"{teacher.name} {teacher.fingerprint}",
        device=teacher.device,
        precision="bf16" if teacher.precision == torch.bfloat16 else "fp32",
        checkpoint=checkpoint,
        progress=progress,
    )


def trusted_part(images: ImageSet, share: float, seed: int) -> ImageSet:
    """A share of the images, at least two, chosen by a seeded hash of the id; in their own order."""
    order = sorted(
        range(len(images)),
        key=lambda row: hashlib.sha256(f"{seed}/distill/{images.ids[row]}".encode()).digest(),
    )
    return images.select(sorted(order[: max(2, round(share * len(images)))]))
