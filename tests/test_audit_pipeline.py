import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import unpoison
from audit_toys import BOX, clean_images, toy
from report.test_schemas import fits
from unpoison.audit.decree import DecreeConfig, box_of
from unpoison.audit.reference import read_reference
from unpoison.audit_pipeline import audit, load_audit
from unpoison.encoders.encoder import Encoder
from unpoison.errors import ConfigError, DataError, NoVerdictError
from unpoison.records import Box
from unpoison.report.audit_page import audit_as_text, make_audit_report
from unpoison.report.schemas import SCHEMAS
from unpoison.runtime import silent

QUICK = DecreeConfig(steps=120, restarts=1, batch_size=24)
IMAGES = clean_images()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished audit of the backdoored toy, without a reference."""
    out = tmp_path_factory.mktemp("audit") / "run"
    audit(toy(), IMAGES, config=QUICK, out=out)
    return out


def test_a_backdoor_is_called_so_beside_clean_encoders(tmp_path):
    reference = tmp_path / "reference.json"
    few = replace(QUICK, steps=20)
    for number in range(4):
        clean = toy(0.1 * number, fingerprint=f"clean-{number}")
        audit(clean, IMAGES, config=few, add_to=reference)
    assert [len(table.mask_shares) for table in read_reference(reference)] == [4]
    result = audit(toy(), IMAGES, config=few, reference=reference, alpha=0.2)
    assert result.verdict == "poisoned" and result.summary["p_value"] == pytest.approx(0.2)
    assert (
        result.reference_shares == tuple(sorted(result.reference_shares))
        and len(result.reference_shares) == 4
    )
    assert fits(result.summary, SCHEMAS["audit"])
    assert result.summary.keys() <= SCHEMAS["audit"]["properties"].keys()
    again = audit(toy(0.0, fingerprint="saved once more"), IMAGES, config=few, reference=reference, alpha=0.2)
    assert again.verdict == "inconclusive"  # its weights are one of the four, and three are too few
    assert audit(toy(0.05), IMAGES, config=few, reference=reference, alpha=0.2).verdict in (
        "no_evidence",
        "poisoned",
    )


def test_without_a_reference_the_figures_stand_alone(run):
    result = load_audit(run)
    summary = result.summary
    assert summary == json.loads((run / "verdict.json").read_text())
    assert fits(summary, SCHEMAS["audit"])
    assert (result.verdict, summary["p_value"], summary["reference"]) == ("inconclusive", None, None)
    assert "no reference holds a WhiteSquare of 1 parameters" in summary["reason"]
    assert summary["reached"] and result.mask_share == summary["mask_share"] < 0.3
    assert summary["collapse_before"] < 0.5 and summary["collapse_after"] > 0.9
    assert Box(**summary["box"]) == box_of(result.found.mask)
    assert Box(**summary["box"]).intersection(BOX) > 0
    assert summary["n_images"] == summary["n_searched"] + summary["n_held_out"] == 64
    # Features of all 64 once, the collapse of both parts; forward and backward 49 windows with 8 steps of 13 images,
    # and steps of 24; as many for the whole trigger and 24 steps of the patch before; the trigger's effect.
    steps = summary["starts"][0]["steps"] + summary["extent"]["steps"] + 24
    before_clusters = 64 + 48 + 16 + 3 * 49 * 8 * 13 + 3 * 24 * steps + 16
    assert summary["encoder_passes"] == before_clusters and summary["second_opinion"] is None


def test_a_small_mask_is_shown_as_the_whole_trigger_and_judged_as_it_is(run):
    result = load_audit(run)
    start, extent = result.summary["starts"][0], result.summary["extent"]
    assert result.mask_share == start["mask_share"] < extent["mask_share"]
    assert result.found.mask_share == pytest.approx(extent["mask_share"])
    assert "whole trigger" in audit_as_text(make_audit_report(result))
    # Published, or where no patch does as much: the smallest mask is all there is.
    for encoder, config in (
        (toy(), DecreeConfig(faithful=True)),
        (toy(0.0), replace(QUICK, steps=40)),
    ):
        assert audit(encoder, IMAGES, config=config).summary["extent"] is None


def test_a_run_of_an_earlier_version_is_shown_and_measured_with_its_whole_trigger(run, tmp_path):
    old = tmp_path / "run"
    shutil.copytree(run, old)
    (stage,) = (old / "cache").glob("extent*")
    (measured,) = (old / "cache").glob("measure-extent*")
    stage.unlink()
    measured.rename(measured.with_name(measured.name.replace("measure-extent", "measure")))
    encoder = toy()
    result = audit(encoder, IMAGES, config=QUICK, out=old)
    assert torch.equal(result.found.mask, load_audit(run).found.mask)
    # The fit, the search, and the effect of what it found, which the earlier run had not measured.
    steps = 24 + result.summary["extent"]["steps"]
    assert encoder.images_shown == 3 * 24 * steps + 16
    assert result.summary["collapse_after"] == load_audit(run).summary["collapse_after"]


def test_an_extent_is_left_out_when_the_time_is_over(monkeypatch):
    config = replace(QUICK, steps=20)
    encoder = by_passes(monkeypatch, toy())
    said = audit(encoder, IMAGES, config=config, max_seconds=LOOKED + 30 * STEP).summary
    # Twenty steps of the start and ten of the patch; measuring comes after, as ever.
    assert said["starts"][0]["steps"] == 20 and said["extent"] is None and not said["cut_short"]
    assert encoder.images_shown == pytest.approx(1000 * (LOOKED + 30 * STEP) + 16, abs=2 * 1000 * STEP)


def test_a_second_opinion_is_given_when_asked_for():
    plain, config = toy(), replace(QUICK, steps=3)
    audit(plain, IMAGES, config=config)
    encoder = toy()
    summary = audit(encoder, IMAGES, config=config, second_opinion=True).summary
    # Features of the searched, all of them with every window, at least a step per cluster.
    assert encoder.images_shown - plain.images_shown >= 48 + 49 * 48 + 10 * 3
    opinion = summary["second_opinion"]
    assert opinion["method"] == "ssl-cleanse" and len(opinion["mask_shares"]) == 10
    assert opinion["mask_shares"][opinion["cluster"]] == min(opinion["mask_shares"])
    assert opinion["outlier"] == (opinion["anomaly_index"] > opinion["threshold"] == 2)


def test_a_finished_run_is_judged_again_without_searching_again(run, tmp_path):
    before = (run / "verdict.json").read_bytes()
    encoder = toy()
    assert audit(encoder, IMAGES, config=QUICK, out=run).verdict == "inconclusive"
    assert encoder.images_shown == 0 and (run / "verdict.json").read_bytes() == before
    with pytest.raises(ConfigError, match="holds a run with other settings: seed was 0, now 1"):
        audit(toy(), IMAGES, config=QUICK, out=run, seed=1)
    assert (run / "verdict.json").read_bytes() == before


def test_a_killed_run_goes_on_after_its_last_start(tmp_path):
    config = replace(QUICK, steps=10, restarts=3)
    whole = audit(toy(), IMAGES, config=config)

    def stop(stage, done, total):
        if stage.startswith("start 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(toy(), IMAGES, config=config, out=tmp_path / "run", progress=stop)
    assert not (tmp_path / "run" / "verdict.json").exists()
    encoder = toy()
    resumed = audit(encoder, IMAGES, config=config, out=tmp_path / "run")
    assert torch.equal(resumed.found.mask, whole.found.mask)
    # The start that was stopped, and what follows it; the windows and the other starts came from the cache.
    assert encoder.images_shown >= 3 * 24 * 10 + 16
    assert whole.summary["encoder_passes"] - encoder.images_shown >= 3 * 49 * 8 * 13 + 2 * 3 * 24 * 10
    assert resumed.summary["encoder_passes"] == whole.summary["encoder_passes"]
    audit(toy(), IMAGES, config=QUICK, out=tmp_path / "run", fresh=True)


def by_passes(monkeypatch, encoder):
    """A clock that goes on by a second per thousand images that the encoder is shown."""
    clock = SimpleNamespace(perf_counter=lambda: encoder.images_shown / 1000)
    monkeypatch.setattr("unpoison.audit_pipeline.time", clock)
    monkeypatch.setattr("unpoison.runs.time", clock)
    return encoder


LOOKED = (64 + 48 + 16 + 3 * 49 * 8 * 13) / 1000  # seconds of that clock until the first start
STEP = 3 * 24 / 1000


def test_the_time_is_kept_and_what_that_costs_is_said(monkeypatch, tmp_path):
    config, reference = replace(QUICK, steps=20, restarts=2), tmp_path / "reference.json"
    for number in range(4):
        audit(toy(0.1 * number, fingerprint=f"clean-{number}"), IMAGES, config=config, add_to=reference)
    common = {"config": config, "reference": reference, "alpha": 0.2}
    encoder = by_passes(monkeypatch, toy())
    # Enough for half of either start, which is enough to find the square: a clean encoder needs more mask.
    said = audit(encoder, IMAGES, max_seconds=LOOKED + 20 * STEP, **common)
    assert [start["steps"] for start in said.summary["starts"]] == [pytest.approx(10, abs=1)] * 2
    assert said.summary["cut_short"] and said.summary["max_seconds"] == LOOKED + 20 * STEP
    assert fits(said.summary, SCHEMAS["audit"]) and said.verdict == "poisoned"
    # No mask is small where nothing obeys a patch; but a longer search might have found one.
    clean = by_passes(monkeypatch, toy(0.02))
    said = audit(clean, IMAGES, max_seconds=LOOKED + 4 * STEP, **common)
    assert said.verdict == "inconclusive" and "the time was over before the search" in said.summary["reason"]
    assert said.summary["relaxed"] is None
    clean = by_passes(monkeypatch, toy(0.02))
    said = audit(clean, IMAGES, max_seconds=1e6, **common)
    assert said.verdict == "no_evidence" and not said.summary["cut_short"]


def test_a_run_with_a_time_limit_goes_on_as_it_would_have(monkeypatch, tmp_path):
    config, seconds = replace(QUICK, steps=20, restarts=2), LOOKED + 30 * STEP
    whole = audit(by_passes(monkeypatch, toy()), IMAGES, config=config, max_seconds=seconds)

    def stop(stage, done, total):
        if stage.startswith("start 2"):
            raise KeyboardInterrupt

    for progress in (stop, silent):
        encoder = by_passes(monkeypatch, toy())
        try:
            resumed = audit(
                encoder, IMAGES, config=config, max_seconds=seconds, out=tmp_path / "run", progress=progress
            )
        except KeyboardInterrupt:
            continue
    assert resumed.summary["starts"] == whole.summary["starts"]
    assert [start["steps"] for start in whole.summary["starts"]] == [pytest.approx(15, abs=1)] * 2


def test_too_little_time_is_said_and_leaves_no_run(monkeypatch, tmp_path):
    encoder = by_passes(monkeypatch, toy())
    with pytest.raises(
        NoVerdictError, match=r"max_seconds=9: looking at all places takes about 15 s, before"
    ):
        audit(encoder, IMAGES, config=QUICK, max_seconds=9, out=tmp_path / "run")
    assert encoder.images_shown < 1000 * LOOKED / 4  # found out long before the time was over
    with pytest.raises(NoVerdictError, match=r"max_seconds=0.1: all of it went by"):
        faithful = DecreeConfig(faithful=True)
        audit(by_passes(monkeypatch, toy()), IMAGES, config=faithful, max_seconds=0.1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_generated_images_serve_where_there_are_none():
    result = audit(toy(), config=replace(QUICK, steps=5), sample=40)
    assert result.summary["location"] == "generated images" and result.summary["n_images"] == 40
    assert any("generated" in line for line in result.summary["scope"]["not_tested"])


def test_a_collapse_out_of_reach_leads_to_the_relaxed_search():
    result = audit(toy(0.0), IMAGES, config=replace(QUICK, steps=2, relaxed_gain=0.01))
    assert not result.summary["reached"] and result.mask_share == 1
    assert result.summary["relaxed"]["gain"] == 0.01
    faithful = audit(toy(), IMAGES, config=DecreeConfig(faithful=True))
    assert faithful.summary["relaxed"] is None and faithful.summary["reached"]
    assert len(faithful.summary["starts"]) == 1 and faithful.summary["second_opinion"] is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.5}, ConfigError, r"alpha=0.5: expected a false-alarm rate in \(0, 0.5\)"),
        ({"sample": 0}, ConfigError, "sample=0: expected at least 1 image"),
        (
            {"second_opinion": True, "config": DecreeConfig(faithful=True)},
            ConfigError,
            "second_opinion contradicts faithful",
        ),
        ({"max_seconds": 0}, ConfigError, "max_seconds=0: expected a positive number of seconds"),
        ({"max_seconds": 9, "second_opinion": True}, ConfigError, "second_opinion contradicts max_seconds"),
        ({"max_seconds": 9, "add_to": "clean.json"}, ConfigError, "max_seconds contradicts add_to"),
        ({"sample": 20}, NoVerdictError, "20 readable images: an audit needs at least 32"),
        (
            {"reference": "nowhere.json"},
            ConfigError,
            "no such file; expected one that --add-to-reference wrote",
        ),
    ],
)
def test_what_cannot_be_is_said_and_leaves_no_run(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        audit(toy(), IMAGES, **{"config": QUICK, "out": tmp_path / "run", **options})
    assert not (tmp_path / "run").exists()


def test_an_encoder_without_a_fingerprint_is_no_reference(tmp_path):
    with pytest.raises(
        ConfigError, match="an encoder without a fingerprint cannot be a reference: give a file"
    ):
        module = toy()
        function = Encoder(module.network.forward, module.preprocessing, device="cpu", precision="fp32")
        audit(function, IMAGES, add_to=tmp_path / "reference.json")


def test_nan_weights_are_no_answer(tmp_path):
    encoder = toy()
    encoder.network.strength.data.fill_(float("nan"))
    with pytest.raises(NoVerdictError, match="toy gives NaN, infinite or zero features"):
        audit(encoder, IMAGES, config=QUICK, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_or_missing_audit_is_said(run, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no finished audit \(no verdict.json\)"):
        load_audit(tmp_path)
    (tmp_path / "verdict.json").write_bytes((run / "verdict.json").read_bytes())
    with pytest.raises(
        DataError, match="a file of the audit is missing or damaged; audit again with --fresh"
    ):
        load_audit(tmp_path)


def test_the_public_names_are_these():
    assert unpoison.AuditResult and unpoison.DecreeConfig is DecreeConfig
    assert unpoison.load_audit is load_audit and unpoison.audit.__doc__
