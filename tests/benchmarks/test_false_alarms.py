import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import false_alarms

from unpoison.records import ImageSet


def row(case="clean", verdict="no_evidence", p_value=None, n_flagged=0, **more):
    numbers = {"n_benign_patterns": 0, "train_seconds": 1.0, "scan_seconds": 2.0, **more}
    return {"case": case, "verdict": verdict, "p_value": p_value, "n_flagged": n_flagged, **numbers}


def test_alarms_stand_beside_their_bound():
    said = false_alarms.bound([row()] * 100)
    assert said.startswith("**0 alarms in 100 scans of clean images**; 0 of them flagged")
    # 1 - 0.05 ** (1 / 100), and P(X >= 4) = 0.018 <= 0.05 < P(X >= 3) = 0.079 at a rate of 0.01.
    assert "the rate is below 3.0 %" in said and "there would be 4 alarms or more" in said
    alarmed = false_alarms.bound([row(verdict="poisoned", n_flagged=3)] * 2 + [row()] * 98)
    assert alarmed.startswith("**2 alarms in 100 scans of clean images**; 2 of them")
    assert "2 or more with one of 0.26" in alarmed
    assert "is below 100.0 %" in false_alarms.bound([row(verdict="poisoned")])


def test_small_p_values_are_those_of_recurring_patches_and_not_the_screen_s():
    found = [[{"p_value": 0.03}, {"p_value": 1.0}], [{"p_value": 0.3}], [], [{"p_value": 1.0}]]
    rows = [row(p_value=1e-9, finalists=finalists) for finalists in found]
    text = false_alarms.p_values([*rows, row(p_value=1e-9)])  # the last one does not say
    assert text.splitlines()[-1] == "| 3 of 4 | 4 | 0 | 1 | 1 | 1 | 2 |"


def test_what_is_not_clean_counts_apart():
    rows = [row(p_value=0.5), row(case="not clean: a logo", verdict="poisoned", n_flagged=9)]
    text = false_alarms.table({"rows": rows})
    assert "**0 alarms in 1 scans" in text
    assert "| not clean: a logo | 1 | 1 × poisoned | – | 9 | 0 |" in text
    assert "alarms" not in false_alarms.table({"rows": rows[1:]})


def test_there_are_a_hundred_clean_scans_and_all_are_different():
    clean = [case for case in false_alarms.CASES if not case.planted]
    assert sum(case.seeds for case in clean) >= 100
    keys = {common.digest(false_alarms.settings(case, 0)) for case in false_alarms.CASES}
    assert len(keys) == len(false_alarms.CASES)


def images(n):
    pixels = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return ImageSet(tuple(map(str, range(n))), pixels.to(torch.uint8), fingerprint="x")


@pytest.fixture
def split(monkeypatch):
    made = common.Split(images(500), torch.arange(500) % 5, tuple("abcde"))
    monkeypatch.setattr(common, "load_split", lambda *_: made)
    return made


def test_every_seed_draws_its_own_images(split, monkeypatch):
    monkeypatch.setattr(false_alarms, "COUNT", 100)
    case = next(case for case in false_alarms.CASES if case.folder == "digits")
    first, second = (false_alarms.drawn(case, seed) for seed in (0, 1))
    assert len(first) == 100 and first.ids != second.ids and first.fingerprint != second.fingerprint
    assert false_alarms.drawn(case, 0).ids == first.ids


@pytest.mark.parametrize(("planted", "changed"), [("logo", 1), ("uniform", 50), ("ctrl", 50)])
def test_what_is_planted_is_on_as_many_images_as_it_says(split, planted, changed):
    case = replace(false_alarms.CASES[-1], planted=planted)
    shown = false_alarms.planted(case, 2)
    differs = (shown.pixels != split.images.pixels).flatten(1).any(dim=1)
    assert int(differs.sum()) == changed and shown.fingerprint != split.images.fingerprint
    classes = set(split.labels[differs].tolist())
    assert classes == ({2} if planted != "uniform" else set(range(5)))
