import pytest
import torch

from fakes import fake_result
from unpoison.records import ImageSet
from unpoison.report.document import MOST_THUMBNAILS, REPORT_SCHEMA, make_report, percent, shorten


def test_a_poisoned_set_is_told_with_trigger_and_numbers():
    report = make_report(fake_result(), location="my images", run="run", command="unpoison scan x")
    assert report.schema == REPORT_SCHEMA and report.verdict == "poisoned"
    assert report.headline == (
        "These images are poisoned: a planted trigger was confirmed, and 6 of 40 images are flagged."
    )
    assert "at most 1% of scans" in report.meaning
    (trigger,) = report.triggers
    assert trigger.sentence == (
        "Pasted on 500 images that the search never saw, this patch moved 71% of them into cluster 7. "
        "The same patch with its pixels shuffled, at the same places, moved 2%."
    )
    assert {fact.name: fact.value for fact in trigger.facts}["p-value"] == "< 10⁻¹²"
    assert trigger.patch.pixels.shape == (224, 224, 3) and trigger.n_sources == 6
    commands = [step.command for step in report.next_steps if step.command]
    assert commands == ["unpoison clean 'my images' --run run --out CLEANED"]
    assert [image.id for image in report.flagged] == [f"class/{row:04d}.png" for row in range(6)]
    assert len(report.candidates) == 12 and report.candidates[0].flagged
    assert sum(stage.share for stage in report.stages) == pytest.approx(1)
    assert {fact.name: fact.value for fact in report.settings}["n_flips"] == "not set"


@pytest.mark.parametrize(
    ("n_unscored", "detail"), [(25, "the rest through their cluster"), (0, "all that could be read")]
)
def test_the_rest_is_only_named_where_there_is_one(n_unscored, detail):
    result = fake_result("no_evidence")
    result.summary["n_unscored"] = n_unscored
    facts = {fact.name: fact for fact in make_report(result, location="x").key_figures}
    assert facts["examined one by one"].note == detail


def test_a_trigger_says_how_its_images_lie_where_that_is_known():
    result = fake_result("poisoned")
    (aimed,) = [fact for fact in make_report(result).triggers[0].facts if fact.name == "aimed"]
    assert aimed.value == "3.3 times"
    result.summary["triggers"][0]["concentration"] = None  # too few images were left
    assert all(fact.name != "aimed" for fact in make_report(result).triggers[0].facts)


def test_no_evidence_says_what_was_looked_for_and_never_clean():
    report = make_report(fake_result("no_evidence"))
    assert report.headline == "No evidence of a planted trigger in 40 images."
    assert (
        "searched for a small patch" in report.meaning
        and "no proof that the images are clean" in report.meaning
    )
    assert report.triggers == () and report.n_flagged == 0 and report.flagged == ()
    assert report.candidates


def test_inconclusive_gives_the_reason_and_warns():
    report = make_report(fake_result("inconclusive", reason="only 12 of 40 images could be read"))
    assert report.meaning.startswith("Only 12 of 40 images could be read. ")
    assert "Do not read this as “clean”" in report.meaning


def test_flagged_images_take_their_pixels_from_wherever_there_are_some():
    result = fake_result(n_images=40, n_flagged=30)
    without = make_report(result)
    assert len(without.flagged) == 12 and len(without.flagged_names) == 18 and without.n_flagged == 30
    pixels = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    images = ImageSet(tuple(result.findings["id"]), pixels)
    within = make_report(result, images=images)
    assert len(within.flagged) == 30 and within.flagged_names == ()


def test_thumbnails_are_capped_and_the_rest_is_named():
    result = fake_result(n_images=1203, n_flagged=1201, size=8)
    pixels = torch.zeros(1203, 3, 8, 8, dtype=torch.uint8)
    report = make_report(result, images=ImageSet(tuple(result.findings["id"]), pixels))
    assert (len(report.flagged), len(report.flagged_names), report.n_flagged) == (MOST_THUMBNAILS, 201, 1201)


def test_skipped_images_are_listed_with_their_reason():
    report = make_report(fake_result(skipped={"a.png": "truncated", "b.png": "too large"}))
    assert [(fact.name, fact.value) for fact in report.skipped] == [
        ("a.png", "truncated"),
        ("b.png", "too large"),
    ]
    assert report.n_skipped == 2


@pytest.mark.parametrize(
    ("scope", "tested", "untested"),
    [
        (None, (), ()),
        ("small patches", ("Small patches.",), ()),
        (["a", "b."], ("A.", "B."), ()),
        ({"tested": ["a"], "not_tested": "b"}, ("A.",), ("B.",)),
        ({"tested": {"n_images": 3}, "coverage": 0.5}, ("n images: 3", "coverage: 0.5"), ()),
    ],
)
def test_a_scope_of_any_form_becomes_sentences(scope, tested, untested):
    report = make_report(fake_result(scope=scope))
    assert (report.tested, report.untested) == (tested, untested)


def test_a_summary_with_little_in_it_is_enough():
    result = fake_result()
    result.summary.clear()
    report = make_report(result)
    assert report.headline.startswith("These images are poisoned") and report.settings == ()
    assert report.triggers[0].sentence.startswith("Pasted on images that")


@pytest.mark.parametrize("bad", ["a\nb.png", "\x1b[31m.png", "gnp.\u202egpj", "\u2028", "a\x00b"])
def test_what_could_steer_a_terminal_is_written_as_an_escape(bad):
    report = make_report(fake_result(ids=[bad, *map(str, range(39))], skipped={bad + "x": bad}))
    texts = [report.candidates[0].label, report.flagged[0].label, report.triggers[0].sources[0]]
    texts += [report.skipped[0].name, report.skipped[0].value]
    assert all(text.isprintable() and "\\" in text for text in texts)


def test_long_names_keep_both_ends():
    assert shorten("x" * 300 + ".png", 40).endswith(".png") and len(shorten("x" * 300, 40)) == 40


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0%"), (0.0012, "0.12%"), (0.5, "50%"), (0.995, "99.5%"), (1, "100%")]
)
def test_percent(share, text):
    assert percent(share) == text
