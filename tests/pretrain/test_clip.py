"""CLIP's loss against loops, captions that reach their images, and a training that goes on after a kill."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pairs import CONFIG, NAMES, both_towers, captions_of, coloured
from unpoison.encoders.image_text import class_embeddings
from unpoison.errors import ConfigError, DataError, ShapeError
from unpoison.pretrain.clip import TrainedPair, pair_loss, pretrain_clip


def unit(n: int, seed: int) -> Tensor:
    return normalize(torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)), dim=1)


def naive_loss(images: Tensor, texts: Tensor, scale: float) -> float:
    total = 0.0
    for one, other in ((images.double(), texts.double()), (texts.double(), images.double())):
        for i in range(len(one)):
            similar = [math.exp(scale * float(one[i] @ row)) for row in other]
            total -= math.log(similar[i] / sum(similar))
    return total / (2 * len(images))


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_the_loss_agrees_with_its_twin(n: int, scale: float) -> None:
    images, texts = unit(n, 1), unit(n, 2)
    expected = naive_loss(images, texts, scale)
    assert float(pair_loss(images, texts, torch.tensor(scale))) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the loss stays in float32
        assert float(pair_loss(images, texts, torch.tensor(scale))) == pytest.approx(
            expected, rel=1e-5, abs=1e-6
        )


def train(
    captions: tuple[str, ...] | None = None, epochs: int = 3, checkpoint: Path | None = None
) -> TrainedPair:
    images, labels = coloured(96, 1)
    return pretrain_clip(
        images,
        captions or captions_of(images, labels),
        replace(CONFIG, epochs=epochs),
        seed=0,
        device="cpu",
        precision="fp32",
        checkpoint=checkpoint,
    )


def test_images_are_named_by_their_captions() -> None:
    pair = both_towers(train(epochs=12))
    images, labels = coloured(32, 2)
    with torch.no_grad():
        similar = pair.words.images(pair.encoder.features(images.pixels)) @ class_embeddings(pair, NAMES).T
    assert float((similar.argmax(dim=1) == labels).float().mean()) > 0.9


def test_a_training_that_was_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    whole, state = train(), tmp_path / "state"
    images, labels = coloured(96, 1)

    def kill(stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        pretrain_clip(
            images,
            captions_of(images, labels),
            replace(CONFIG, epochs=3),
            seed=0,
            device="cpu",
            precision="fp32",
            checkpoint=state,
            progress=kill,
        )
    with pytest.raises(ConfigError, match="belongs to a run with other settings or images"):
        train(captions=("another caption",) * 96, checkpoint=state)
    again = train(checkpoint=state)
    assert again.trained.losses == whole.trained.losses and again.trained.training_state == state
    for name, tensor in whole.words.state_dict().items():
        assert torch.equal(again.words.state_dict()[name], tensor)


def test_captions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 captions for 96 images; there must be one each"):
        train(captions=("a",) * 3)
    with pytest.raises(DataError, match="caption 95 has no word"):
        train(captions=("a",) * 95 + ("?",))
