"""CLIP: images and their captions attract, all other pairs of the batch repel; here with a small text tower.

What it needs: a caption per image, from a file or made from class names. What it gives: an encoder like any other, and
what compares it with words, so that classes can be told apart by their names alone.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.data.captions import Vocabulary
from unpoison.data.views import ViewConfig
from unpoison.encoders.encoder import Preprocessing
from unpoison.encoders.image_text import TextConfig, Words
from unpoison.errors import ShapeError
from unpoison.pretrain.loop import Method, PretrainConfig, TrainedEncoder, train
from unpoison.pretrain.recipe import Recipe
from unpoison.records import ImageSet
from unpoison.runtime import Progress, silent

__all__ = ["Clip", "ClipConfig", "TrainedPair", "pair_loss", "pretrain_clip", "train_pair"]

_LARGEST_SCALE = math.log(100)  # the paper's bound of the learned temperature


def pair_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of finding each image's text among all of the batch, and each text's image; their mean.

    Args:
        images: (N, E) float32, unit length.
        texts: (N, E) float32, unit length; row i of both belongs together.
        scale: scalar, 1 / temperature.

    Returns:
        Scalar float32.

    Source:
        CLIP, figure 3.
    """
    with torch.autocast(images.device.type, enabled=False):  # differences of logits drown in bfloat16
        logits = scale.float() * images.float() @ texts.float().T
    own = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class Clip(nn.Module):
    """The trained module of CLIP; `backbone` and `words` are what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`).
        feature_size: D of the backbone.
        recipe: temperature at the start.
        n_words: numbers that the vocabulary gives out.
        text: sizes of the text tower.
    """

    RECIPE: ClassVar[Recipe] = Recipe(
        optimiser="adamw", learning_rate=1e-3, momentum=0.9, weight_decay=0.1, temperature=0.07
    )
    MIXES: ClassVar[bool] = False

    def __init__(
        self, backbone: nn.Module, feature_size: int, recipe: Recipe, *, n_words: int, text: TextConfig
    ) -> None:
        super().__init__()
        assert recipe.temperature is not None, "CLIP's own recipe has it"
        self.backbone = backbone
        self.words = Words(feature_size, n_words, text, recipe.temperature)

    def forward(self, first: Tensor, second: Tensor, captions: Tensor) -> Tensor:
        """The loss of a batch: (N, 3, S, S) normalised views, (N, 1, L) int64 captions; `second` is not needed."""
        images = self.words.images(self.backbone(first))
        return pair_loss(images, self.words.texts(captions[:, 0]), self.words.log_scale.exp())

    def after_step(self, done: float) -> None:
        """Keep the learned temperature above a hundredth."""
        with torch.no_grad():
            self.words.log_scale.clamp_(max=_LARGEST_SCALE)


def _plain_views() -> ViewConfig:
    return ViewConfig(crop=0.8, flip=False, jitter=(0, 0, 0, 0))


@dataclass(frozen=True, kw_only=True)
class ClipConfig(PretrainConfig):
    """Settings of CLIP: those of a training, and the size of the text tower.

    Attributes:
        method: `clip`.
        views: cropped only, as in the paper; what a caption says must stay true.
        text: see `encoders.image_text.TextConfig`.
    """

    KINDS: ClassVar[Mapping[str, type[Method]]] = {"clip": Clip}

    method: str = "clip"
    views: ViewConfig = field(default_factory=_plain_views)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass(frozen=True, eq=False)
class TrainedPair:
    """What training on pairs gives.

    Attributes:
        trained: the image tower, as any pre-training gives it.
        words: what compares it with texts, in evaluation mode.
        vocabulary: what the numbers of the text tower mean.
    """

    trained: TrainedEncoder
    words: Words
    vocabulary: Vocabulary


def pretrain_clip(
    images: ImageSet,
    captions: Sequence[str],
    config: ClipConfig | None = None,
    *,
    seed: int,
    device: str = "auto",
    precision: str = "auto",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainedPair:
    """Train both towers on images and their captions.

    Args:
        images: at least two.
        captions: one per image, in their order.
        config: method and settings; None takes the defaults.
        seed: of initialisation, order and views.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.
        checkpoint: as for `pretrain`: a killed run goes on.
        progress: called after every batch with the number of images seen.

    Raises:
        ShapeError: not one caption per image.
        DataError: a caption has no word.
        UnpoisonError: as `pretrain`.
    """
    config = config or ClipConfig()
    vocabulary = Vocabulary.of(captions)

    def build(backbone: nn.Module, feature_size: int, recipe: Recipe) -> Clip:
        return Clip(backbone, feature_size, recipe, n_words=len(vocabulary), text=config.text)

    return train_pair(
        images,
        (captions,),
        vocabulary,
        config,
        build,
        length=config.text.length,
        seed=seed,
        device=device,
        precision=precision,
        checkpoint=checkpoint,
        progress=progress,
    )


def train_pair(
    images: ImageSet,
    captions: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    config: PretrainConfig,
    build: Callable[[nn.Module, int, Recipe], Clip],
    *,
    length: int,
    seed: int,
    preprocessing: Preprocessing | None = None,
    origin: str = "",
    device: str | torch.device = "auto",
    precision: str = "auto",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainedPair:
    """The one training loop on images with captions; everything else as for `pretrain_clip`.

    Args:
        images: see `pretrain_clip`.
        captions: one or several sets, each with a caption per image; the module is given all of them.
        vocabulary: of the text tower.
        config: of the loop.
        build: makes the module.
        length: words of a caption that count.
        seed: see `pretrain_clip`.
        preprocessing: as for `pretrain.loop.train`.
        origin: likewise.
        device: see `pretrain_clip`, as for the rest.
        precision: likewise.
        checkpoint: likewise.
        progress: likewise.
    """
    for each in captions:
        if len(each) != len(images):
            raise ShapeError(f"{len(each)} captions for {len(images)} images; there must be one each")
    numbers = torch.stack([vocabulary.encode(each, length) for each in captions], dim=1)
    made: list[Clip] = []

    def kind(backbone: nn.Module, feature_size: int, recipe: Recipe) -> Clip:
        made.append(build(backbone, feature_size, recipe))
        return made[0]

    texts = hashlib.sha256(repr((vocabulary.words, tuple(map(tuple, captions)))).encode()).hexdigest()
    trained = train(
        images,
        config,
        kind,
        companions=numbers,
        seed=seed,
        preprocessing=preprocessing,
        origin=f"{origin} captions {texts}",
        device=device,
        precision=precision,
        checkpoint=checkpoint,
        progress=progress,
    )
    return TrainedPair(trained, made[0].words.eval().requires_grad_(False), vocabulary)
