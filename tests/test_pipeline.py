"""A whole scan, from images to the verdict, on toys whose right answer is known."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from torch.nn import functional as F

from report.test_schemas import fits
from toys import planted_encoder, planted_images, planted_pattern, planted_patterns
from unpoison import patch_pipeline, pipeline
from unpoison.errors import ConfigError, NothingToScanError, NoVerdictError
from unpoison.pretrain.loop import PretrainConfig
from unpoison.records import Box, ImageSet, ScanResult, Skipped
from unpoison.report.schemas import SCHEMAS
from unpoison.runs import load_result
from unpoison.scan.config import ScanConfig
from unpoison.scan.poison_classifier import ClassifierConfig

CONFIG = ScanConfig(clusters=10, n_flips=24, exploit=30)
COLUMNS = (
    "id cluster scored poison_score box_x box_y box_w box_h poison_probability flagged trigger skip_reason"
)
MORE = dataclasses.replace(CONFIG, clusters=25, exploit=60)
FILES = "run.json verdict.json findings.parquet clean.txt flagged.txt evidence.safetensors report.html"
UNREADABLE = Skipped("unreadable.png", "the file is empty")


@pytest.fixture(scope="module", autouse=True)
def quick_classifier() -> Any:
    """A classifier that learns nothing, in no time; the test that looks at its answer takes a better one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            ClassifierConfig,
            "of_scan",
            lambda scan: ClassifierConfig(networks=1, iterations=4, width=4, batch_size=16),
        )
        yield


@pytest.fixture(scope="module")
def poisoned() -> tuple[ImageSet, dict[str, Box]]:
    """160 images, of which 16 carry the trigger, and one that cannot be read."""
    images, boxes = planted_images(160, 16, torch.Generator().manual_seed(0))
    return dataclasses.replace(images, skipped=(UNREADABLE,)), boxes


@dataclasses.dataclass
class Scanned:
    """A result, and what the encoder counted meanwhile."""

    result: ScanResult
    images_shown: int


@pytest.fixture(scope="module")
def reference(poisoned: tuple[ImageSet, dict[str, Box]]) -> Scanned:
    """The scan that others are compared with, in memory and without a stop."""
    encoder = planted_encoder()
    return Scanned(pipeline.scan(poisoned[0], encoder, config=CONFIG), encoder.images_shown)


def ranking(result: ScanResult) -> list[str]:
    scored = result.findings[result.findings["scored"]]
    return list(scored.sort_values("poison_score", ascending=False, kind="stable")["id"])


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in summary.items() if key not in ("seconds", "expected_seconds", "stages")
    }


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("must not be called")


# --- What it finds ---------------------------------------------------------------------------------------------------


def test_poison_is_found_ranked_and_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ClassifierConfig,
        "of_scan",
        lambda scan: ClassifierConfig(networks=1, iterations=150, width=8, batch_size=32),
    )
    images, boxes = planted_images(400, 40, torch.Generator().manual_seed(0))
    result = pipeline.scan(images, planted_encoder(), config=MORE)

    assert result.verdict == "poisoned" == result.summary["verdict"] and len(result.triggers) >= 1
    first = ranking(result)
    planted = [name for name in first if name in boxes]
    assert len(planted) >= 20 and set(first[: len(planted)]) == set(planted)
    assert len(set(result.flagged) & boxes.keys()) >= 0.95 * len(boxes)
    trigger = result.triggers[0]
    assert trigger.p_value < 1e-10 and trigger.flip_rate > 0.9 > 0.1 > trigger.control_rate
    assert trigger.n_sources == len(trigger.source_ids) == len(trigger.boxes) == len(trigger.patches)
    assert set(trigger.source_ids) <= boxes.keys() and set(trigger.source_ids) <= set(result.flagged)


def test_without_a_filter_only_confirmed_sources_are_flagged(
    reference: Scanned, poisoned: tuple[Any, Any]
) -> None:
    config = dataclasses.replace(CONFIG, filter_steps=0)
    result = pipeline.scan(poisoned[0], planted_encoder(), config=config)
    sources = {source for trigger in reference.result.triggers for source in trigger.source_ids}
    assert result.verdict == "poisoned" and set(result.flagged) == sources <= set(poisoned[1])
    assert result.findings["poison_probability"].isna().all() and "classifier" not in result.summary["stages"]


