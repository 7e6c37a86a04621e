"""What a cell measures of a scan, beside an answer key."""

from __future__ import annotations

import dataclasses

import pytest

from fakes import fake_result
from unpoison.attack.plan import Plan, PoisonedImage
from unpoison.attack.ssl_backdoor import PatchAttackConfig, make_triggers
from unpoison.benchmark.cells import measure_scan
from unpoison.encoders.encoder import Preprocessing
from unpoison.records import Box, Geometry


class Seen:
    preprocessing = Preprocessing(geometry=Geometry(32, 32))


def test_each_planted_trigger_is_laid_beside_its_own_findings() -> None:
    """Findings 1 and 2 are the same planted trigger, the second planted one has none."""
    result = fake_result(n_images=20, n_flagged=6)
    ids = list(result.findings["id"])
    (finding,) = result.triggers
    findings = tuple(dataclasses.replace(finding, source_ids=tuple(names)) for names in (ids[:3], ids[3:6]))
    table = result.findings.assign(trigger=[1, 1, 1, 2, 2, 3, *[None] * 14])
    result = dataclasses.replace(result, triggers=findings, findings=table)
    config = PatchAttackConfig(targets=(0, 1), triggers=("seed:1", "seed:2"), size=8)
    poisoned = tuple(PoisonedImage(ids[row], int(row >= 7), Box(0, 0, 8, 8), 32, 32) for row in range(9))
    plan = Plan("ssl-backdoor", 0, {}, make_triggers(config, ("a", "b")), poisoned, 20, (4, 4))
    rows = measure_scan(result, plan, Seen())  # type: ignore[arg-type]
    said = {(row["measure"], row["trigger"]): row["value"] for row in rows if row["trigger"] is not None}
    assert said == {
        ("trigger_recall", 0): pytest.approx(600 / 7),
        ("trigger_findings", 0): 2,
        ("trigger_listed", 0): pytest.approx(500 / 6),  # one of the six is on another list
        ("trigger_recall", 1): 0,
        ("trigger_findings", 1): 0,
        ("trigger_listed", 1): None,
    }
