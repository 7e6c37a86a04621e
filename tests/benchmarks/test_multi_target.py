import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import multi_target

from fakes import fake_result
from unpoison.attack.plan import Plan, PoisonedImage
from unpoison.attack.ssl_backdoor import make_triggers
from unpoison.encoders.encoder import Preprocessing
from unpoison.records import Box, Geometry

NAMES = ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("case", multi_target.CASES, ids=lambda case: case.name)
def test_every_pair_has_a_target_and_a_trigger_of_its_own(case):
    for seed in range(5):
        attack = multi_target.attack_of(case, seed)
        assert len(set(attack.targets)) == len(set(attack.triggers)) == case.triggers


class Seen:
    preprocessing = Preprocessing(geometry=Geometry(32, 32))


def test_each_planted_trigger_is_laid_beside_its_own_finding():
    """Findings 1 and 2 are the same planted trigger, the second planted one has none."""
    result = fake_result(n_images=20, n_flagged=6)
    ids = list(result.findings["id"])
    (finding,) = result.triggers
    sources = (ids[:3], ids[3:6])
    findings = tuple(dataclasses.replace(finding, source_ids=tuple(names)) for names in sources)
    table = result.findings.assign(trigger=[1, 1, 1, 2, 2, 2, *[None] * 14])
    result = dataclasses.replace(result, triggers=findings, findings=table)
    attack = multi_target.attack_of(multi_target.CASES[0], 0)
    poisoned = tuple(PoisonedImage(ids[row], int(row >= 7), Box(0, 0, 8, 8), 32, 32) for row in range(9))
    plan = Plan("ssl-backdoor", 0, {}, make_triggers(attack, NAMES), poisoned, 20, (4, 4))
    first, second = multi_target.by_trigger(result, plan, Seen())
    assert (first["n_poisoned"], first["n_findings"], first["listed_rightly"]) == (7, 2, 1.0)
    assert first["recall"] == pytest.approx(6 / 7)
    assert (second["n_poisoned"], second["n_findings"], second["recall"]) == (2, 0, 0.0)
    assert second["listed_rightly"] is None

    pair = {"attack_success": 50.0}
    scan = {
        "triggers": [first, second],
        "n_findings": 3,
        "precision": 1.0,
        "verdict": "poisoned",
        "seconds": 2.0,
    }
    row = {"case": "two", "seed": 0, "victim": {"pairs": [pair]}, "control": {"pairs": [pair]}, "scan": scan}
    line = multi_target.table({"rows": [row]}).splitlines()[-1]
    assert "| 50 (50) | 0 of 2 | 1 |" in line and "1 × poisoned" in line
