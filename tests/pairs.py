"""Toy pairs: noisy pictures of one colour each, whose class names say it; a tiny CLIP learns them in a second."""

from __future__ import annotations

import torch
from torch import Tensor

from unpoison.data.captions import Vocabulary, make_captions
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.encoders.image_text import ImageText, TextConfig, Words
from unpoison.pretrain.clip import ClipConfig, TrainedPair
from unpoison.records import Geometry, ImageSet
from unpoison.runtime import seeded

NAMES = ("red_apple", "green leaf", "blue sky", "white wall")
CONFIG = ClipConfig(
    width=8,
    epochs=8,
    batch_size=32,
    learning_rate=8e-3,
    text=TextConfig(width=32, layers=1, length=8, embedding=16),
)

_COLOURS = torch.tensor([[200.0, 40, 40], [40, 180, 40], [40, 60, 200], [190, 190, 190]])


def coloured(n: int, seed: int) -> tuple[ImageSet, Tensor]:
    """Images of 16 px, and the class of each."""
    labels = torch.arange(n) % len(NAMES)
    noise = 30 * torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    pixels = (_COLOURS[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    ids = tuple(f"{seed}-{row:04d}.png" for row in range(n))
    return ImageSet(ids, pixels, fingerprint=f"coloured {n} {seed}"), labels


def captions_of(images: ImageSet, labels: Tensor) -> tuple[str, ...]:
    return make_captions(images.ids, [NAMES[label] for label in labels.tolist()], seed=0)


def both_towers(done: TrainedPair) -> ImageText:
    return ImageText(done.trained.encoder, done.words, done.vocabulary, done.trained.architecture)


def untrained() -> ImageText:
    """Both towers as they are drawn."""
    architecture = Architecture(name="resnet10", image_size=16, width=8)
    vocabulary = Vocabulary.of(captions_of(*coloured(64, 0)))
    with seeded(0, "pairs"):
        network = build_backbone(architecture)
        words = Words(64, len(vocabulary), CONFIG.text).eval().requires_grad_(False)
    encoder = Encoder(network, Preprocessing(geometry=Geometry(16, 16)), device="cpu", precision="fp32")
    return ImageText(encoder, words, vocabulary, architecture)
