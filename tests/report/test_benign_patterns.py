"""What recurs and is no attack: told on the page and in the terminal, kept in the run folder, never an alarm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fakes import fake_result, with_benign_pattern
from unpoison.report.as_html import as_html
from unpoison.report.as_text import as_text
from unpoison.report.document import make_report
from unpoison.report.folder import write_report
from unpoison.runs import RunFolder, load_result

SENTENCE = "The same pixels lie in 7 of the images that were examined."


@pytest.mark.parametrize("verdict", ["no_evidence", "poisoned"])
def test_page_and_terminal_tell_of_it(verdict: str) -> None:
    result = with_benign_pattern(fake_result(verdict))  # type: ignore[arg-type]
    report = make_report(result)
    (pattern,) = report.benign_patterns
    assert pattern.sentence.startswith(SENTENCE) and "moved 2% into one cluster" in pattern.sentence
    assert report.headline == make_report(fake_result(verdict)).headline  # type: ignore[arg-type]
    page = as_html(report)
    assert "What recurs and is no attack" in page and page.count('id="pattern-1"') == 1
    assert "No alarm: recurring pattern 1." in as_text(report)
    assert "such as class/0033.png" in as_text(report)


def test_the_terminal_tells_of_one_at_length_and_of_those_like_it_in_a_line() -> None:
    result = with_benign_pattern(fake_result("no_evidence"))
    (one,) = result.benign_patterns
    others = [
        replace(one, n_sources=n, flip_rate=0.03 * n, control_rate=0.2, source_ids=(f"x/{n}.png",))
        for n in (2, 3)
    ]
    steering = replace(one, steers=True, source_ids=("mark.png",))
    text = as_text(make_report(replace(result, benign_patterns=(one, *others, steering))), width=1000)
    assert text.count("No alarm: recurring pattern") == 2 and "such as mark.png" in text
    assert (
        "2 more like it, each in at most 3 of the images: pasted they moved at most 9%, and shuffled 20%."
        in text
    )
    assert "such as x/2.png, x/3.png" in text
    assert as_html(make_report(replace(result, benign_patterns=(one, *others)))).count('id="pattern-') == 3


def test_without_one_nothing_is_said() -> None:
    report = make_report(fake_result("no_evidence"))
    assert report.benign_patterns == () and "steers nothing" not in as_html(report) + as_text(report)


def test_names_from_strangers_are_escaped() -> None:
    ids = [f"<img src=x>/{row}" for row in range(40)]
    assert "<img src=x>" not in as_html(make_report(with_benign_pattern(fake_result("no_evidence", ids=ids))))


def test_it_comes_back_from_the_run_folder_with_its_picture(tmp_path: Path) -> None:
    result = with_benign_pattern(fake_result("no_evidence"))
    run = RunFolder(tmp_path / "run", {})
    write_report(run.path, result)
    run.save(result)
    back = load_result(run.path)
    (pattern,), (before,) = back.benign_patterns, result.benign_patterns
    assert torch.equal(pattern.patches, before.patches) and pattern.boxes == before.boxes
    assert (pattern.source_ids, pattern.flip_rate, pattern.control_rate) == (before.source_ids, 0.02, 0.01)
    with Image.open(run.path / pattern.image) as picture:
        assert picture.width > 0
    assert back.flagged == () and back.verdict == "no_evidence"
    again = RunFolder(run.path, {}, fresh=True)
    assert not (again.path / "benign").exists()


def test_an_overlay_that_steers_is_kept_also_where_its_concentration_is_unknown(tmp_path: Path) -> None:
    result = with_benign_pattern(fake_result("inconclusive"))
    pattern = replace(result.benign_patterns[0], steers=True)
    result.summary["benign_patterns"][0]["steers"] = True
    result = replace(result, benign_patterns=(pattern,))
    assert "it is aimed at no kind of image" in make_report(result).benign_patterns[0].sentence
    folder = RunFolder(tmp_path / "run", {})
    folder.save(result)
    (again,) = load_result(tmp_path / "run").benign_patterns
    assert again.steers and again.concentration is None
