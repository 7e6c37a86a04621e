"""A whole scan by a detector, and the screen beside the patch search, on toys whose right answer is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from toys import planted_encoder, planted_images
from unpoison import patch_pipeline, pipeline
from unpoison.errors import ConfigError
from unpoison.functional.global_triggers import apply_global
from unpoison.records import ImageSet, Skipped
from unpoison.report.schemas import SCHEMAS
from unpoison.runs import load_result
from unpoison.scan.config import SCREEN_SHARE, ScanConfig

FILES = "run.json verdict.json findings.parquet clean.txt flagged.txt evidence.safetensors report.html cache"
IDS = ScanConfig(method="backdoor-ids", false_positive_rate=0.05)
DCT = ScanConfig(method="spectral-dct")
SEARCH = ScanConfig(clusters=10, n_flips=12, exploit=10)


def clean(count: int, seed: int = 0) -> ImageSet:
    return planted_images(count, 0, torch.Generator().manual_seed(seed))[0]


def with_waves(images: ImageSet, count: int) -> ImageSet:
    pixels = images.pixels.clone()
    pixels[:count] = apply_global(pixels[:count], "ctrl", 100.0, torch.zeros(3, 1, 1, dtype=torch.uint8))
    return ImageSet(images.ids, pixels, images.skipped, "with waves")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ("seconds", "stages")}


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("must not be called")


class StopAt:
    """Interrupts a scan when it reports a stage for the first time."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == self.stage:
            raise KeyboardInterrupt


def test_what_limit_or_sample_left_out_was_not_tested() -> None:
    for part, left in (({"limit": 60}, 20), ({"sample": 70}, 10), ({"limit": 80}, 0), ({}, 0)):
        result = pipeline.scan(clean(80, 0), config=DCT, **part)
        not_tested = result.summary["scope"]["not_tested"]
        expected = [f"{left} other images, which limit or sample left out"] if left else []
        assert [line for line in not_tested if "left out" in line] == expected
        assert result.summary["n_images"] == 80 - left


# ── by a detector ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_poison_is_flagged_with_auxiliary_images_and_again_with_the_detector_that_they_gave(
    tmp_path: Path,
) -> None:
    images, boxes = planted_images(100, 13, torch.Generator().manual_seed(0))
    images = dataclasses.replace(images, skipped=(Skipped("broken.png", "no image"),))
    encoder = planted_encoder()
    result = pipeline.scan(images, encoder, config=IDS, auxiliary=clean(200, 1), out=tmp_path / "run")
    assert result.verdict == "poisoned" and set(result.flagged) >= boxes.keys() and len(result.flagged) <= 25
    assert names(tmp_path / "run") == {*FILES.split(), "detector.safetensors"}
    said = result.summary
    assert said.keys() >= set(SCHEMAS["verdict"]["required"]) and said["triggers"] == []
    assert said.keys() <= SCHEMAS["verdict"]["properties"].keys()
    assert said["n_images"] == 101 == said["n_scored"] + said["n_unscored"] + said["n_skipped"]
    assert said["encoder_passes"] == encoder.images_shown == 60 * (100 + 100)
    assert said["detector"]["made_on"] == "auxiliary images" and said["detector"]["n_calibration"] == 100
    assert any("could not be read" in line for line in said["scope"]["not_tested"])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "backdoor-ids finds more suspicious images" in page and "The highest scores" in page

    again = pipeline.scan(
        images,
        encoder,
        config=IDS,
        detector=tmp_path / "run" / "detector.safetensors",
        out=tmp_path / "again",
    )
    pandas.testing.assert_frame_equal(again.findings, result.findings)
    assert again.summary["detector"]["made_on"] == "other images, before"
    assert again.summary["detector"]["fingerprint"] == said["detector"]["fingerprint"]
    assert names(tmp_path / "again") == set(FILES.split())


def test_innocent_images_are_no_evidence_unless_too_few_could_be_read() -> None:
    images = clean(60)
    result = pipeline.scan(images, config=DCT, auxiliary=clean(300, 1))
    assert (result.verdict, result.flagged) == ("no_evidence", ()) and result.summary["p_value"] > 0.01
    skipped = tuple(Skipped(f"broken-{i}.png", "no image") for i in range(30))
    few = pipeline.scan(dataclasses.replace(images, skipped=skipped), config=DCT, auxiliary=clean(300, 1))
    assert few.verdict == "inconclusive" and "66.7% of the images could be read" in few.summary["reason"]


