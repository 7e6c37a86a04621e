"""The answer key: what it holds, that it survives a file, and that every malformed one is refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unpoison.attack.plan import Plan, PoisonedImage, Trigger, default_side, read_plan, write_plan
from unpoison.errors import ConfigError, DataError
from unpoison.functional.triggers import draw_grid
from unpoison.records import Box, Geometry, Skipped


def a_plan() -> Plan:
    grid = draw_grid(torch.Generator().manual_seed(0))
    return Plan(
        method="ssl-backdoor",
        seed=7,
        config={"rate": 0.5, "targets": ["cat", "dog"]},
        triggers=(
            Trigger(grid, "seed:0", 0, "cat", 8),
            Trigger(grid.flip(1), "mark.png", 1, "dog", None, "bicubic"),
        ),
        poisoned=(
            PoisonedImage("cat/a.png", 0, Box(3, 4, 8, 8), 32, 40),
            PoisonedImage("cat/b.png", 0, Box(0, 0, 8, 8), 32, 40),
            PoisonedImage("dog/a.png", 1, Box(24, 32, 8, 8), 32, 40),
        ),
        n_images=10,
        class_sizes=(4, 2),
        skipped=(Skipped("cat/broken.jpg", "truncated"),),
    )


def test_a_plan_survives_the_file(tmp_path: Path) -> None:
    plan = a_plan()
    write_plan(plan, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again.to_json() == plan.to_json()
    assert again.poisoned == plan.poisoned and again.skipped == plan.skipped
    assert all(torch.equal(a.pattern, b.pattern) for a, b in zip(again.triggers, plan.triggers, strict=True))
    assert [t.side for t in again.triggers] == [8, None]


def test_counts_say_how_much_was_poisoned() -> None:
    counts = a_plan().counts
    assert (counts["n_images"], counts["n_poisoned"], counts["n_skipped"]) == (10, 3, 1)
    assert counts["rate_of_dataset"] == pytest.approx(0.3)
    assert [entry["rate_of_class"] for entry in counts["triggers"]] == [0.5, 0.5]


def test_boxes_are_mapped_to_the_encoders_input() -> None:
    image = PoisonedImage("a", 0, Box(200, 100, 50, 50), 500, 375)
    assert image.box_at(Geometry(224, 256)) == Box(79, 52, 34, 34)
    cut_off = PoisonedImage("a", 0, Box(0, 100, 20, 20), 500, 375)
    assert cut_off.box_at(Geometry(224, 256)).area == 0


def test_the_pasted_pattern_follows_the_image_unless_told() -> None:
    trigger = a_plan().triggers[1]
    assert trigger.pasted(224).shape == (3, 50, 50)
    assert trigger.pasted(32).shape == (3, 7, 7)
    assert trigger.pasted(224, side=9).shape == (3, 9, 9)
    assert a_plan().triggers[0].pasted(224).shape == (3, 8, 8)
    assert default_side(1) == 2


def test_targets_can_be_renumbered() -> None:
    plan = a_plan().for_classes(("bird", "dog", "cat"))
    assert [t.target for t in plan.triggers] == [2, 1]
    with pytest.raises(DataError, match="target class 'cat' is not in the data set; it has bird, dog"):
        a_plan().for_classes(("bird", "dog"))


def test_a_plan_that_is_no_json_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan '.*none.json': no such file"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot read the plan .*: Is a directory"):
        read_plan(tmp_path)
    for text in ("{", "[" * 100_000, "\udcff"):
        path = tmp_path / "plan.json"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(
            DataError, match="is no attack plan: expected JSON as `unpoison attack` writes it"
        ):
            read_plan(path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ((), [], r"plan is a list: expected an object"),
        (("schema",), 99, r"plan.schema is 99, this version reads 1 and 2: install a matching unpoison"),
        (("schema",), True, r"plan.schema is a truth value: expected a whole number"),
        (("method",), None, r"plan.method is null: expected a text"),
        (("seed",), 1.5, r"plan.seed is a number: expected a whole number"),
        (("config",), "x", r"plan.config is a text: expected an object"),
        (("triggers",), {}, r"plan.triggers is an object: expected a list"),
        (("triggers",), [], r"plan.triggers is empty: expected at least one trigger"),
        (
            ("triggers", 0, "png"),
            "!!",
            r"plan.triggers\[0\].png holds no readable image: expected a PNG in base64",
        ),
        (("triggers", 0, "png"), "AAAA", r"plan.triggers\[0\].png holds no readable image"),
        (("triggers", 0, "side"), 0, r"plan.triggers\[0\].side is 0: expected at least 1"),
        (
            ("triggers", 0, "resample"),
            "magic",
            r"resample is 'magic': expected one of nearest, bilinear, bicubic",
        ),
        (
            ("triggers", 1, "target", "index"),
            -1,
            r"plan.triggers\[1\].target.index is -1: expected at least 0",
        ),
        (("poisoned", 1, "trigger"), 2, r"poisoned\[1\].trigger is 2: expected one of the plan's 2 triggers"),
        (("poisoned", 0, "box", "w"), 0, r"plan.poisoned\[0\].box.w is 0: expected at least 1"),
        (
            ("poisoned", 0, "box", "x"),
            25,
            r"plan.poisoned\[0\].box leaves its 32×40 image: expected a box inside it",
        ),
        (
            ("poisoned", 0, "id"),
            "dog/a.png",
            r"plan.poisoned names 'dog/a.png' twice: expected each image once",
        ),
        (("counts", "n_images"), 2, r"plan.poisoned has 3 images of 2: expected no more than there are"),
        (("skipped", 0), "x", r"plan.skipped\[0\] is a text: expected an object"),
    ],
)
def test_malformed_fields_are_named(
    tmp_path: Path, where: tuple[Any, ...], value: object, message: str
) -> None:
    plan: Any = copy.deepcopy(a_plan().to_json())
    if where:
        parent = plan
        for step in where[:-1]:
            parent = parent[step]
        parent[where[-1]] = value
    else:
        plan = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(DataError, match=message) as raised:
        read_plan(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    "name", ["schema", "method", "seed", "config", "counts", "triggers", "poisoned", "skipped"]
)
def test_missing_fields_are_named(name: str) -> None:
    plan = a_plan().to_json()
    del plan[name]
    with pytest.raises(
        DataError, match=rf"plan.{name} is missing: expected a plan as `unpoison attack` writes it"
    ):
        Plan.from_json(plan)


def test_a_pattern_too_large_to_embed_is_refused() -> None:
    plan = Plan("m", 0, {}, (Trigger(torch.zeros(3, 600, 600, dtype=torch.uint8), "big"),), (), 0, (0,))
    with pytest.raises(
        ConfigError, match="trigger pattern of 600×600 pixels: expected at most 262144; shrink it"
    ):
        plan.to_json()


def test_patches_are_as_wide_as_at_the_encoders_input() -> None:
    grid = Trigger(a_plan().triggers[0].pattern, "seed:7", 0, "cat", 21)
    corner = Trigger(a_plan().triggers[0].pattern, "seed:8", 1, "dog", 6, kind="corner")
    unused = Trigger(a_plan().triggers[0].pattern, "seed:9", 0, "cat", 5)
    images = tuple(
        PoisonedImage(f"{n}.png", n % 2, Box(12, 9, 21, 21), side, side)
        for n, side in enumerate((96, 96, 96, 48, 192))
    )
    plan = Plan("m", 0, {}, (grid, corner, unused), images, 9, (5, 4, 5))
    assert [trigger.side for trigger in plan.at(Geometry(32, 32)).triggers] == [7, 6, 5]
    assert [trigger.side for trigger in plan.triggers] == [21, 6, 5]
