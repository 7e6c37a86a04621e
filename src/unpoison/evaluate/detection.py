"""How well were poisoned images found? Definitions as in the papers; an undefined value is None, never 0 or NaN.

Shares lie in [0, 1]. An image that was never examined (not `scored`) ranks nowhere: it does not rank last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from unpoison.errors import DataError, ShapeError
from unpoison.records import Box

__all__ = ["catch_rate", "f1", "iou", "precision", "rank", "recall", "removed", "topk_accuracy"]


def rank(scores: Tensor, scored: Tensor, *, ids: Sequence[str] | None = None, seed: int = 0) -> Tensor:
    """Rows of the scored images, most suspicious first.

    Args:
        scores: (N,) float; higher is more suspicious; ignored where not scored.
        scored: (N,) bool; False = never examined.
        ids: one per image; ties are then broken by a seeded hash of the id, so that the order of a file list, which may
            betray the poison, cannot help. Without ids, ties keep the given order.
        seed: of the tie-breaking hash.

    Returns:
        (n scored,) int64.

    Raises:
        ShapeError: the arguments do not have one entry per image.
        DataError: a scored image has the score NaN.

    >>> rank(torch.tensor([1.0, 3.0, 9.0, 2.0]), torch.tensor([True, True, False, True])).tolist()
    [1, 3, 0]
    """
    _check_one_each(scores, scored, ids)
    rows: list[int] = torch.nonzero(scored).flatten().tolist()
    if bool(torch.isnan(scores[scored]).any()):
        raise DataError("a scored image has the score NaN: expected a number, or scored = False")
    if ids is not None:
        rows.sort(key=lambda row: hashlib.sha256(f"{seed}/ties/{ids[row]}".encode()).digest())
    order = torch.tensor(rows, dtype=torch.int64)
    return order[torch.argsort(scores.cpu()[order], descending=True, stable=True)]


def topk_accuracy(
    scores: Tensor,
    scored: Tensor,
    poisoned: Tensor,
    k: int,
    *,
    ids: Sequence[str] | None = None,
    seed: int = 0,
) -> float | None:
    """Share of the k highest-scored images that are truly poisoned, wherever their windows lie.

    With fewer than k scored images it is the share among those there are; None if nothing was scored.

    Args:
        scores: (N,) float, higher is more suspicious.
        scored: (N,) bool.
        poisoned: (N,) bool, the truth.
        k: at least 1.
        ids: see `rank`.
        seed: see `rank`.

    Source:
        "Top-k accuracy" of PatchSearch (Tejankar et al., CVPR 2023).

    >>> topk_accuracy(torch.tensor([3.0, 2.0, 1.0]), torch.ones(3).bool(), torch.tensor([True, False, True]), 2)
    0.5
    """
    if k < 1:
        raise ShapeError(f"k={k}: expected at least 1 image")
    if poisoned.shape != scores.shape:
        raise ShapeError(
            f"{tuple(poisoned.shape)} truths for {tuple(scores.shape)} scores; there must be one each"
        )
    top = rank(scores, scored, ids=ids, seed=seed)[:k]
    return float(poisoned[top].double().mean()) if len(top) else None


def iou(window: Box, trigger: Box) -> float:
    """|W ∩ T| / |W ∪ T| of two rectangles; 0 if both are empty.

    For squares of sides w and t it is at most min(t, w)² / max(t, w)².

    >>> iou(Box(0, 0, 2, 2), Box(1, 0, 2, 2))
    0.3333333333333333
    """
    shared = window.intersection(trigger)
    union = window.area + trigger.area - shared
    return shared / union if union else 0.0


def catch_rate(window: Box, trigger: Box) -> float | None:
    """|W ∩ T| / |T|: how much of the trigger the window holds; 1 iff it holds all of it, None for an empty trigger.

    >>> catch_rate(Box(0, 0, 4, 4), Box(2, 2, 4, 2))
    0.5
    """
    return window.intersection(trigger) / trigger.area if trigger.area else None


def removed(flagged: Tensor) -> int:
    """Total Rem.: the number of images that the defence takes away.

    Args:
        flagged: (N,) bool.
    """
    return int(flagged.sum())


def recall(flagged: Tensor, poisoned: Tensor) -> float | None:
    """Removed poison / all poison, unexamined poison included; None if nothing is poisoned.

    Args:
        flagged: (N,) bool, True where the image is removed.
        poisoned: (N,) bool, the truth.

    >>> recall(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    0.5
    """
    return _share(flagged, poisoned, poisoned)


def precision(flagged: Tensor, poisoned: Tensor) -> float | None:
    """Removed poison / all removed; None if nothing is removed.

    Args:
        flagged: (N,) bool, True where the image is removed.
        poisoned: (N,) bool, the truth.
    """
    return _share(flagged, poisoned, flagged)


def f1(flagged: Tensor, poisoned: Tensor) -> float | None:
    """Harmonic mean of recall and precision, 2 |R ∩ P| / (|R| + |P|); None if nothing is removed and nothing poisoned.

    With poison but nothing removed it is 0, although precision alone is undefined there.

    Args:
        flagged: (N,) bool, True where the image is removed.
        poisoned: (N,) bool, the truth.
    """
    _check_pair(flagged, poisoned)
    total = int(flagged.sum()) + int(poisoned.sum())
    return 2 * int((flagged & poisoned).sum()) / total if total else None


def _share(flagged: Tensor, poisoned: Tensor, whole: Tensor) -> float | None:
    _check_pair(flagged, poisoned)
    count = int(whole.sum())
    return int((flagged & poisoned).sum()) / count if count else None


def _check_pair(flagged: Tensor, poisoned: Tensor) -> None:
    if flagged.dtype != torch.bool or poisoned.dtype != torch.bool or flagged.shape != poisoned.shape:
        raise ShapeError(
            "flagged and poisoned must be bool of one shape, got "
            f"{tuple(flagged.shape)} {flagged.dtype} and {tuple(poisoned.shape)} {poisoned.dtype}"
        )


def _check_one_each(scores: Tensor, scored: Tensor, ids: Sequence[str] | None) -> None:
    if scores.ndim != 1 or scored.shape != scores.shape or scored.dtype != torch.bool:
        raise ShapeError(
            "scores and scored must be (N,), scored bool, got "
            f"{tuple(scores.shape)} and {tuple(scored.shape)} {scored.dtype}"
        )
    if ids is not None and len(ids) != len(scores):
        raise ShapeError(f"{len(ids)} ids for {len(scores)} scores; there must be one each")
