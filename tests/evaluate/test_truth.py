"""The answer key beside the images of a scan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unpoison.attack.plan import Plan, PoisonedImage, Trigger, write_plan
from unpoison.errors import DataError
from unpoison.evaluate.truth import read_truth
from unpoison.records import Box, Geometry

IDENTITY = Geometry(32, 32)


def a_plan() -> Plan:
    trigger = Trigger(torch.zeros(3, 4, 4, dtype=torch.uint8), "seed:0", 0, "cat", 8)
    poisoned = (
        PoisonedImage("a", 0, Box(3, 4, 8, 8), 32, 32),
        PoisonedImage("c", 1, Box(0, 20, 8, 8), 64, 32),
    )
    return Plan("ssl-backdoor", 0, {}, (trigger, trigger), poisoned, 4, (2, 2))


def test_each_image_is_looked_up_in_the_order_given() -> None:
    truth = read_truth(a_plan(), ["d", "a", "b", "c"], IDENTITY)
    assert truth.ids == ("d", "a", "b", "c")
    assert truth.poisoned.tolist() == [False, True, False, True]
    assert truth.trigger.tolist() == [-1, 0, -1, 1]
    assert truth.box(1) == Box(3, 4, 8, 8)
    assert truth.box(0) == Box(0, 0, 0, 0)


def test_a_trigger_that_the_crop_cut_off_has_no_box_but_still_poisons() -> None:
    truth = read_truth(a_plan(), ["a", "b", "c"], IDENTITY)
    assert bool(truth.poisoned[2]) and truth.box(2).area == 0


def test_boxes_follow_the_geometry() -> None:
    assert read_truth(a_plan(), ["a", "c"], Geometry(64, 64)).box(0) == Box(6, 8, 16, 16)


def test_a_plan_may_be_a_file(tmp_path: Path) -> None:
    write_plan(a_plan(), tmp_path / "plan.json")
    assert read_truth(tmp_path / "plan.json", ["a", "c"], IDENTITY).poisoned.all()


def test_a_plan_of_other_images_is_refused() -> None:
    with pytest.raises(
        DataError, match="the plan poisons 2 images that are not among the 2 examined, such as 'a'"
    ):
        read_truth(a_plan(), ["x", "y"], IDENTITY)
    with pytest.raises(
        DataError, match="the plan poisons 1 images that are not among the 2 examined, such as 'c'"
    ):
        read_truth(a_plan(), ["a", "b"], IDENTITY)
    assert read_truth(a_plan(), ["a", "b"], IDENTITY, partial=True).poisoned.tolist() == [True, False]
    with pytest.raises(DataError, match="expected the plan of the same data set"):
        read_truth(a_plan(), ["x", "y"], IDENTITY, partial=True)


def test_ids_must_be_unique() -> None:
    with pytest.raises(DataError, match="3 image ids, but only 2 different ones: expected each image once"):
        read_truth(a_plan(), ["a", "a", "c"], IDENTITY)
