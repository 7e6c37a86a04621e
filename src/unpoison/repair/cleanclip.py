"""CleanCLIP: on clean pairs, each tower also learns from itself, which loosens the tie between a trigger and a word.

Needs both towers and a set of clean images with captions. Beside CLIP's own loss, two views of one image attract, and
so do two wordings of one caption: features come to depend on what an image shows, and the short cut from trigger to
text is no longer needed. It assumes that the pairs are clean; a trigger that survives the views is not unlearned.

Paper: Bansal et al., "CleanCLIP: Mitigating Data Poisoning Attacks in Multimodal Contrastive Learning", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from unpoison.data.captions import reword
from unpoison.data.views import ViewConfig
from unpoison.encoders.image_text import ImageText
from unpoison.errors import ConfigError, ShapeError
from unpoison.pretrain.clip import Clip, ClipConfig, TrainedPair, pair_loss, train_pair
from unpoison.pretrain.loop import Method
from unpoison.pretrain.recipe import Recipe
from unpoison.records import ImageSet
from unpoison.runtime import Progress, silent, stage_generator

__all__ = ["CleanClip", "CleanClipConfig", "cleanclip"]


class CleanClip(Clip):
    """The trained module: CLIP with self-supervision within each modality.

    Args:
        backbone: likewise.
        feature_size: likewise.
        recipe: likewise.
        pair: where the weights start.
        weight: of the self-supervision beside CLIP's loss.
    """

    RECIPE: ClassVar[Recipe] = replace(Clip.RECIPE, learning_rate=1e-2, warmup_epochs=0.5)

    def __init__(
        self, backbone: nn.Module, feature_size: int, recipe: Recipe, *, pair: ImageText, weight: float
    ) -> None:
        super().__init__(backbone, feature_size, recipe, n_words=len(pair.vocabulary), text=pair.words.config)
        assert isinstance(pair.encoder.network, nn.Module), "cleanclip checks it"
        self.backbone.load_state_dict(pair.encoder.network.state_dict())
        self.words.load_state_dict(pair.words.state_dict())
        self.weight = weight

    def forward(self, first: Tensor, second: Tensor, captions: Tensor) -> Tensor:
        """The loss of a batch: plain and strong views, and (N, 2, L) int64: captions and other wordings of them."""
        scale = self.words.log_scale.exp()
        image, other_image = (self.words.images(self.backbone(view)) for view in (first, second))
        text, other_text = (self.words.texts(captions[:, k]) for k in (0, 1))
        within = (pair_loss(image, other_image, scale) + pair_loss(text, other_text, scale)) / 2
        return pair_loss(image, text, scale) + self.weight * within


@dataclass(frozen=True, kw_only=True)
class CleanClipConfig(ClipConfig):
    """Settings of CleanCLIP; network and text tower are those that are repaired, whatever is said here.

    Attributes:
        method: `cleanclip`.
        second_views: of the view that an image is compared with.
        weight: of the self-supervision beside CLIP's loss; published as 1, which left a quarter of the attack where 4
            left nothing that the clean-trained control has not, for two points of accuracy (benchmarks/clip.py).
    """

    KINDS: ClassVar[Mapping[str, type[Method]]] = {"cleanclip": CleanClip}

    method: str = "cleanclip"
    epochs: int = 10
    batch_size: int = 64  # clean pairs are few; larger batches would be few steps
    second_views: ViewConfig | None = field(default_factory=ViewConfig)
    weight: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight >= 0:
            raise ConfigError(f"weight={self.weight}: expected a number of at least 0")


def cleanclip(
    pair: ImageText,
    images: ImageSet,
    captions: Sequence[str],
    config: CleanClipConfig | None = None,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainedPair:
    """Fine-tune both towers on clean pairs.

    Args:
        pair: perhaps backdoored; unchanged. Trained on its device and in its precision.
        images: clean, at the side of the image tower's input.
        captions: one per image, in their order.
        config: settings; None takes the defaults.
        seed: of order, views and wordings.
        checkpoint: as for `pretrain`: a killed run goes on.
        progress: called after every batch with the number of images seen.

    Raises:
        ShapeError: images of another side, or not one caption per image.
        UnpoisonError: as `pretrain`.
    """
    side = pair.encoder.preprocessing.geometry.size
    if images.size != side:
        raise ShapeError(f"images must have the image tower's {side} pixels a side, got {images.size}")
    config = replace(
        config or CleanClipConfig(),
        arch=pair.architecture.name,
        width=pair.architecture.width,
        stem_stride=pair.architecture.stem_stride,
        text=pair.words.config,
    )
    generator = stage_generator(seed, "cleanclip/wordings")
    others = [reword(caption, generator=generator) for caption in captions]

    def build(backbone: nn.Module, feature_size: int, recipe: Recipe) -> CleanClip:
        return CleanClip(backbone, feature_size, recipe, pair=pair, weight=config.weight)

    return train_pair(
        images,
        (captions, others),
        pair.vocabulary,
        config,
        build,
        length=config.text.length,
        seed=seed,
        preprocessing=pair.encoder.preprocessing,
        origin=f"{pair.encoder.name} {pair.encoder.fingerprint}",
        device=pair.encoder.device,
        precision="bf16" if pair.encoder.precision == torch.bfloat16 else "fp32",
        checkpoint=checkpoint,
        progress=progress,
    )