def test_without_other_images_there_is_an_order_and_no_verdict(tmp_path: Path) -> None:
    images, boxes = planted_images(60, 8, torch.Generator().manual_seed(0))
    result = pipeline.scan(images, planted_encoder(), config=IDS, out=tmp_path / "run")
    assert result.verdict == "inconclusive" and "--auxiliary" in result.summary["reason"]
    assert "rule" not in result.summary  # nothing was compared
    assert result.summary["p_value"] is None and result.flagged == ()
    assert names(tmp_path / "run") == set(
        FILES.split()
    )  # no detector for others: it was not made on innocent images
    first = result.findings.nlargest(8, "poison_score")["id"]
    assert len(set(first) & boxes.keys()) >= 6 and list(result.evidence.ids[:8]) == list(first)


def test_a_stopped_run_goes_on_and_a_finished_one_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = planted_images(60, 8, torch.Generator().manual_seed(0))
    auxiliary, out = clean(60, 1), tmp_path / "run"
    whole = pipeline.scan(images, planted_encoder(), config=IDS, auxiliary=auxiliary)
    with pytest.raises(KeyboardInterrupt):
        pipeline.scan(
            images,
            planted_encoder(),
            config=IDS,
            auxiliary=auxiliary,
            out=out,
            progress=StopAt("score images"),
        )
    with pytest.raises(ConfigError, match="holds no finished run"):
        load_result(out)
    result = pipeline.scan(images, planted_encoder(), config=IDS, auxiliary=auxiliary, out=out)
    pandas.testing.assert_frame_equal(result.findings, whole.findings)
    assert timeless(json.loads((out / "verdict.json").read_text())) == json.loads(
        json.dumps(timeless(whole.summary))
    )

    monkeypatch.setattr(pipeline, "judge_images", forbidden)
    shown = pipeline.scan(images, planted_encoder(), config=IDS, auxiliary=auxiliary, out=out)
    pandas.testing.assert_frame_equal(shown.findings, whole.findings)
    with pytest.raises(ConfigError, match="holds a run with other settings: auxiliary was"):
        pipeline.scan(images, planted_encoder(), config=IDS, auxiliary=clean(61, 1), out=out)
    with pytest.raises(ConfigError, match=r"config\.false_positive_rate was 0\.05, now 0\.1;"):
        pipeline.scan(
            images,
            planted_encoder(),
            config=dataclasses.replace(IDS, false_positive_rate=0.1),
            auxiliary=auxiliary,
            out=out,
        )


def test_too_few_auxiliary_images_leave_no_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="40 calibration images: a false-positive rate of 0.01 needs at least 99"
    ):
        pipeline.scan(clean(60), config=DCT, auxiliary=clean(80, 1), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        (ScanConfig(), {"auxiliary": "x"}, "auxiliary: the patch search takes none; leave it out"),
        (ScanConfig(method="poisoncam"), {"detector": "x"}, "detector: the patch search takes none"),
        (
            DCT,
            {"detector": "x", "auxiliary": "x"},
            "detector and auxiliary: a finished detector is not fitted again",
        ),
        (DCT, {"encoder": "x"}, "spectral-dct takes no encoder: leave it out"),
        (IDS, {}, "backdoor-ids takes the encoder that it judges: give one"),
        (IDS, {"encoder": "x", "other": "x"}, "backdoor-ids takes no second encoder: leave it out"),
        (
            ScanConfig(method="cross-encoder"),
            {"encoder": "x"},
            "cross-encoder takes a second encoder: give one",
        ),
    ],
)
def test_parts_that_do_not_fit_the_method(config: ScanConfig, parts: dict[str, Any], message: str) -> None:
    for called in (pipeline.scan, pipeline.preview):
        with pytest.raises(ConfigError, match=message):
            called(clean(60), config=config, **parts)  # type: ignore[operator]


def test_a_detector_of_another_method_is_refused(tmp_path: Path) -> None:
    pipeline.scan(clean(60), config=DCT, auxiliary=clean(300, 1), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="takes no encoder|made for another encoder|is one of spectral-dct"):
        pipeline.scan(
            clean(60), planted_encoder(), config=IDS, detector=tmp_path / "run" / "detector.safetensors"
        )


def test_a_preview_counts_the_passes_of_a_detector() -> None:
    encoder = planted_encoder()
    seen = pipeline.preview(clean(60), encoder, config=IDS, auxiliary=clean(80, 1))
    assert {stage.name: stage.most for stage in seen.cost.stages} == {"detector": 40 * 60, "scores": 60 * 60}
    assert seen.pretraining == 0 and seen.seconds is not None and encoder.images_shown == 0
    without = pipeline.preview(clean(60), config=DCT)
    assert without.cost.expected == 0 and without.seconds is None and without.pretraining == 0


# ── the screen beside the patch search ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def searched() -> ImageSet:
    return clean(100)


