"""The answer key of an attack plan, laid beside the images that a scan saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unpoison.attack.plan import Plan, read_plan
from unpoison.errors import DataError
from unpoison.records import Box, Geometry

__all__ = ["Truth", "read_truth"]


@dataclass(frozen=True, eq=False)
class Truth:
    """What is true of each image, in the order of `ids`.

    Attributes:
        ids: the images of the scan, skipped ones included.
        poisoned: (N,) bool; True means bad.
        boxes: (N, 4) int64: x, y, width, height of the trigger at the encoder's input, in pixels; zeros where there is
            none, or where the centre crop cut it off.
        trigger: (N,) int64: index of the trigger in the plan; -1 where there is none.
    """

    ids: tuple[str, ...]
    poisoned: Tensor
    boxes: Tensor
    trigger: Tensor

    def box(self, row: int) -> Box:
        """The trigger of one image as a box; empty where there is none."""
        return Box(*self.boxes[row].tolist())


def read_truth(
    plan: Plan | str | Path, ids: Sequence[str], geometry: Geometry, *, partial: bool = False
) -> Truth:
    """Look up each image in the plan.

    Args:
        plan: a plan, or the path of a plan.json.
        ids: every image that the source named, in any order.
        geometry: how images became the encoder's input; trigger boxes are mapped through it.
        partial: whether `ids` may be a sample that lacks some, but not all, poisoned images of the plan.

    Raises:
        DataError: the plan cannot be read, an id comes twice, or the plan poisons images that are not among `ids`:
            then it belongs to another data set, and every number would be wrong.
    """
    if not isinstance(plan, Plan):
        plan = read_plan(plan)
    row_of = {id_: row for row, id_ in enumerate(ids)}
    if len(row_of) != len(ids):
        raise DataError(
            f"{len(ids)} image ids, but only {len(row_of)} different ones: expected each image once"
        )
    known = [image for image in plan.poisoned if image.id in row_of]
    unknown = [image.id for image in plan.poisoned if image.id not in row_of]
    if unknown and (not known or not partial):
        raise DataError(
            f"the plan poisons {len(unknown)} images that are not among the {len(ids)} examined, "
            f"such as {unknown[0]!r}: expected the plan of the same data set"
        )
    poisoned = torch.zeros(len(ids), dtype=torch.bool)
    boxes = torch.zeros(len(ids), 4, dtype=torch.int64)
    trigger = torch.full((len(ids),), -1, dtype=torch.int64)
    for image in known:
        row, box = row_of[image.id], image.box_at(geometry)
        poisoned[row] = True
        trigger[row] = image.trigger
        if box.area > 0:
            boxes[row] = torch.tensor([box.x, box.y, box.w, box.h])
    return Truth(tuple(ids), poisoned, boxes, trigger)
