"""Findings as SARIF 2.1.0, which boards for code scanning read: one result per flagged image, none for a clean scan.

An image is named by its id below a base `IMAGES`, for its folder may lie elsewhere where the file is read. What a board
refuses is not written: beyond `MOST_RESULTS` the most suspicious are listed, and a notification says where all are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import unpoison
from unpoison.records import ScanResult

__all__ = ["MOST_RESULTS", "audit_as_sarif", "scan_as_sarif"]

MOST_RESULTS = 5000
"""Results of one run that boards keep."""

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_RULES = {
    "UNP001": (
        "poisoned-image",
        "error",
        "The image carries a trigger that was confirmed, or what a detector looks for.",
    ),
    "UNP002": (
        "backdoored-encoder",
        "error",
        "A patch as small as in backdoored encoders makes all images alike.",
    ),
    "UNP004": ("unreadable-input", "note", "The image could not be read, and was not scanned."),
    "UNP005": (
        "recurring-overlay",
        "warning",
        "The encoder obeys a pattern that lies on images of all kinds.",
    ),
}


def scan_as_sarif(result: ScanResult) -> dict[str, Any]:
    """A scan as one SARIF log, in plain values."""
    findings = result.findings
    suspicion = findings["poison_probability"].fillna(findings["poison_score"]).fillna(0)
    findings = findings.loc[suspicion.sort_values(ascending=False, kind="stable").index]
    found = []
    for row in findings[findings["flagged"].to_numpy(dtype=bool, na_value=False)].itertuples():
        trigger = getattr(row, "trigger", None)
        known = trigger is not None and trigger == trigger and int(trigger) > 0
        carries = f" It carries trigger {int(trigger)}." if known and trigger is not None else ""
        found.append(_of_image(str(row.id), "UNP001", f"This image is flagged as poisoned.{carries}"))
    for number, pattern in enumerate(result.benign_patterns, start=1):
        if pattern.steers:
            text = f"This image carries recurring pattern {number}, which the encoder obeys."
            found += [_of_image(id_, "UNP005", text) for id_ in pattern.source_ids]
    skipped = findings[findings["skip_reason"].notna()]
    for id_, reason in zip(skipped["id"], skipped["skip_reason"], strict=True):
        found.append(_of_image(str(id_), "UNP004", f"Not scanned: {reason}"))
    return _log(result.summary, found)


def audit_as_sarif(summary: Mapping[str, Any]) -> dict[str, Any]:
    """An audit as one SARIF log; from the content of its verdict.json."""
    found = []
    if summary["verdict"] == "poisoned":
        text = (
            f"This encoder is backdoored: a mask of {summary['mask_share']:.1%} of the image makes all images alike, "
            "less than nearly all clean encoders of its family need."
        )
        found.append(_result("UNP002", text, str(summary["encoder"]), None))
    return _log(summary, found)


def _of_image(id_: str, rule: str, text: str) -> dict[str, Any]:
    return _result(rule, text, id_, "IMAGES")


def _result(rule: str, text: str, place: str, base: str | None) -> dict[str, Any]:
    location = {"uri": quote(place, errors="replace")} | ({} if base is None else {"uriBaseId": base})
    return {
        "ruleId": rule,
        "ruleIndex": list(_RULES).index(rule),
        "level": _RULES[rule][1],
        "message": {"text": text},
        "locations": [{"physicalLocation": {"artifactLocation": location}}],
        "partialFingerprints": {"id/v1": hashlib.sha256(place.encode("utf-8", "replace")).hexdigest()},
    }


def _log(summary: Mapping[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    said = []
    if summary["verdict"] == "inconclusive":
        said.append(f"inconclusive: {summary.get('reason', '')}")
    if len(found) > MOST_RESULTS:
        said.append(
            f"the first {MOST_RESULTS} of {len(found)} results; all are in findings.parquet of the run folder"
        )
    driver = {
        "name": "unpoison",
        "semanticVersion": unpoison.__version__,
        "rules": [
            {
                "id": id_,
                "name": name,
                "shortDescription": {"text": text},
                "defaultConfiguration": {"level": level},
            }
            for id_, (name, level, text) in _RULES.items()
        ],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [
                    {"level": "warning", "message": {"text": text}} for text in said
                ],
            }
        ],
        "results": found[:MOST_RESULTS],
        "properties": {key: summary.get(key) for key in ("verdict", "alpha", "p_value", "scope", "seed")},
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
