import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import growth
import masks
import pictures
import power

from fakes import fake_result
from unpoison.attack.plan import Plan, PoisonedImage
from unpoison.attack.ssl_backdoor import make_triggers
from unpoison.evaluate.truth import read_truth
from unpoison.records import Box, Geometry


def row(kind, rate, detected, verdict="poisoned", **more):
    numbers = {"n_images": 5000, "n_poisoned": round(5000 * rate), "moved": 0.9, "localised": 0.8}
    numbers |= {"recall": 1.0, "precision": 1.0, "stated": 0.5, "stated_smallest": 80}
    return {"kind": kind, "rate": rate, "detected": detected, "verdict": verdict, **numbers, **more}


RESULTS = {
    "rows": [
        row("planted", 0.05, True),
        row("planted", 0.01, True),
        row("planted", 0.01, False, "no_evidence", recall=0.0, precision=None),
        row("victim", 0.01, False),
    ]
}


def test_scans_that_find_the_poison_are_counted_by_rate():
    lines = power.table(RESULTS).splitlines()
    assert lines[2].startswith("| planted | 50 (1 %) | 2 | 50 (3–97) | 50 | – | 90 | 80 |")
    assert lines[3].startswith("| planted | 250 (5 %) | 1 | 100 (5–100) |")
    assert lines[4].endswith("| 1 |")  # poisoned, but by another pattern
    assert "80 poisoned ones or more are found" in power.table(RESULTS)


@pytest.mark.parametrize(("hits", "n", "text"), [(0, 10, "0–26"), (10, 10, "74–100"), (5, 10, "22–78")])
def test_the_interval_is_clopper_and_pearson_s(hits, n, text):
    assert power.interval(hits, n) == text


def planned(result, boxes):
    ids = list(result.findings["id"])
    trigger = make_triggers(power.attack_of(0.05, 0), tuple("abcde"))
    poisoned = tuple(PoisonedImage(ids[i], 0, box, 32, 32) for i, box in enumerate(boxes))
    return Plan("ssl-backdoor", 0, {}, trigger, poisoned, len(ids), (len(boxes),))


def test_a_trigger_counts_as_found_when_most_of_its_sources_are_poisoned():
    result = fake_result(n_images=20, n_flagged=6)
    assert power.found_by(result, planned(result, [Box(0, 0, 8, 8)] * 4))
    assert not power.found_by(result, planned(result, [Box(0, 0, 8, 8)] * 3))
    clean = fake_result("no_evidence", n_images=20)
    assert not power.found_by(clean, planned(clean, [Box(0, 0, 8, 8)] * 4))


def test_windows_are_laid_beside_the_boxes_of_poisoned_images_that_were_scored():
    result = fake_result(n_images=20, n_flagged=6)  # windows of 8 at (4, 4); 12 images are scored
    plan = planned(result, [Box(4, 4, 8, 8), Box(5, 4, 8, 8)] + [Box(20, 20, 8, 8)] * 2)
    truth = read_truth(plan, list(result.findings["id"]), Geometry(32, 32))
    assert power.localised(result, truth) == 0.25
    unscored = result.findings.assign(scored=False)
    assert power.localised(type(result)("poisoned", unscored, (), result.evidence, {}), truth) is None


def test_the_share_of_a_trigger_inside_its_window():
    boxes = torch.tensor([[10, 10, 8, 8]] * 4)  # x, y, width, height
    corners = torch.tensor([[10, 10], [9, 10], [14, 10], [20, 20]])  # top, left
    seen = masks.caught(corners, boxes, 9)
    assert seen["catch_rate"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert seen["whole"] == seen["nearly_whole"] == 0.5


def test_strategies_are_compared_at_the_same_place_of_every_victim():
    def found(strategy, passes, rate):
        return {
            "strategy": strategy,
            "masks": passes,
            "passes": passes,
            "catch_rate": rate,
            "nearly_whole": 1.0,
        }

    rows = [
        {"case": "c", "seed": seed, "found": [found("grid", 49, 0.8 + seed / 10), found("random", 64, 0.5)]}
        for seed in (0, 1)
    ]
    lines = masks.table({"rows": rows}).splitlines()
    assert lines[2] == "| grid | 49 | 49 | 0.85 (0.80–0.90) | 100 |"
    panel = masks.plot({"rows": rows})
    assert [line.name for line in panel.series] == ["grid", "random"]
    assert panel.series[0].points[0].y == pytest.approx(0.85) and panel.series[0].points[0].n == 2


def grown(n, clusters, passes):
    stages = {"clusters": 1.0, "classifier": 2.0}
    row = {"case": f"scan {n}", "n_images": n, "n_poisoned": n // 20, "clusters": clusters}
    quality = {"top50": 1.0, "recall": 1.0, "precision": 1.0, "verdict": "poisoned"}
    cost = {"encoder_passes": passes, "cpu_seconds": passes / 1e4, "machine": {"gpu": None}}
    return {**row, **cost, "stage_seconds": stages, **quality}


def test_the_exponent_is_that_of_the_search_and_of_all():
    rows = [grown(n, n // 100, n + 10 * n) for n in (2000, 5000, 20_000)]
    rows.append({"case": "features 100000", "n_images": 100_000, "clusters": 800, "cpu_seconds": 7.0})
    text = growth.table({"rows": rows})
    assert (
        "all passes as N^1.00, the search's passes as N^1.00, CPU seconds on a processor alone as N^1.00"
        in text
    )
    assert "beside a GPU" not in text
    assert "1000 for 50; 1000 for 200" in text and "| 100000, expected |" in text and "| 7.0 |" in text
    assert "Too few scans" in growth.table({"rows": rows[:1]})
    assert growth.exponent([(1, 2.0), (100, 20.0)]) == pytest.approx(0.5)


def test_pictures_are_small_drawn_on_white_and_only_where_there_are_results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    pictures.draw("power", power.plot)
    assert not list(tmp_path.iterdir())
    common.write_json_atomically(tmp_path / "power.json", RESULTS)
    pictures.draw("power", power.plot)
    svg = (tmp_path / "power.svg").read_text(encoding="utf-8")
    assert 'fill="#fff"' in svg and "currentColor" not in svg and len(svg) < 60_000
    assert svg.count("<polyline") == 3


def test_several_values_of_one_place_become_mean_and_deviation():
    line = pictures.series("x", [(1, 2.0), (1, 4.0), (2, None), (3, 5)])
    assert [(p.x, p.y, p.n) for p in line.points] == [(1, 3, 2), (3, 5, 1)]
    assert line.points[0].deviation == pytest.approx(2**0.5) and line.points[1].deviation == 0