def test_waves_are_found_beside_the_patch_search(
    searched: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = with_waves(searched, 40)
    result = pipeline.scan(images, planted_encoder(planted=False), config=SEARCH, out=tmp_path / "run")
    assert result.verdict == "poisoned" == result.summary["verdict"] and result.triggers == ()
    assert set(result.flagged) >= set(images.ids[:40]) and len(result.flagged) <= 48
    (screen,) = result.summary["screens"]
    assert screen["verdict"] == "poisoned" and screen["p_value"] <= screen["alpha"] == pytest.approx(0.001)
    assert [0, 15, 15] in screen["frequencies"] and result.summary["p_value"] <= 0.01
    assert "power" not in result.summary and result.summary["n_flagged"] == len(result.flagged)
    assert result.findings["trigger"].isna().all()
    assert (tmp_path / "run" / "flagged.txt").read_text().splitlines() == list(result.flagged)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "waves that no picture has recur" in page and "as CTRL plants them" in page
    monkeypatch.setattr(pipeline, "search_patches", forbidden)
    pandas.testing.assert_frame_equal(load_result(tmp_path / "run").findings, result.findings)


def test_a_screen_that_finds_nothing_changes_no_finding(searched: ImageSet) -> None:
    """And each test has its share of alpha, so that both together keep it."""
    alone = pipeline.scan(
        searched, planted_encoder(planted=False), config=dataclasses.replace(SEARCH, method="poisoncam")
    )
    both = pipeline.scan(searched, planted_encoder(planted=False), config=SEARCH)
    pandas.testing.assert_frame_equal(both.findings, alone.findings)
    assert "screens" not in alone.summary and both.summary["screens"][0]["verdict"] == "no_evidence"
    assert both.summary["method"] == alone.summary["method"] == "poisoncam"
    assert both.summary["alpha"] == both.summary["config"]["alpha"] == 0.01
    assert both.summary["config"]["method"] == "auto"
    assert any("waves in the chroma" in line for line in both.summary["scope"]["tested"])
    assert any(
        "other triggers that cover the whole image" in line for line in both.summary["scope"]["not_tested"]
    )
    assert patch_pipeline.GLOBAL_TRIGGERS in alone.summary["scope"]["not_tested"]


def test_the_shares_of_alpha_add_up() -> None:
    from unpoison.scan.spectral_dct import Waves

    none = Waves(1.0, torch.zeros(1, dtype=torch.bool), ())
    config = ScanConfig(alpha=0.05)
    assert pipeline._of_the_search(config, none).alpha + SCREEN_SHARE * config.alpha == pytest.approx(0.05)
    assert pipeline._of_the_search(config, None).alpha == 0.05
    assert pipeline._of_the_search(config, none).method == "poisoncam"
    assert not pipeline._screens(config, 16) and pipeline._screens(config, 32)
    assert not pipeline._screens(ScanConfig(faithful=True), 32)


def test_a_second_encoder_given_by_name_takes_images_of_the_first_ones_side() -> None:
    cross = ScanConfig(method="cross-encoder", false_positive_rate=0.1)
    result = pipeline.scan(
        clean(60), planted_encoder(), config=cross, auxiliary=clean(80, 1), other="timm:resnet10t@random"
    )
    assert result.summary["n_scored"] == 60


def test_the_judged_images_are_no_auxiliary_ones(tmp_path: Path) -> None:
    images = clean(80)
    mixed = ImageSet(images.ids, torch.cat((images.pixels[:20], clean(60, 1).pixels)), (), "mixed")
    for auxiliary, share in ((images, 100), (mixed, 25)):
        with pytest.raises(ConfigError, match=f"{share}% of the judged images are among the auxiliary ones"):
            pipeline.scan(images, planted_encoder(), config=IDS, auxiliary=auxiliary, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_detector_keeps_the_rate_that_it_was_calibrated_for(tmp_path: Path) -> None:
    encoder = planted_encoder()
    pipeline.scan(clean(60), encoder, config=IDS, auxiliary=clean(80, 1), out=tmp_path / "run")
    kept = tmp_path / "run" / "detector.safetensors"
    other = dataclasses.replace(IDS, false_positive_rate=0.2)
    with pytest.raises(ConfigError, match=r"false_positive_rate=0\.2: the detector was calibrated for 0\.05"):
        pipeline.scan(clean(60, 2), encoder, config=other, detector=kept)


def test_no_judged_image_scores_low_for_having_been_fitted_on() -> None:
    """All are fitted on: of the innocent images that score highest, neither half is preferred."""
    images = clean(120)
    config = ScanConfig(method="cross-encoder", false_positive_rate=0.05)
    scored = pipeline.scan(images, planted_encoder(), config=config, other=planted_encoder()).findings
    assert float(scored["poison_score"].abs().max()) < 1e-4  # the same encoder twice: nobody differs
