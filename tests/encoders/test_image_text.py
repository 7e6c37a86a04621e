"""Both towers: what the text tower reads, the prompts of a class, and files that belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from pairs import CONFIG, NAMES, captions_of, coloured, untrained
from unpoison.data.captions import TEMPLATES
from unpoison.encoders.checkpoints import load_encoder, read_training
from unpoison.encoders.image_text import (
    TextConfig,
    TextTower,
    class_embeddings,
    load_image_text,
    save_image_text,
    words_file,
)
from unpoison.errors import CheckpointError, ConfigError
from unpoison.pretrain.loop import PretrainConfig, TrainedEncoder
from unpoison.runtime import seeded


def saved(folder: Path, name: str = "clip.safetensors") -> Path:
    pair = untrained()
    trained = TrainedEncoder(pair.encoder, pair.architecture, (1.0,), CONFIG, 0, "images")
    save_image_text(trained, pair.words, pair.vocabulary, folder / name)
    return folder / name


def test_padding_means_nothing_and_order_something() -> None:
    with seeded(0, "tower"):
        tower = TextTower(9, TextConfig(width=32, length=5, embedding=4)).eval()
    with torch.no_grad():
        short, longer = (
            tower(torch.tensor([[2, 3, 0]])[:, [0, 1, 2, 2, 2]]),
            tower(torch.tensor([[2, 3, 0, 0, 0]])),
        )
        turned, alone = tower(torch.tensor([[3, 2, 0, 0, 0]])), tower(torch.tensor([[2, 3, 4, 0, 0]]))
    assert torch.equal(short, longer) and short.shape == (1, 4)
    assert not torch.allclose(short, turned) and not torch.allclose(short, alone)


def test_a_class_is_the_mean_of_its_prompts() -> None:
    pair = untrained()
    found = class_embeddings(pair, NAMES)
    for row, name in enumerate(NAMES):
        prompts = [template.format(name.replace("_", " ")) for template in TEMPLATES]
        texts = [pair.words.texts(pair.vocabulary.encode([prompt], CONFIG.text.length)) for prompt in prompts]
        mean = torch.cat(texts).mean(dim=0)
        torch.testing.assert_close(found[row], mean / mean.norm())


def test_both_towers_come_back_and_the_image_tower_is_an_encoder_like_any_other(tmp_path: Path) -> None:
    path, pair = saved(tmp_path), untrained()
    loaded = load_image_text(path, device="cpu", precision="fp32")
    assert loaded.vocabulary == pair.vocabulary and loaded.architecture == pair.architecture
    assert torch.equal(class_embeddings(loaded, NAMES), class_embeddings(pair, NAMES))
    images, labels = coloured(8, 1)
    features = load_encoder(path, device="cpu", precision="fp32").features(images.pixels)
    assert torch.equal(features, pair.encoder.features(images.pixels))
    assert torch.equal(loaded.words.images(features), pair.words.images(features))
    assert read_training(path, PretrainConfig) is None  # captions belong to it, which no recipe holds
    assert len(captions_of(images, labels)) == 8


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    other = tmp_path / "other.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v + 1 for k, v in tensors.items()}, other, metadata)
    with pytest.raises(ConfigError, match="expected an image tower with other.words.safetensors beside it"):
        load_image_text(other)
    words_file(other).write_bytes(words_file(path).read_bytes())
    with pytest.raises(CheckpointError, match="belongs to another image tower than other.safetensors"):
        load_image_text(other, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"width": 10**9}}, "expected a multiple of 32, at most 1024"),
        ({"feature_size": 10**12}, "feature_size=1000000000000 fits no projection"),
        ({"vocabulary": [1]}, "metadata's vocabulary.0"),
        ({"vocabulary": ["a"]}, "tower.embedding.weight is .* the text tower takes"),
        ({"schema": "unpoison/words/9"}, "schema 'unpoison/words/9', expected 'unpoison/words/1'"),
    ],
)
def test_a_malformed_text_tower_is_refused_in_one_line(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    beside = words_file(path)
    with safetensors.safe_open(beside, framework="pt") as file:
        metadata = dict(file.metadata()) | {key: json.dumps(value) for key, value in changes.items()}
    safetensors.torch.save_file(safetensors.torch.load_file(beside), beside, metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_image_text(path, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [{"width": 30}, {"width": 2048}, {"layers": 0}, {"length": 300}])
def test_sizes_out_of_range_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        TextConfig(**sizes)
