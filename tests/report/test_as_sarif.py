"""Findings for boards: the parts of SARIF 2.1.0 that they require, and one result per flagged image."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pytest

from fakes import fake_result, with_benign_pattern
from unpoison.records import ScanResult
from unpoison.report import as_sarif
from unpoison.report.as_sarif import audit_as_sarif, scan_as_sarif


def only_run(log: dict[str, Any]) -> dict[str, Any]:
    """The run of a log, after a look at what the format requires of any."""
    log = json.loads(json.dumps(log))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "unpoison" and driver["semanticVersion"]
    for result in run["results"]:
        rule = driver["rules"][result["ruleIndex"]]
        assert rule["id"] == result["ruleId"]
        assert rule["defaultConfiguration"]["level"] == result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"].isascii()
        assert len(result["partialFingerprints"]["id/v1"]) == 64
    return run  # type: ignore[no-any-return]


def named(run: dict[str, Any], rule: str) -> list[str]:
    return [
        unquote(result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"])
        for result in run["results"]
        if result["ruleId"] == rule
    ]


def test_every_flagged_image_is_a_result_and_every_skipped_one_a_note() -> None:
    result = fake_result("poisoned", skipped={"broken.png": "no image", "huge.png": "too many pixels"})
    run = only_run(scan_as_sarif(result))
    assert sorted(named(run, "UNP001")) == sorted(result.flagged) != []
    skipped = result.findings[result.findings["skip_reason"].notna()]
    assert named(run, "UNP004") == list(skipped["id"]) != []
    assert run["properties"]["verdict"] == "poisoned"
    assert run["invocations"][0]["toolExecutionNotifications"] == []
    bases = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uriBaseId"] for r in run["results"]}
    assert bases == {"IMAGES"}


def test_no_evidence_has_no_result_but_for_what_was_skipped() -> None:
    assert named(only_run(scan_as_sarif(fake_result("no_evidence"))), "UNP001") == []


def test_an_inconclusive_scan_says_why() -> None:
    result = fake_result("inconclusive")
    (said,) = only_run(scan_as_sarif(result))["invocations"][0]["toolExecutionNotifications"]
    assert said["level"] == "warning" and said["message"]["text"].startswith("inconclusive: ")


def test_only_an_overlay_that_is_obeyed_is_a_warning() -> None:
    result = with_benign_pattern(fake_result("inconclusive"))
    assert named(only_run(scan_as_sarif(result)), "UNP005") == []
    pattern = replace(result.benign_patterns[0], steers=True, concentration=1.02)
    result = replace(result, benign_patterns=(pattern,))
    assert named(only_run(scan_as_sarif(result)), "UNP005") == list(pattern.source_ids)


def test_a_board_gets_no_more_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_sarif, "MOST_RESULTS", 3)
    run = only_run(scan_as_sarif(fake_result("poisoned")))
    assert len(run["results"]) == 3
    assert (
        "all are in findings.parquet"
        in run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]
    )


def test_names_from_strangers_are_quoted() -> None:
    result = fake_result("poisoned")
    findings = result.findings.copy()
    row = findings.index[findings["flagged"].astype(bool)][0]
    findings.loc[row, "id"] = "a b/\u202e<x>\n.png"
    run = only_run(scan_as_sarif(ScanResult(result.verdict, findings, (), result.evidence, result.summary)))
    assert "a b/\u202e<x>\n.png" in named(run, "UNP001")


@pytest.mark.parametrize(("verdict", "count"), [("poisoned", 1), ("no_evidence", 0), ("inconclusive", 0)])
def test_an_audit_is_one_result_at_most(verdict: str, count: int) -> None:
    summary = {"verdict": verdict, "mask_share": 0.04, "encoder": "my encoder.pth", "reason": "no reference"}
    run = only_run(audit_as_sarif(summary))
    assert named(run, "UNP002") == ["my encoder.pth"] * count
