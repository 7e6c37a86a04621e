import argparse
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import cost

from unpoison.attack.ssl_backdoor import PatchAttackConfig, poison
from unpoison.records import ImageSet
from unpoison.scan.config import ScanConfig
from unpoison.scan.cost import expected_cost

NAMES = ("a", "b")


def scan(name, seed, **values):
    row = {"cell": "here", "case": f"here / {name}", "scan": name, "seed": seed, "n_images": 100}
    row |= {"encoder_passes": 100, "expected_passes": 100, "cpu_seconds": 10.0, "verdict": "poisoned"}
    row["machine"] = {"gpu": None}
    row |= {"top20": 1.0, "top50": 1.0, "catch_rate": 1.0, "recall": 1.0, "precision": 1.0}
    return {**row, **values}


ROWS = [
    {"cell": "here", "case": "here / victim", "seed": 0, "victim": {"linear": {"attack_success": 50.0}}},
    scan("default", 0, encoder_passes=90, top20=0.9, recall=0.9, precision=None),
    scan("default", 1, encoder_passes=110),
    scan("faithful", 0, encoder_passes=1800, cpu_seconds=50.0, top50=0.8),
    scan("faithful", 1, encoder_passes=1100, cpu_seconds=80.0),
]


def test_differences_are_paired_by_seed():
    lines = cost.measured({"rows": ROWS}).splitlines()
    default, faithful = lines[2:]
    assert default.startswith("| here (50) | default | 2 | 100 (90–110) (15.0×) | 10 (6.5×) |")
    # Means over seeds of faithful less default; a precision that one scan lacks is left out of its pair.
    assert "| +5.0 / -10.0, +0.0, +5.0, +0.0 |" in default
    assert faithful.startswith("| here (50) | faithful | 2 | 1450 (1100–1800) | 65 (50–80) |")


def test_a_seed_without_its_faithful_scan_is_in_no_pair():
    text = cost.measured({"rows": ROWS[:-2]})
    assert "×)" not in text and "+" not in text.splitlines()[-1]


def test_the_second_table_is_the_cost_model():
    text = cost.counted({"rows": ROWS})
    expected = expected_cost(ScanConfig().resolve(5000, 32), 5000, 32).expected
    assert f"| 5000 of 32 px | {expected} |" in text and "as a share of those expected" in text


def test_the_profile_shows_the_stages_of_scans_of_the_same_victims():
    rows = [{**row, "stage_seconds": {"explore": 6.0 + row["seed"], "a<b": 1.0}} for row in ROWS[1:]]
    rows += [scan("default", 2, stage_seconds={"explore": 900.0})]
    svg = cost.profile({"rows": rows})
    assert "mean over 2 victims" in svg and "default, 8 s" in svg and "faithful, 8 s" in svg
    assert "a&lt;b" in svg and "a<b" not in svg and "race" not in svg
    ElementTree.fromstring(svg)


def test_a_part_of_the_images_keeps_its_part_of_the_answer_key():
    pixels = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = ImageSet(tuple(f"{i:02}" for i in range(40)), pixels.to(torch.uint8), fingerprint="all")
    labels = torch.arange(40) % 2
    attack = PatchAttackConfig(targets=("a",), triggers=("seed:0",), size=4, rate=0.5)
    images, plan = poison(images, labels, NAMES, attack, 0)
    some, part = cost.first_images(images, labels, plan, 10)
    assert some.ids == images.ids[:10] and some.fingerprint != images.fingerprint
    assert {p.id for p in part.poisoned} == {p.id for p in plan.poisoned} & set(some.ids)


def test_every_cell_is_a_victim_and_its_scans_and_has_its_own_seeds():
    options = argparse.Namespace(seeds=range(5), cases=[cell.name for cell in cost.CELLS])
    jobs = list(cost.jobs(options))
    assert len({job.key for job in jobs}) == len(jobs)
    for cell in cost.CELLS:
        own = [job for job in jobs if job.case.startswith(cell.name)]
        assert len(own) == cell.seeds * (1 + len(cell.scans))
    wider = replace(cost.CELLS[0], images=cost.CELLS[0].images + 1)
    assert cost.job(wider, 0, "default", None).key != cost.job(cost.CELLS[0], 0, "default", None).key
    assert cost.SCANS["faithful"].faithful and not cost.SCANS["default"].faithful


@pytest.mark.parametrize("cell", cost.CELLS, ids=lambda cell: cell.name)
def test_the_scanned_part_is_no_more_than_there_is(cell):
    assert isinstance(cell.case, common.Case) and cell.images <= cell.data.train * cell.data.classes
