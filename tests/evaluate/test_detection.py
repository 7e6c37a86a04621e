"""Metrics of detection against their definitions, written out naively."""

from __future__ import annotations

import itertools

import pytest
import torch

from unpoison.errors import DataError, ShapeError
from unpoison.evaluate.detection import catch_rate, f1, iou, precision, rank, recall, removed, topk_accuracy
from unpoison.records import Box


def bools(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


def pixels(box: Box) -> set[tuple[int, int]]:
    return set(itertools.product(range(box.x, box.x + box.w), range(box.y, box.y + box.h)))


def some_boxes() -> list[Box]:
    numbers = torch.randint(0, 7, (40, 4), generator=torch.Generator().manual_seed(0)).tolist()
    return [Box(*row) for row in numbers]


def test_iou_and_catch_rate_agree_with_counting_pixels() -> None:
    for window, trigger in itertools.product(some_boxes(), some_boxes()):
        both, either = pixels(window) & pixels(trigger), pixels(window) | pixels(trigger)
        assert iou(window, trigger) == pytest.approx(len(both) / len(either) if either else 0)
        if trigger.area:
            assert catch_rate(window, trigger) == pytest.approx(len(both) / len(pixels(trigger)))
        else:
            assert catch_rate(window, trigger) is None


@pytest.mark.parametrize(("t", "w"), [(50, 60), (34, 60), (8, 9), (9, 5)])
def test_iou_is_bounded_and_catch_rate_is_one_iff_the_window_holds_the_trigger(t: int, w: int) -> None:
    """Invariant 8."""
    bound = min(t, w) ** 2 / max(t, w) ** 2
    trigger = Box(20, 20, t, t)
    for x, y in itertools.product(range(0, 60, 3), range(0, 60, 3)):
        window = Box(x, y, w, w)
        assert iou(window, trigger) <= bound + 1e-12
        holds = pixels(trigger) <= pixels(window)
        assert (catch_rate(window, trigger) == 1) == holds


def test_topk_accuracy_ranks_scored_images_alone() -> None:
    scores = torch.tensor([5.0, float("nan"), 4.0, 9.0, 0.0])
    scored, poisoned = bools("10101"), bools("11000")
    assert topk_accuracy(scores, scored, poisoned, 1) == 1.0
    assert topk_accuracy(scores, scored, poisoned, 2) == 0.5
    assert topk_accuracy(scores, scored, poisoned, 100) == pytest.approx(1 / 3)  # of the three there are
    assert topk_accuracy(scores, bools("00000"), poisoned, 5) is None


def test_an_unscored_image_is_not_a_zero() -> None:
    assert rank(torch.tensor([-1.0, 0.0, -2.0]), bools("101")).tolist() == [0, 2]


def test_ties_go_by_a_seeded_hash_of_the_id_and_never_by_the_order_of_the_list() -> None:
    ids = [f"image {i}" for i in range(50)]
    scores, scored = torch.tensor([1.0, 0.0]).repeat(25), torch.ones(50, dtype=torch.bool)
    order = rank(scores, scored, ids=ids)
    assert scores[order].tolist() == [1.0] * 25 + [0.0] * 25
    assert order[:25].tolist() != sorted(order[:25].tolist())
    assert rank(scores, scored).tolist() == [*range(0, 50, 2), *range(1, 50, 2)]
    permutation = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = rank(scores[permutation], scored, ids=[ids[i] for i in permutation.tolist()])
    assert permutation[shuffled].tolist() == order.tolist()
    assert rank(scores, scored, ids=ids, seed=1).tolist() != order.tolist()


def test_recall_precision_and_f1_by_counting() -> None:
    flagged, poisoned = bools("1110000"), bools("1001100")
    assert removed(flagged) == 3
    assert recall(flagged, poisoned) == pytest.approx(1 / 3)
    assert precision(flagged, poisoned) == pytest.approx(1 / 3)
    assert f1(flagged, poisoned) == pytest.approx(1 / 3)


def test_what_is_undefined_is_none() -> None:
    nothing, something = bools("000"), bools("110")
    assert (
        precision(nothing, something) is None
        and recall(nothing, something) == 0
        and f1(nothing, something) == 0
    )
    assert (
        recall(something, nothing) is None
        and precision(something, nothing) == 0
        and f1(something, nothing) == 0
    )
    assert f1(nothing, nothing) is None


def test_f1_is_the_harmonic_mean() -> None:
    flagged, poisoned = bools("1111100"), bools("1100011")
    p, r = precision(flagged, poisoned), recall(flagged, poisoned)
    assert p is not None and r is not None
    assert f1(flagged, poisoned) == pytest.approx(2 * p * r / (p + r))


def test_wrong_arguments_are_refused() -> None:
    scores = torch.tensor([1.0, float("nan")])
    with pytest.raises(
        DataError, match="a scored image has the score NaN: expected a number, or scored = False"
    ):
        rank(scores, bools("11"))
    with pytest.raises(
        ShapeError, match=r"scores and scored must be \(N,\), scored bool, got \(2,\) and \(2,\)"
    ):
        rank(scores, torch.ones(2))
    with pytest.raises(ShapeError, match="1 ids for 2 scores; there must be one each"):
        rank(scores, bools("10"), ids=["a"])
    with pytest.raises(ShapeError, match="k=0: expected at least 1 image"):
        topk_accuracy(scores, bools("10"), bools("10"), 0)
    with pytest.raises(ShapeError, match=r"\(3,\) truths for \(2,\) scores; there must be one each"):
        topk_accuracy(scores, bools("10"), bools("100"), 1)
    for metric in (recall, precision, f1):
        with pytest.raises(ShapeError, match="flagged and poisoned must be bool of one shape"):
            metric(bools("10"), bools("100"))
        with pytest.raises(ShapeError, match="flagged and poisoned must be bool of one shape"):
            metric(bools("10").int(), bools("10"))
