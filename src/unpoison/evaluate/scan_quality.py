"""How good was a scan? The findings of a run, laid beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch

from unpoison.errors import DataError
from unpoison.evaluate.detection import catch_rate, f1, iou, precision, rank, recall, removed
from unpoison.evaluate.truth import Truth
from unpoison.records import Box

__all__ = ["ScanQuality", "TopWindows", "score_scan"]

_COLUMNS = ("id", "scored", "poison_score", "box_x", "box_y", "box_w", "box_h", "flagged")


@dataclass(frozen=True)
class TopWindows:
    """The k most suspicious images and their windows; shares in [0, 1].

    Attributes:
        k: asked for.
        n: there were; fewer if fewer images were scored.
        accuracy: share of the n images that are poisoned; None if n is 0.
        window_accuracy: share of the n windows that hold any part of a trigger (PoisonCAM's "Acc"); None if n is 0.
        n_poisoned: how many of the n are poisoned.
        iou: mean over the poisoned ones alone; a trigger that the crop cut off counts as 0; None if there are none.
        catch_rate: mean over the poisoned ones whose trigger is in view; others count for nothing; None if there are
            none.
    """

    k: int
    n: int
    accuracy: float | None
    window_accuracy: float | None
    n_poisoned: int
    iou: float | None
    catch_rate: float | None


@dataclass(frozen=True)
class ScanQuality:
    """A scan against the truth.

    Attributes:
        n_images: all rows, skipped images included.
        n_poisoned: truly poisoned, whether scored or not.
        n_scored: examined one by one.
        n_scored_poisoned: poisoned among those.
        top: one entry per k.
        removed: images that the scan flags.
        recall: see `detection.recall`; None if nothing is poisoned.
        precision: None if nothing is flagged.
        f1: None if both are empty.
    """

    n_images: int
    n_poisoned: int
    n_scored: int
    n_scored_poisoned: int
    top: tuple[TopWindows, ...]
    removed: int
    recall: float | None
    precision: float | None
    f1: float | None

    def at(self, k: int) -> TopWindows:
        """The entry for this k."""
        found = {entry.k: entry for entry in self.top}
        if k not in found:
            raise DataError(f"top {k} was not measured: expected one of {', '.join(map(str, found))}")
        return found[k]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def score_scan(
    findings: pd.DataFrame, truth: Truth, *, ks: Sequence[int] = (10, 20, 50, 100), seed: int = 0
) -> ScanQuality:
    """Measure a run's findings.

    Args:
        findings: one row per image, with the columns of findings.parquet.
        truth: of the same images, in any order.
        ks: sizes of the top lists.
        seed: of the hash that breaks ties between equal scores.

    Raises:
        DataError: a column is missing, or findings and truth are not about the same images.
    """
    missing = [name for name in _COLUMNS if name not in findings.columns]
    if missing:
        raise DataError(
            f"findings lack the column {missing[0]!r}: expected findings.parquet of `unpoison scan`"
        )
    ids = [str(id_) for id_ in findings["id"]]
    if len(ids) != len(truth.ids) or set(ids) != set(truth.ids):
        raise DataError(
            f"findings of {len(ids)} images, truth of {len(truth.ids)}: expected the same ids in both"
        )
    row_of = {id_: row for row, id_ in enumerate(truth.ids)}
    truth_rows = [row_of[id_] for id_ in ids]
    poisoned = truth.poisoned[truth_rows]
    scored, flagged = (
        torch.tensor(findings[name].to_numpy(dtype="bool", na_value=False).tolist(), dtype=torch.bool)
        for name in ("scored", "flagged")
    )
    scores = torch.tensor(
        findings["poison_score"].to_numpy(dtype="float64", na_value=float("nan")).tolist(),
        dtype=torch.float64,
    )
    order = rank(scores, scored, ids=ids, seed=seed).tolist()

    def top(k: int) -> TopWindows:
        rows = order[:k]
        pairs = [(_window(findings, row), truth.box(truth_rows[row])) for row in rows]
        bad = [pair for row, pair in zip(rows, pairs, strict=True) if poisoned[row]]
        caught = [rate for pair in bad if (rate := catch_rate(*pair)) is not None]
        return TopWindows(
            k=k,
            n=len(rows),
            accuracy=_mean([float(poisoned[row]) for row in rows]),
            window_accuracy=_mean([float(window.intersection(trigger) > 0) for window, trigger in pairs]),
            n_poisoned=len(bad),
            iou=_mean([iou(*pair) for pair in bad]),
            catch_rate=_mean(caught),
        )

    return ScanQuality(
        n_images=len(ids),
        n_poisoned=int(poisoned.sum()),
        n_scored=int(scored.sum()),
        n_scored_poisoned=int((scored & poisoned).sum()),
        top=tuple(top(k) for k in ks),
        removed=removed(flagged),
        recall=recall(flagged, poisoned),
        precision=precision(flagged, poisoned),
        f1=f1(flagged, poisoned),
    )


def _window(findings: pd.DataFrame, row: int) -> Box:
    """The window of one image; empty where the scan names none."""
    values = [findings[name].iloc[row] for name in ("box_x", "box_y", "box_w", "box_h")]
    if any(pd.isna(value) for value in values):
        return Box(0, 0, 0, 0)
    return Box(*(int(value) for value in values))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
