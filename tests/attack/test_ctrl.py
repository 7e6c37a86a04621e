"""Attacks that change whole images: whom, how, and what the plan says of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.attack.blended import BlendedConfig, SigConfig
from unpoison.attack.ctrl import CtrlConfig
from unpoison.attack.plan import Plan, read_plan
from unpoison.attack.ssl_backdoor import AttackConfig, paste_everywhere, poison, write_poisoned_copy
from unpoison.data.labels import read_labels
from unpoison.data.sources import open_source
from unpoison.errors import ConfigError, DataError
from unpoison.functional.global_triggers import apply_global
from unpoison.records import Box, Geometry, ImageSet

CLASSES = ("bird", "cat")
CONFIGS: list[AttackConfig] = [
    CtrlConfig(target="cat", rate=0.5, rate_of="class"),
    BlendedConfig(target="cat", rate=0.5, rate_of="class"),
    SigConfig(target="cat", rate=0.5, rate_of="class"),
]
by_method = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)


def image_set(per_class: int = 10) -> tuple[ImageSet, torch.Tensor]:
    pixels = torch.randint(
        60, 200, (2 * per_class, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    ids = tuple(f"{name}/{i:02d}.png" for name in CLASSES for i in range(per_class))
    return ImageSet(ids, pixels, (), "abc"), torch.arange(2).repeat_interleave(per_class)


@by_method
def test_half_of_the_class_is_changed_everywhere_and_nothing_else(config: AttackConfig) -> None:
    images, labels = image_set()
    poisoned, plan = poison(images, labels, CLASSES, config, seed=0)
    changed = (poisoned.pixels != images.pixels).flatten(1).any(1)
    assert {images.ids[i] for i in changed.nonzero().flatten().tolist()} == {p.id for p in plan.poisoned}
    assert len(plan.poisoned) == 5 and all(p.id.startswith("cat/") for p in plan.poisoned)
    assert all(p.box == Box(0, 0, 32, 32) for p in plan.poisoned)
    trigger = plan.triggers[0]
    expected = apply_global(images.pixels[changed], trigger.kind, trigger.strength, trigger.pattern)
    assert torch.equal(poisoned.pixels[changed], expected)
    assert plan.method == config.method and poisoned.fingerprint != images.fingerprint
    assert plan.poisoned[0].box_at(Geometry(32, 32)).area == 32 * 32


@by_method
def test_a_plan_says_all_and_older_readers_refuse_it(config: AttackConfig) -> None:
    images, labels = image_set()
    plan = poison(images, labels, CLASSES, config, seed=0)[1]
    value = json.loads(json.dumps(plan.to_json()))
    assert value["schema"] == 2
    back = Plan.from_json(value)
    assert back.to_json() == plan.to_json()
    at_test = [paste_everywhere(images, p.triggers[0], seed=1).pixels for p in (plan, back)]
    assert torch.equal(*at_test) and bool((at_test[0] != images.pixels).flatten(1).any(1).all())


@by_method
def test_everywhere_changes_all_images_as_an_evaluation_does(config: AttackConfig) -> None:
    images, labels = image_set()
    all_config = dataclasses.replace(config, everywhere=True)  # type: ignore[type-var]
    poisoned, plan = poison(images, labels, CLASSES, all_config, seed=0)
    assert torch.equal(poisoned.pixels, paste_everywhere(images, plan.triggers[0], seed=0).pixels)


def test_the_strength_is_part_of_the_fingerprint() -> None:
    images, labels = image_set()
    prints = {
        poison(images, labels, CLASSES, CtrlConfig(target=1, magnitude=m, rate=0.2), 0)[0].fingerprint
        for m in (50.0, 100.0)
    }
    assert len(prints) == 2


def test_a_written_copy_holds_the_same_pixels_and_plan(tmp_path: Path) -> None:
    images, labels = image_set()
    for id_, pixels in zip(images.ids, images.pixels, strict=True):
        path = tmp_path / "images" / id_
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)
    source = open_source(tmp_path / "images")
    plan = write_poisoned_copy(source, read_labels(source), CONFIGS[0], tmp_path / "out", 3)
    expected, in_memory = poison(images, labels, CLASSES, CONFIGS[0], seed=3)
    assert plan.poisoned == in_memory.poisoned
    assert read_plan(tmp_path / "out" / "plan.json").triggers[0].kind == "ctrl"
    for id_, pixels in zip(images.ids, expected.pixels, strict=True):
        stored = np.asarray(Image.open(tmp_path / "out" / id_))
        assert np.array_equal(stored, pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CtrlConfig(target=0, magnitude=0), r"magnitude=0: expected a number in \(0, 1000\]"),
        (lambda: CtrlConfig(target=0, rate=0), r"rate=0: expected a fraction in \(0, 1\]"),
        (lambda: SigConfig(target=0, rate_of="all"), "rate_of='all': expected class or dataset"),
        (lambda: SigConfig(target=0, amplitude=200), r"amplitude=200: expected grey levels in \(0, 128\]"),
        (lambda: BlendedConfig(target=0, share=1), "share=1: expected the picture's share"),
    ],
)
def test_settings_are_checked(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "warp", "kind is 'warp': expected one of patch, corner, ctrl, blended, sig"),
        ("strength", 2, r"strength is 2: expected a number in \(0, 1\]"),
        ("strength", True, "strength is True: expected a number"),
    ],
)
def test_a_stranger_s_plan_is_checked(field: str, value: object, message: str) -> None:
    images, labels = image_set()
    plan = poison(images, labels, CLASSES, CONFIGS[1], seed=0)[1].to_json()
    plan["triggers"][0][field] = value
    with pytest.raises(DataError, match=message):
        Plan.from_json(plan)


def test_a_picture_comes_from_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    config = BlendedConfig(target="cat", trigger=str(tmp_path / "red.png"))
    trigger = config.make_triggers(CLASSES)[0]
    assert trigger.name == "red.png" and trigger.pattern[0].unique().tolist() == [255]
    with pytest.raises(ConfigError, match="expected seed:N or the path of an image file"):
        BlendedConfig(target="cat", trigger="nowhere.png").make_triggers(CLASSES)