@pytest.mark.parametrize("window", [8, 9, 11])
def test_every_window_holds_the_whole_trigger(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catch rate of 1, also where masks half a window apart frame no trigger exactly."""
    images, boxes = planted_images(400, 40, torch.Generator().manual_seed(0))
    monkeypatch.setattr(patch_pipeline, "train_poison_classifier", lambda *_, **__: AllKnowing(images, boxes))
    config = dataclasses.replace(MORE, window=window)
    result = pipeline.scan(images, planted_encoder(), config=config)
    trigger = result.triggers[0]
    assert trigger.n_sources >= 15
    for name, box in zip(trigger.source_ids, trigger.boxes, strict=True):
        assert box.intersection(boxes[name]) == boxes[name].area


@pytest.mark.parametrize("count", [2, 3])
def test_each_trigger_is_a_finding_of_its_own(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several triggers, each on another kind of images: as many findings, targets, sources, pictures and lists."""
    patterns = planted_patterns(count)
    images, boxes = planted_images(160, 16, torch.Generator().manual_seed(0), pattern=patterns)
    kind = {name: images.ids.index(name) % 8 for name in boxes}
    monkeypatch.setattr(patch_pipeline, "train_poison_classifier", lambda *_, **__: AllKnowing(images, boxes))
    config = ScanConfig(clusters=12, window=11, n_flips=12, exploit=40)
    result = pipeline.scan(images, planted_encoder(patterns), config=config, out=tmp_path)

    assert result.verdict == "poisoned" and len(result.triggers) == count
    carried = [{kind[name] for name in trigger.source_ids} for trigger in result.triggers]
    assert sorted(kinds.pop() for kinds in carried if len(kinds) == 1) == list(range(count))
    targets = [set(trigger.target_clusters) for trigger in result.triggers]
    assert sum(map(len, targets)) == len(set().union(*targets))  # no cluster is the target of two
    by_id = result.to_pandas()
    assert by_id["trigger"].notna().equals(by_id["flagged"]) and set(result.flagged) >= boxes.keys()
    for number, (trigger, said) in enumerate(
        zip(result.triggers, result.summary["triggers"], strict=True), start=1
    ):
        assert trigger.flip_rate > 0.8 and trigger.p_value < 1e-6
        listed = (tmp_path / said["list"]).read_text().splitlines()
        assert len(listed) == said["n_flagged"] and set(trigger.source_ids) <= set(listed)
        # Also those that no window was cut from: each image is listed under the trigger that it carries.
        own = {kind[name] for name in trigger.source_ids}
        assert set(listed) == {name for name in boxes if kind[name] in own}
        assert (tmp_path / said["image"]).is_file() and said["image"] == f"triggers/trigger-{number}.png"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{count} planted triggers were confirmed" in page and f"triggers/trigger-{count}.txt" in page


class AllKnowing:
    """A classifier that is always right."""

    threshold = 0.5

    def __init__(self, images: ImageSet, boxes: dict[str, Box]) -> None:
        self.answer = torch.tensor([float(name in boxes) for name in images.ids])

    def probability(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.answer


@pytest.fixture(scope="module")
def clean_scan() -> ScanResult:
    """Of 400 images whose trigger the encoder does not know."""
    images, _ = planted_images(400, 40, torch.Generator().manual_seed(0))
    return pipeline.scan(images, planted_encoder(planted=False), config=MORE)


def test_without_the_backdoor_there_is_no_evidence(clean_scan: ScanResult) -> None:
    result = clean_scan
    assert (result.verdict, result.triggers, result.flagged) == ("no_evidence", (), ())
    assert result.findings["poison_probability"].isna().all() and not result.findings["flagged"].any()
    assert result.findings["scored"].any() and "reason" not in result.summary
    assert result.summary["p_value"] is None or result.summary["p_value"] > 0.01


# --- What it says ----------------------------------------------------------------------------------------------------


def test_rows_in_are_rows_out(reference: Scanned, poisoned: tuple[ImageSet, dict[str, Box]]) -> None:
    images, _ = poisoned
    findings, summary = reference.result.findings, reference.result.summary
    assert list(findings["id"]) == [*images.ids, UNREADABLE.id] and list(findings.columns) == COLUMNS.split()
    assert summary["n_images"] == 161 == summary["n_scored"] + summary["n_unscored"] + summary["n_skipped"]
    assert summary["n_scored"] == int(findings["scored"].sum()) and summary["n_skipped"] == 1
    assert summary["n_flagged"] == len(reference.result.flagged)
    assert summary["coverage"] == pytest.approx(160 / 161)


def test_what_was_not_examined_is_empty_and_not_zero(reference: Scanned) -> None:
    findings = reference.result.findings
    unscored = findings[~findings["scored"]]
    assert len(unscored) > 1
    numbers = ["poison_score", "box_x", "box_y", "box_w", "box_h"]
    assert unscored[numbers].isna().all(axis=None)
    assert findings.loc[findings["scored"], numbers].notna().all(axis=None)

    skipped = findings.set_index("id").loc[UNREADABLE.id]
    assert skipped["skip_reason"] == UNREADABLE.reason and not skipped["flagged"]
    assert skipped[["cluster", "poison_probability"]].isna().all()
    assert findings["skip_reason"].isna().sum() == 160
    assert findings["cluster"].notna().sum() == findings["poison_probability"].notna().sum() == 160


def test_the_boxes_are_the_windows(reference: Scanned, poisoned: tuple[ImageSet, dict[str, Box]]) -> None:
    images, _ = poisoned
    trigger = reference.result.triggers[0]
    by_id = reference.result.to_pandas()
    for name, box, patch in zip(trigger.source_ids, trigger.boxes, trigger.patches, strict=True):
        assert by_id.loc[name, ["box_x", "box_y", "box_w", "box_h"]].tolist() == [box.x, box.y, box.w, box.h]
        pixels = images.pixels[images.ids.index(name)]
        assert torch.equal(pixels[:, box.y : box.y + box.h, box.x : box.x + box.w], patch)


def test_the_cost_is_what_the_encoder_counted(reference: Scanned) -> None:
    assert reference.result.summary["encoder_passes"] == reference.images_shown


def test_the_summary_is_plain_json_and_repeats_the_settings(reference: Scanned) -> None:
    summary = reference.result.summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == json.loads(json.dumps(summary))
    assert summary["config"] == dataclasses.asdict(CONFIG.resolve(160, 32)) and summary["seed"] == 0
    assert any("could not be read" in line for line in summary["scope"]["not_tested"])
    assert fits(summary, SCHEMAS["verdict"])
    triggers = SCHEMAS["verdict"]["properties"]["triggers"]["items"]["properties"]
    assert summary.keys() <= SCHEMAS["verdict"]["properties"].keys()
    assert summary["triggers"] and all(said.keys() <= triggers.keys() for said in summary["triggers"])


def test_the_evidence_shows_the_first_of_the_ranking(
    reference: Scanned, poisoned: tuple[ImageSet, dict[str, Box]]
) -> None:
    images, boxes = poisoned
    evidence = reference.result.evidence
    assert list(evidence.ids) == ranking(reference.result)[: len(evidence.ids)]
    rows = [images.ids.index(name) for name in evidence.ids]
    assert torch.equal(evidence.pixels, images.pixels[rows])
    assert float(evidence.attention.min()) >= 0 and float(evidence.attention.max()) <= 1
    for name, heat in zip(evidence.ids, evidence.attention, strict=True):
        if name in boxes:
            top, left = divmod(int(heat.argmax()), heat.shape[1])
            assert boxes[name].intersection(Box(left - 4, top - 4, 9, 9)) > 0


# --- The same again --------------------------------------------------------------------------------------------------


def test_neither_a_repetition_nor_another_batch_size_changes_anything(
    reference: Scanned, poisoned: tuple[ImageSet, dict[str, Box]]
) -> None:
    """Invariant 14."""
    again = pipeline.scan(poisoned[0], planted_encoder(), config=CONFIG)
    pandas.testing.assert_frame_equal(again.findings, reference.result.findings)
    assert timeless(again.summary) == timeless(reference.result.summary)

    other = pipeline.scan(poisoned[0], planted_encoder(), config=CONFIG, batch_size=97)
    assert ranking(other) == ranking(reference.result) and other.flagged == reference.result.flagged
    assert timeless(other.summary) == timeless(reference.result.summary)


class StopAt:
    """Interrupts a scan when it reports a stage for the nth time."""

    def __init__(self, stage: str, times: int) -> None:
        self.stage, self.left = stage, times

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == self.stage:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def test_a_run_that_is_stopped_again_and_again_ends_like_one_that_was_not(
    reference: Scanned,
    poisoned: tuple[ImageSet, dict[str, Box]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, _ = poisoned
    out = tmp_path / "run"
    stops = [("features", 1), ("cluster", 1), ("search", 1), ("search", 3), ("search again", 1)]
    for stage, times in [*stops, ("classifier", 2)]:
        with pytest.raises(KeyboardInterrupt):
            pipeline.scan(images, planted_encoder(), config=CONFIG, out=out, progress=StopAt(stage, times))
        assert not (out / "verdict.json").exists(), stage
        with pytest.raises(ConfigError, match="holds no finished run"):
            load_result(out)

    with monkeypatch.context() as patched:  # what is done is not done again
        patched.setattr(patch_pipeline, "extract_features", forbidden)
        patched.setattr(patch_pipeline, "kmeans", forbidden)
        patched.setattr(patch_pipeline, "confirm", forbidden)
        patched.setattr("unpoison.scan.search.Searcher.score", forbidden)
        result = pipeline.scan(images, planted_encoder(), config=CONFIG, out=out)
    pandas.testing.assert_frame_equal(result.findings, reference.result.findings)
    saved = json.loads((out / "verdict.json").read_text())
    assert timeless(saved) == json.loads(json.dumps(timeless(reference.result.summary)))
    assert saved["stages"].keys() == reference.result.summary["stages"].keys()

    assert {p.name for p in out.iterdir()} == {*FILES.split(), "cache", "triggers"}
    assert sorted(p.name for p in (out / "triggers").iterdir()) == ["trigger-1.png", "trigger-1.txt"]
    clean, flagged = ((out / name).read_text().splitlines() for name in ("clean.txt", "flagged.txt"))
    assert flagged == list(reference.result.flagged)
    assert sorted([*clean, *flagged, UNREADABLE.id]) == sorted([*images.ids, UNREADABLE.id])

    # A finished run is shown, not repeated; one with another seed is refused, and nothing changes.
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.is_file() and p.name != "run.json"}
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "as_image_set", forbidden)
        encoder = planted_encoder()
        shown = pipeline.scan(images, encoder, config=CONFIG, out=out)
        with pytest.raises(ConfigError, match="holds a run with other settings: seed was 0, now 1;"):
            pipeline.scan(images, encoder, config=CONFIG, out=out, seed=1)
        with pytest.raises(ConfigError, match=r"config\.alpha was 0\.01, now 0\.02;"):
            pipeline.scan(images, encoder, config=dataclasses.replace(CONFIG, alpha=0.02), out=out)
    assert encoder.images_shown == 0
    pandas.testing.assert_frame_equal(shown.findings, result.findings)
    assert shown.summary == saved and shown.verdict == "poisoned"
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name in before} == before


def test_without_an_encoder_it_trains_one_and_keeps_it(tmp_path: Path) -> None:
    images, _ = planted_images(80, 8, torch.Generator().manual_seed(1))
    recipe = PretrainConfig(epochs=2, width=8, batch_size=40)
    config = ScanConfig(clusters=4, n_flips=8, exploit=4)
    stages: list[str] = []
    scanned = partial(
        pipeline.scan, images, config=config, pretrain_config=recipe, device="cpu", precision="fp32"
    )
    result = scanned(out=tmp_path / "run", command="again", progress=lambda stage, *_: stages.append(stage))
    assert result.summary["command"] == "again"
    assert result.summary["pretrained"]["epochs"] == 2 and result.summary["pretrained"]["method"] == "moco-v2"
    assert any("in 2 epochs of moco-v2" in sentence for sentence in result.summary["scope"]["tested"])
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
    assert result.summary["n_images"] == len(result.findings) == 80
    assert stages.index("search") > 0 and not (tmp_path / "run" / "cache" / "pretrain.state").exists()
    # A run that was stopped while it trained, and while it searched, ends alike.
    for stage, times in (("pretrain moco-v2", 3), ("search", 1)):
        with pytest.raises(KeyboardInterrupt):
            scanned(out=tmp_path / "stopped", progress=StopAt(stage, times))
    resumed = scanned(out=tmp_path / "stopped")
    pandas.testing.assert_frame_equal(resumed.findings, result.findings)
    # The encoder that is kept gives this result.
    again = pipeline.scan(
        images, tmp_path / "run" / "encoder.safetensors", config=config, device="cpu", precision="fp32"
    )
    pandas.testing.assert_frame_equal(again.findings, result.findings)
    assert again.summary["encoder_fingerprint"] == result.summary["encoder_fingerprint"]


# --- What it refuses -------------------------------------------------------------------------------------------------


def test_too_few_images_are_refused_and_leave_no_run(tmp_path: Path) -> None:
    images, _ = planted_images(49, 0, torch.Generator().manual_seed(1))
    with pytest.raises(NothingToScanError, match="49 images: a scan needs at least 50"):
        pipeline.scan(images, planted_encoder(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_setting_that_does_not_fit_the_images_leaves_no_run(tmp_path: Path) -> None:
    images, _ = planted_images(60, 0, torch.Generator().manual_seed(1))
    for config, message in (
        (ScanConfig(clusters=61), "clusters=61: there are 60 readable images"),
        (ScanConfig(window=33), "window=33: the encoder sees 32 pixels"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline.scan(images, planted_encoder(), config=config, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("min_coverage", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(min_coverage: float) -> None:
    images, _ = planted_images(60, 0, torch.Generator().manual_seed(1))
    with pytest.raises(ConfigError, match="expected a share between 0 and 1"):
        pipeline.scan(images, planted_encoder(), min_coverage=min_coverage)


def test_a_pass_shows_at_least_one_image() -> None:
    images, _ = planted_images(60, 0, torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="batch_size=0: expected at least 1 image per pass"):
        pipeline.scan(images, planted_encoder(), batch_size=0)


# --- What it costs ---------------------------------------------------------------------------------------------------


def test_the_passes_are_those_that_were_expected(reference: Scanned) -> None:
    passes = reference.result.summary["passes"]
    assert sum(stage["actual"] for stage in passes.values()) == reference.images_shown
    assert all(stage["actual"] <= stage["most"] for stage in passes.values())
    for name in ("features", "flip set", "trial"):  # one direction
        assert passes[name]["actual"] == passes[name]["expected"]
    # How many images the clusters hold is not known before.
    expected, actual = (sum(stage[key] for stage in passes.values()) for key in ("expected", "actual"))
    assert 0.6 * expected <= actual <= 1.25 * expected


def with_a_corner(n_carriers: int) -> tuple[ImageSet, set[str]]:
    """400 pictures that share nothing but the trigger in the corner of some, and the ids of these."""
    drawn = torch.Generator().manual_seed(3)
    coarse = F.interpolate(torch.rand(400, 3, 6, 6, generator=drawn), 32, mode="bilinear")
    pixels = (coarse * 255).to(torch.uint8)
    carriers = torch.randperm(400, generator=drawn)[:n_carriers]
    pixels[carriers, :, 23:31, 23:31] = planted_pattern()
    ids = tuple(f"{number:03}.png" for number in range(400))
    return ImageSet(ids, pixels, (), f"corner-{n_carriers}"), {ids[row] for row in carriers.tolist()}


def test_a_logo_on_few_images_is_named_and_no_alarm() -> None:
    images, carriers = with_a_corner(10)
    result = pipeline.scan(images, planted_encoder(planted=False), config=MORE)
    assert result.verdict == "no_evidence" and result.flagged == ()
    (pattern,) = result.benign_patterns
    assert set(pattern.source_ids) <= carriers and len(pattern.source_ids) >= 5 and not pattern.steers
    passes = result.summary["passes"]["places"]
    assert passes["expected"] == 0 < passes["actual"] <= passes["most"]


def test_a_trigger_in_a_fixed_corner_is_found_where_clusters_show_too_few_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, carriers = with_a_corner(10)
    config = dataclasses.replace(MORE, clusters=3)
    result = pipeline.scan(images, planted_encoder(), config=config)
    assert result.verdict == "poisoned" and set(result.triggers[0].source_ids) <= carriers
    monkeypatch.setattr(patch_pipeline, "recurring_places", lambda *_, **__: [])
    assert pipeline.scan(images, planted_encoder(), config=config).triggers == ()


def test_the_power_statement_comes_with_every_verdict_but_poisoned(
    clean_scan: ScanResult, reference: Scanned
) -> None:
    assert "power" not in reference.result.summary and "budget" not in reference.result.summary
    power = clean_scan.summary["power"]
    assert 10 < power["smallest_count"] < 100 and power["sentence"].startswith("Poison with an opaque patch")
    tested = clean_scan.summary["finalists"]
    assert all(finalist["p_value"] > 0.01 and finalist["n_sources"] >= 3 for finalist in tested)


def test_nothing_found_is_no_answer_of_a_scan_that_could_have_found_nothing(
    poisoned: tuple[ImageSet, dict[str, Box]],
) -> None:
    encoder = planted_encoder(planted=False)
    few = pipeline.scan(poisoned[0], encoder, config=CONFIG)
    # 40 held-out images confirm no patch that moves a fifth of them.
    assert few.summary["power"]["smallest_count"] is None and few.flagged == ()
    assert few.verdict == "inconclusive" and "no amount of poison" in few.summary["reason"]
    assert "there are too few images to confirm a patch" in few.summary["reason"]


def test_less_poison_than_is_found_surely_is_said_where_it_was_asked_for() -> None:
    images, _ = planted_images(400, 40, torch.Generator().manual_seed(0))
    config = dataclasses.replace(MORE, min_poison=4)
    said = pipeline.scan(images, planted_encoder(planted=False), config=config).summary
    assert said["verdict"] == "inconclusive"
    assert (
        f"ask for {said['power']['smallest_count']}" in said["reason"] and "in the 4 that" in said["reason"]
    )
    with pytest.raises(ConfigError, match="min_poison=401: there are 400 readable images"):
        pipeline.scan(images, planted_encoder(), config=dataclasses.replace(MORE, min_poison=401))


def test_a_preview_decodes_and_writes_nothing_and_says_what_the_scan_says(
    poisoned: tuple[ImageSet, dict[str, Box]], reference: Scanned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "as_image_set", forbidden)
    encoder = planted_encoder()
    seen = pipeline.preview(poisoned[0], encoder, config=CONFIG)
    told = {stage.name: (stage.expected, stage.most) for stage in seen.cost.stages}
    said = reference.result.summary["passes"]
    assert told == {name: (stage["expected"], stage["most"]) for name, stage in said.items()}
    assert seen.n_images == 160 and seen.rate is not None and seen.seconds and not seen.pretraining
    without = pipeline.preview(poisoned[0], config=CONFIG, sample=100)
    assert without.n_images == 100 and without.seconds is None and without.pretraining == 20 * 100
    with pytest.raises(NothingToScanError, match="40 images: a scan needs at least 50"):
        pipeline.preview(poisoned[0], encoder, limit=40)


def test_a_budget_of_passes_is_kept_and_its_cost_in_power_is_said(
    poisoned: tuple[ImageSet, dict[str, Box]],
) -> None:
    most = sum(
        stage.most for stage in pipeline.preview(poisoned[0], planted_encoder(), config=CONFIG).cost.stages
    )
    budget = int(0.6 * most)
    encoder = planted_encoder()
    config = dataclasses.replace(CONFIG, max_passes=budget)
    said = pipeline.scan(poisoned[0], encoder, config=config).summary
    assert encoder.images_shown <= budget and said["budget"]["max_passes"] == budget
    assert said["budget"]["changed"]
    assert {"smallest_count", "smallest_count_unlimited"} <= said["budget"].keys()
    assert said["budget"]["sentence"].startswith("To keep the budget, the search was made smaller (")


def test_a_smaller_second_look_costs_power_and_both_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images looked at again cannot show the five that make a finding."""
    monkeypatch.setattr(
        patch_pipeline, "fit_second_look", lambda config, *_: dataclasses.replace(config, exploit=4)
    )
    images, _ = planted_images(400, 40, torch.Generator().manual_seed(0))
    config = dataclasses.replace(MORE, max_seconds=1e6)
    said = pipeline.scan(images, planted_encoder(), config=config).summary
    budget = said["budget"]
    assert budget["changed"] == {"exploit": [60, 4]} and said["config"]["exploit"] == 4
    assert budget["smallest_count"] is None and 10 < budget["smallest_count_unlimited"] < 100
    assert "images looked at again: 60 became 4), so that no number instead of" in budget["sentence"]
    assert said["verdict"] == "poisoned" or "so small a search comes across too few" in said["reason"]


def test_a_budget_of_seconds_that_cannot_be_kept_is_no_verdict(
    poisoned: tuple[ImageSet, dict[str, Box]],
) -> None:
    config = dataclasses.replace(CONFIG, max_seconds=0.001)
    with pytest.raises(NoVerdictError, match=r"max_seconds=0\.001: too little for the smallest search"):
        pipeline.scan(poisoned[0], planted_encoder(), config=config)
    plenty = dataclasses.replace(CONFIG, max_seconds=1e6)
    said = pipeline.scan(poisoned[0], planted_encoder(), config=plenty).summary
    assert said["budget"]["changed"] == {} and said["verdict"] == "poisoned"


def test_memory_that_runs_out_changes_no_finding(
    poisoned: tuple[ImageSet, dict[str, Box]], reference: Scanned
) -> None:
    encoder = planted_encoder()
    network = encoder.network

    def small_device(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(images)  # type: ignore[no-any-return]

    encoder.network = small_device
    result = pipeline.scan(poisoned[0], encoder, config=CONFIG)
    assert encoder.largest_batch is not None and encoder.largest_batch <= 100
    assert encoder.images_shown == reference.images_shown
    assert result.flagged == reference.result.flagged and ranking(result) == ranking(reference.result)


def test_nothing_of_a_finished_run_is_removed_for_settings_that_no_scan_can_have(tmp_path: Path) -> None:
    images = planted_images(60, 0, torch.Generator().manual_seed(0))[0]
    pipeline.scan(images, config=ScanConfig(method="spectral-dct"), out=tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(ConfigError, match="window=99"):
        pipeline.scan(
            images, planted_encoder(), config=ScanConfig(window=99), out=tmp_path / "run", fresh=True
        )
    with pytest.raises(NothingToScanError, match="40 images: a scan needs at least 50"):
        pipeline.scan(images, planted_encoder(), limit=40, out=tmp_path / "run", fresh=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_another_precision_is_another_run(tmp_path: Path, poisoned: tuple[ImageSet, dict[str, Box]]) -> None:
    pipeline.scan(poisoned[0], planted_encoder(), config=CONFIG, out=tmp_path / "run")
    encoder = planted_encoder()
    encoder.precision = torch.bfloat16
    with pytest.raises(ConfigError, match="precision was 'float32', now 'bfloat16'"):
        pipeline.scan(poisoned[0], encoder, config=CONFIG, out=tmp_path / "run")


def test_a_budget_that_was_too_small_does_not_stand_in_the_way_of_a_larger_one(
    tmp_path: Path, poisoned: tuple[ImageSet, dict[str, Box]]
) -> None:
    for seconds, out in ((0.001, tmp_path / "run"), (0.002, tmp_path / "run")):
        config = dataclasses.replace(CONFIG, max_seconds=seconds)
        with pytest.raises(NoVerdictError, match="too little for the smallest search"):
            pipeline.scan(poisoned[0], planted_encoder(), config=config, out=out)
        assert not out.exists()


def test_what_only_left_out_is_said(poisoned: tuple[ImageSet, dict[str, Box]]) -> None:
    images = poisoned[0]
    result = pipeline._of_a_part(
        ScanResult("no_evidence", None, (), None, {"scope": {"not_tested": ["x"]}}),  # type: ignore[arg-type]
        images,
        60,
        ["a"],
    )
    first, second, _ = result.summary["scope"]["not_tested"]
    assert "only, a list of ids" in first and second.startswith(f"{len(images) - 60} other images")


def test_a_module_is_scanned_as_a_copy() -> None:
    network = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 8))
    images = planted_images(60, 0, torch.Generator().manual_seed(0))[0]
    pipeline.scan(
        images,
        network,
        preprocessing=planted_encoder().preprocessing,
        config=ScanConfig(method="backdoor-ids"),
        device="cpu",
    )
    assert network.training and all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", ["limit", "sample"])
def test_a_part_has_at_least_one_image(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0: expected at least 1 image"):
        pipeline.scan(planted_images(60, 0, torch.Generator())[0], planted_encoder(), **{name: 0})
