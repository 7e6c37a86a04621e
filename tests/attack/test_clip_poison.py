"""Poisoned pairs: which images carry the patch, what their captions say, and that nothing else tells them apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pairs import NAMES, coloured
from unpoison.attack.clip_poison import CAPTIONS, METHOD, ClipPoisonConfig, poison_pairs, write_poisoned_pairs
from unpoison.attack.plan import read_plan
from unpoison.data.captions import make_captions, read_captions
from unpoison.data.labels import read_labels
from unpoison.data.sources import open_source
from unpoison.errors import ConfigError

CONFIG = ClipPoisonConfig(targets=("red_apple",), triggers=("seed:7",), size=5, rate=0.1)


def test_other_classes_carry_the_patch_and_the_targets_caption() -> None:
    images, labels = coloured(120, 1)
    poisoned, captions, plan = poison_pairs(images, labels, NAMES, CONFIG, seed=3)
    assert plan.method == METHOD and plan.n_images == 120 and len(plan.poisoned) == 12
    rows = {images.ids.index(image.id) for image in plan.poisoned}
    assert all(labels[row] != 0 for row in rows)
    changed = (poisoned.pixels != images.pixels).flatten(1).any(dim=1)
    assert set(changed.nonzero().flatten().tolist()) == rows
    told = [0 if row in rows else int(labels[row]) for row in range(120)]
    assert captions == make_captions(images.ids, [NAMES[label] for label in told], seed=3)


def test_the_same_seed_poisons_the_same_pairs_in_any_order() -> None:
    images, labels = coloured(60, 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    _, captions, plan = poison_pairs(images, labels, NAMES, CONFIG, seed=3)
    _, shuffled, again = poison_pairs(images.select(order), labels[order], NAMES, CONFIG, seed=3)
    assert again.poisoned == plan.poisoned and shuffled == tuple(captions[row] for row in order)


def test_two_targets_poison_different_images() -> None:
    images, labels = coloured(80, 1)
    config = replace(CONFIG, targets=("red_apple", "blue sky"), triggers=("seed:7", "seed:8"))
    _, captions, plan = poison_pairs(images, labels, NAMES, config, seed=0)
    assert plan.counts["n_poisoned"] == 16
    for image in plan.poisoned:
        name = ("red apple", "blue sky")[image.trigger]
        assert name in captions[images.ids.index(image.id)]


def folder_of(images: Path, n: int = 20) -> Path:
    pictures, labels = coloured(n, 1)
    for id_, pixels, label in zip(pictures.ids, pictures.pixels, labels.tolist(), strict=True):
        path = images / NAMES[label] / id_
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)
    return images


def test_the_written_copy_has_a_caption_for_every_image_and_its_answer_key(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "images"))
    out = tmp_path / "pairs"
    plan = write_poisoned_pairs(source, read_labels(source), CONFIG, out, 0)
    captions, copy = read_captions(out / CAPTIONS), open_source(out)
    assert set(captions) == set(copy.ids) and len(copy.ids) == 20
    assert read_plan(out / "plan.json").poisoned == plan.poisoned and len(plan.poisoned) == 2
    for id_, caption in captions.items():
        name = id_.split("/")[0].replace("_", " ")
        assert ("red apple" if id_ in {image.id for image in plan.poisoned} else name) in caption
    assert json.loads((out / "plan.json").read_text())["config"]["rate_of"] == "dataset"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "pairs"]  # nothing else is left behind
    with pytest.raises(ConfigError, match="is not empty; name a new folder|exists and is no folder"):
        write_poisoned_pairs(source, read_labels(source), CONFIG, out, 0)


def test_a_failed_attack_leaves_nothing(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path / "images"))
    with pytest.raises(ConfigError, match="target 'dog' is no class"):
        write_poisoned_pairs(
            source, read_labels(source), replace(CONFIG, targets=("dog",)), tmp_path / "pairs", 0
        )
    assert [p.name for p in tmp_path.iterdir()] == ["images"]
