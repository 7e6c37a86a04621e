"""The benchmark of detectors: what is measured of a score, and the tables."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import detectors


def test_a_perfect_score_and_a_threshold_that_poison_raises():
    def score(values):
        return values.flatten().float()

    usual, clean = torch.arange(200.0), torch.arange(200.0)
    right, taken = torch.arange(200) % 2 == 0, torch.arange(100) < 70
    row = detectors.measure(
        score,
        usual,
        clean,
        torch.arange(500.0, 600.0),
        torch.full((5,), 1000.0),
        right=right,
        taken=taken,
    )
    assert row["auroc"] == 1.0 and row["images_per_second"] > 0 and row["latency_ms"] > 0
    at = row["at 1%"]
    assert at["best"] == 1.0 and at["clean"]["found"] == 1.0 and at["clean"]["wrong"] <= 0.01
    # No triggered image passes; clean ones do but for one in a hundred, and half of those are classified rightly.
    assert at["clean"]["through"] == {"accuracy": pytest.approx(0.5, abs=0.01), "attack_success": 0.0}
    # Two of 200 calibration images are poisoned: at 1 % they are all that may lie above.
    assert at["dirty"]["wrong"] <= 0.005 and row["at 5%"]["dirty"]["found"] == 1.0


def test_ties_count_half():
    assert detectors.auroc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.875)


def test_every_case_is_a_job_and_settings_decide_whether_it_is_kept():
    options = argparse.Namespace(seeds=[0, 1], cases=detectors.CASES, device="cpu")
    jobs = list(detectors.jobs_of(detectors.SETTING, options))
    assert len(jobs) == 2 * len(detectors.CASES) == len({job.key for job in jobs})
    other = detectors.jobs_of(replace(detectors.SETTING, dede_epochs=1), options)
    assert {job.key for job in jobs}.isdisjoint(job.key for job in other)


def test_the_table_has_a_line_per_method_and_one_per_strength():
    through = {"accuracy": 0.55, "attack_success": 0.07}
    at = {
        "best": 0.5,
        "clean": {"found": 0.4, "wrong": 0.01, "through": through},
        "dirty": {"found": 0.1, "wrong": 0.0},
    }
    measured = {
        "auroc": 0.9,
        "at 1%": at,
        "at 5%": at,
        "images_per_second": 10.0,
        "latency_ms": 3.0,
    }
    probe = {"linear": {"attack_success": 50.0, "accuracy": 60.0}}
    rows = [
        {
            "case": "drupe, in",
            "seed": 0,
            "settings": {"setting": {"calibration": 200, "judged": 100, "poisoncam": 100}},
            "unscreened": {"accuracy": 0.6, "attack_success": 0.9},
            "victim": probe,
            "control": probe,
            "methods": {"dede": measured, "poisoncam": measured},
        },
        {
            "case": "patch, removed",
            "seed": 0,
            "victim": probe,
            "control": probe,
            "removed": {"dede": {"recall": 0.25, "wrong": 0.05, "probes": probe}},
        },
        {
            "case": "speed",
            "seed": 0,
            "machine": {"threads": 2, "gpu": None},
            "speed": {"dede": {"images_per_second": 900.0, "latency_ms": 1.5, "peak_memory_mib": 800}},
        },
        {
            "case": "ctrl strength",
            "seed": 0,
            "strengths": {
                "5 %": {"victim": probe, "control": probe, "waves": {"recall": 1.0, "precision": None}}
            },
        },
    ]
    first, rates, removed, second, speed = detectors.table({"rows": rows}).split("\n\n")
    assert len(first.splitlines()) == 4 and "0.981 (notebook" in first and "50 / 50" in first
    assert "7 / 55 (90 / 60)" in first
    assert rates.endswith("`in`, clean calibration images: 0 of 4; `in`, 1 % of these poisoned: 0 of 4.")
    assert speed.splitlines()[-1] == "| dede | 900 | 1.5 | 800 | 2 threads |"
    assert removed.splitlines()[-1] == "| patch, removed | 1 | dede | 25 / 5.0 | 50 (50; 50) | 60 (60; 60) |"
    assert "40 / 1.0" in first and second.splitlines()[-1].startswith("| 5 % | 1 | 50 (50) | 60 | 100 / –")
