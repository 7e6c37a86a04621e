"""A scan's findings beside the truth."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from unpoison.errors import DataError
from unpoison.evaluate.scan_quality import score_scan
from unpoison.evaluate.truth import Truth


def a_truth() -> Truth:
    """Images a and b carry a trigger in view, c one that was cropped away, d and e none, f is poisoned and skipped."""
    boxes = torch.tensor(
        [[4, 4, 8, 8], [10, 10, 8, 8], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [2, 2, 8, 8]]
    )
    poisoned = torch.tensor([True, True, True, False, False, True])
    return Truth(tuple("abcdef"), poisoned, boxes, torch.where(poisoned, 0, -1))


def some_findings(nullable: bool = False) -> pd.DataFrame:
    findings = pd.DataFrame(
        {
            "id": list("abcdef"),
            "cluster": [0, 0, 1, 1, 2, None],
            "scored": [True, True, True, True, False, False],
            "poison_score": [9.0, 8.0, 6.0, 7.0, None, None],
            "box_x": [4, 14, 0, 0, None, None],
            "box_y": [4, 10, 0, 0, None, None],
            "box_w": [8, 8, 8, 8, None, None],
            "box_h": [8, 8, 8, 8, None, None],
            "poison_probability": [0.9, 0.9, 0.1, 0.8, 0.0, None],
            "flagged": [True, True, False, True, False, False],
            "skip_reason": [None, None, None, None, None, "truncated"],
        }
    )
    return findings.convert_dtypes() if nullable else findings


@pytest.mark.parametrize("nullable", [False, True])
def test_every_figure_by_hand(nullable: bool) -> None:
    quality = score_scan(some_findings(nullable), a_truth(), ks=(1, 2, 3, 10))
    assert (quality.n_images, quality.n_poisoned, quality.n_scored, quality.n_scored_poisoned) == (6, 4, 4, 3)
    assert [top.accuracy for top in quality.top] == [1, 1, pytest.approx(2 / 3), pytest.approx(3 / 4)]
    assert [top.n for top in quality.top] == [1, 2, 3, 4]
    assert quality.at(1).iou == 1 and quality.at(1).catch_rate == 1
    assert quality.at(2).iou == pytest.approx((1 + 1 / 3) / 2)  # the second window is off by half its width
    assert quality.at(2).catch_rate == pytest.approx(0.75)
    assert quality.at(3).iou == quality.at(2).iou  # a clean image counts for nothing
    assert quality.at(3).window_accuracy == pytest.approx(2 / 3)
    assert quality.at(10).iou == pytest.approx((1 + 1 / 3 + 0) / 3)  # the cropped-away trigger cannot be hit
    assert quality.at(10).catch_rate == pytest.approx(0.75)
    assert quality.removed == 3
    assert quality.recall == pytest.approx(2 / 4)  # the skipped image counts: it was not found
    assert quality.precision == pytest.approx(2 / 3)
    assert quality.f1 == pytest.approx(4 / 7)
    assert json.loads(json.dumps(quality.to_json()))["top"][0]["k"] == 1


def test_the_order_of_rows_does_not_matter() -> None:
    assert score_scan(some_findings().iloc[::-1], a_truth()) == score_scan(some_findings(), a_truth())


def test_nothing_scored_nothing_flagged() -> None:
    findings = some_findings().assign(scored=False, flagged=False)
    quality = score_scan(findings, a_truth(), ks=(10,))
    top = quality.at(10)
    assert (top.n, top.accuracy, top.window_accuracy, top.iou, top.catch_rate) == (0, None, None, None, None)
    assert (quality.removed, quality.recall, quality.precision, quality.f1) == (0, 0, None, 0)
    with pytest.raises(DataError, match="top 20 was not measured: expected one of 10"):
        quality.at(20)


def test_findings_of_other_images_or_another_kind_are_refused() -> None:
    with pytest.raises(DataError, match="findings of 5 images, truth of 6: expected the same ids in both"):
        score_scan(some_findings().head(5), a_truth())
    with pytest.raises(DataError, match=r"findings lack the column 'flagged': expected findings\.parquet"):
        score_scan(some_findings().drop(columns="flagged"), a_truth())
