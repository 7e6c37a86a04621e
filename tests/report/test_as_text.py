from fakes import fake_result
from unpoison.report.as_text import as_text
from unpoison.report.document import make_report


def test_the_summary_leads_with_the_verdict_and_ends_with_what_to_do():
    lines = as_text(make_report(fake_result(), location="images", run="run")).split("\n")
    assert lines[0].startswith("These images are poisoned")
    assert any("moved 71% of them" in line for line in lines)
    assert "      unpoison clean images --run run --out CLEANED" in lines


def test_skipped_images_are_counted_and_some_are_named():
    skipped = {f"{row}.png": "truncated" for row in range(8)}
    text = as_text(make_report(fake_result(skipped=skipped)))
    assert "not the same as clean (8)" in text and "4.png: truncated" in text and "and 3 more" in text


def test_no_evidence_is_explained():
    assert "no proof that the images are\nclean" in as_text(make_report(fake_result("no_evidence")))


def test_no_control_character_reaches_the_terminal():
    text = as_text(
        make_report(fake_result(ids=["\x1b]0;x\x07.png", *map(str, range(39))], skipped={"\x1bc": "\x9b"}))
    )
    assert all(c in "\n\u202f" or c.isprintable() for c in text)
