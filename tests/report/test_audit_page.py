import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.audit.decree import Inversion
from unpoison.audit.result import AuditResult
from unpoison.report.audit_page import (
    audit_as_html,
    audit_as_text,
    audit_picture,
    make_audit_report,
    write_audit_report,
)

EVIL = "<script>alert(1)</script>\x1b[2J.pth"


def fake_audit(verdict="poisoned", **summary):
    size = 16
    mask, pattern = torch.zeros(size, size), torch.rand(3, size, size)
    mask[10:15, 10:15] = 1
    curve = torch.stack((torch.linspace(-0.1, 1, 700), torch.linspace(0.5, 0.1, 700), torch.ones(700)), dim=1)
    found = Inversion(mask, pattern, 0.098, 0.995, True, curve)
    examples = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    shares = () if verdict == "inconclusive" else tuple(0.3 + 0.02 * i for i in range(19))
    content = {
        "verdict": verdict,
        "mask_share": 0.098,
        "reached": True,
        "below_paper_threshold": True,
        "p_value": 0.05 if shares else None,
        "collapse_before": -0.01,
        "collapse_after": 0.994,
        "relaxed": None,
        "starts": [{"mask_share": 0.098, "collapse": 0.995, "reached": True, "steps": 700}],
        "second_opinion": {
            "method": "ssl-cleanse",
            "anomaly_index": 7.25,
            "threshold": 2.0,
            "outlier": True,
            "cluster": 1,
            "mask_shares": [0.3, 0.02, 1.0],
            "box": None,
        },
        "scope": {"tested": ["one patch"], "not_tested": ["whole images"]},
        "encoder_passes": 123456,
        "seconds": 12.3,
        "stages": {"clean": 0.3, "start": 12.0},
        "encoder": EVIL,
        "family": "ResNet of 2 parameters",
        "image_size": size,
        "location": EVIL,
        "reference": "reference.json" if shares else None,
        "seed": 0,
        "config": {"gain": 0.99},
        "versions": {"torch": "2"},
        **({"reason": "no reference was given"} if verdict == "inconclusive" else {}),
        **summary,
    }
    return AuditResult(verdict, found, examples, examples, shares, content)


@pytest.mark.parametrize("verdict", ["poisoned", "no_evidence", "inconclusive"])
def test_the_page_is_complete_and_escapes_every_name(verdict):
    page = audit_as_html(make_audit_report(fake_audit(verdict)))
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "default-src 'none'" in page
    assert page.count("<polyline") == 2 and page.count("<img") == 3 + 2 * 5
    assert page.count('class="dot"') == (0 if verdict == "inconclusive" else 19)
    assert "whole images" in page and "{{" not in page


def test_the_words_say_the_verdict_and_what_it_rests_on():
    found = audit_as_text(make_audit_report(fake_audit("poisoned")))
    assert "A patch on 9.8 % of the image" in found and "19 clean encoders" in found and "p = 0.05" in found
    nothing = audit_as_text(make_audit_report(fake_audit("no_evidence")))
    assert "That is no proof of innocence" in nothing
    unknown = audit_as_text(make_audit_report(fake_audit("inconclusive")))
    assert "No reference was given." in unknown and "--add-to-reference" in unknown


def test_the_second_opinion_is_shown_and_left_out_where_there_is_none():
    page = audit_as_html(make_audit_report(fake_audit()))
    assert "A second opinion" in page and "never reached" in page and "needs least" in page
    text = audit_as_text(make_audit_report(fake_audit()))
    assert "7.2" in text and "second opinion (SSL-Cleanse), above its 2; no part of the verdict" in text
    without = make_audit_report(fake_audit(second_opinion=None))
    assert without.needed == () and "A second opinion" not in audit_as_html(without)


def test_a_search_without_success_says_so():
    relaxed = {"gain": 0.5, "reached": True, "mask_share": 0.2}
    report = make_audit_report(fake_audit("no_evidence", reached=False, mask_share=1.0, relaxed=relaxed))
    facts = {fact.name: fact for fact in report.key_figures}
    assert facts["smallest mask (PL1)"].value == "none"
    assert facts["mask of the relaxed search"].value == "20.0 %"
    assert "50% of the way" in facts["mask of the relaxed search"].note


def test_curves_stay_in_the_frame_and_are_thinned():
    points = make_audit_report(fake_audit()).curves[0].split()
    assert len(points) <= 300
    pairs = np.array([[float(v) for v in point.split(",")] for point in points])
    assert pairs.min() >= 0 and pairs[:, 0].max() <= 600 and pairs[:, 1].max() <= 160


def test_the_picture_has_three_rows_and_the_files_are_written(tmp_path):
    result = fake_audit()
    sheet = audit_picture(result)
    assert sheet.shape == (3 * 100 + 4, 5 * 100 + 4, 3)
    assert (sheet[4 + 10 * 6, 4 + 10 * 6] == 255).all() and (sheet[4, 4] == 0).all()  # the mask
    page = write_audit_report(tmp_path, result)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    with Image.open(tmp_path / "trigger.png") as image:
        assert np.array_equal(np.asarray(image), sheet)


def test_the_report_is_a_frozen_record():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_audit_report(fake_audit()).headline = "x"
