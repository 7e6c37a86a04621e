import argparse
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common

from fakes import fake_result

OPTIONS = argparse.Namespace(threads=1, device="cpu", fresh=False, retrain=False, scans=None)
DATA = common.Data(folder="shapes", size=16, classes=2, train=12, test=6)
VICTIM = common.PretrainConfig(epochs=1, batch_size=8, width=8)
CASE = common.Case(name="tiny", data=DATA, victim=VICTIM, side=4)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Results and kept rows go to a temporary folder."""
    monkeypatch.setattr(common, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path


@pytest.fixture
def shapes(tmp_path, monkeypatch, picture):
    """A data set of three classes in Hugging Face-schema parquet, as UNPOISON_DATA holds them."""
    folder = tmp_path / "data" / "shapes"
    folder.mkdir(parents=True)
    names = ["cat", "dog", "owl"]
    for split, count in (("train", 36), ("test", 18)):
        rows = []
        for index in range(count):
            buffer = io.BytesIO()
            picture(index + 1000 * len(split), 16, 16).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": f"{index}.png"})
        table = pa.table({"image": rows, "label": [index % 3 for index in range(count)]})
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(features)}),
            folder / f"{split}-0.parquet",
        )
    monkeypatch.setenv("UNPOISON_DATA", str(tmp_path / "data"))


def job(seed, compute, **settings):
    return common.Job("case", seed, settings, compute)


def results(kept, name="bench"):
    return json.loads((kept / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize(("seed", "target"), [(0, 0), (1, 1), (2, 0), (7, 1)])
def test_target_and_trigger_follow_from_the_seed(seed, target):
    attack = common.attack_of(CASE, seed)
    assert attack.targets == (target,) and attack.triggers == (f"seed:{100 + seed}",)


def test_a_split_is_balanced_and_holds_the_first_classes(shapes):
    train, test = common.load_split(DATA, "train"), common.load_split(DATA, "test")
    assert train.class_names == ("cat", "dog") and train.labels.bincount().tolist() == [12, 12]
    assert test.labels.bincount().tolist() == [6, 6] and not set(train.images.ids) & set(test.images.ids)


def test_too_few_images_and_a_missing_folder_are_said(shapes, monkeypatch):
    with pytest.raises(common.MissingDataError, match="fewer than 13 train images"):
        common.load_split(replace(DATA, train=13), "train")
    with pytest.raises(common.MissingDataError, match="set UNPOISON_DATA"):
        common.load_split(replace(DATA, folder="nowhere"), "train")


def test_one_case_from_images_to_numbers(shapes, kept, monkeypatch):
    scanned = []

    def scan_once(images, encoder, config, plan, seed):
        scanned.append((config.attention, len(images), plan is None))
        result = fake_result(n_flagged=6, ids=list(images.ids), pixels=images.pixels, size=16)
        row = {"verdict": result.verdict, "seconds": 0.0, "p_value": 0.001, "n_flagged": len(result.flagged)}
        return row if plan is None else {**row, **common.quality(result, plan, images, encoder)}

    monkeypatch.setattr(common, "scan_once", scan_once)
    assert common.run("bench", [CASE], argparse.Namespace(**vars(OPTIONS), seeds=[0])) == 0
    row = results(kept)["rows"][0]
    assert row["n_images"] == 24 and row["n_poisoned"] == 12 and row["target"] == "cat"
    assert set(row["victim"]["linear"]) == set(row["control"]["knn"])
    assert 0 <= row["scans"]["mask"]["top10"] <= 1 and row["machine"]["threads"] == 1
    assert scanned == [(scan.attention, 24, False) for scan in common.SCANS.values()]
    assert "(" in common.victim_table(results(kept))
    # Both encoders are kept: the second run trains nothing.
    monkeypatch.setattr(common, "pretrain", None)
    again = argparse.Namespace(**{**vars(OPTIONS), "fresh": True}, seeds=[0])
    assert common.run("bench", [CASE], again) == 0
    assert results(kept)["rows"][0]["victim"] == row["victim"]


def test_a_clean_case_scans_the_control(shapes, kept, monkeypatch):
    monkeypatch.setattr(
        common, "scan_once", lambda *arguments: {"plan": arguments[3], "verdict": "no_evidence"}
    )
    row = common.run_case(replace(CASE, poisoned=False), 0, OPTIONS, {})
    assert "victim" not in row and row["scans"]["mask"]["plan"] is None


def test_single_scans_are_made_again_and_the_others_kept(shapes, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(common, "scan_once", lambda *_: calls.append(1) or {"number": len(calls)})
    case = replace(CASE, poisoned=False)
    options = argparse.Namespace(**vars(OPTIONS), seeds=[0])
    assert common.run("bench", [case], options) == 0
    options.fresh, options.scans = True, ["mask"]
    assert common.run("bench", [case], options) == 0
    said = results(kept)["rows"][0]["scans"]
    assert len(calls) == 5 and list(said) == list(common.SCANS)
    assert [scan["number"] for scan in said.values()] == [5, 2, 3, 4]


def test_finished_rows_are_kept_and_a_failure_costs_no_other(kept, capsys):
    calls = []

    def fail():
        raise RuntimeError("out of luck")

    def good(seed):
        return job(seed, lambda: calls.append(seed) or {"value": seed})

    assert common.run_jobs("bench", [good(0), job(1, fail), good(2)], OPTIONS) == 1
    assert [row["seed"] for row in results(kept)["rows"]] == [0, 2]
    said = capsys.readouterr().err
    assert "out of luck" in said and "failed: case seed 1" in said
    assert common.run_jobs("bench", [good(0), good(1), good(2)], OPTIONS) == 0
    assert calls == [0, 2, 1] and [row["value"] for row in results(kept)["rows"]] == [0, 1, 2]


def test_other_settings_and_fresh_compute_again_and_the_newest_row_counts(kept):
    common.run_jobs("bench", [job(0, lambda: {"value": 1}, epochs=1)], OPTIONS)
    common.run_jobs("bench", [job(0, lambda: {"value": 2}, epochs=2)], OPTIONS)
    assert [row["value"] for row in results(kept)["rows"]] == [2]
    fresh = argparse.Namespace(**{**vars(OPTIONS), "fresh": True})
    common.run_jobs("bench", [job(0, lambda: {"value": 3}, epochs=2)], fresh)
    assert [row["value"] for row in results(kept)["rows"]] == [3]


def test_a_fresh_clone_goes_on_from_the_committed_rows(kept):
    calls = []

    def counted(seed):
        return job(seed, lambda: calls.append(seed) or {"value": seed})

    common.run_jobs("bench", [counted(0), counted(1)], OPTIONS)
    (kept / "kept" / "bench.jsonl").unlink()
    common.run_jobs("bench", [counted(0), counted(1), counted(2)], OPTIONS)
    assert calls == [0, 1, 2] and [row["value"] for row in results(kept)["rows"]] == [0, 1, 2]
    common.run_jobs("bench", [job(0, lambda: {"value": 7}, epochs=9)], OPTIONS)  # other settings, another row
    assert [row["value"] for row in results(kept)["rows"]] == [7, 1, 2]


def test_committed_rows_without_a_key_stay_until_they_are_measured_again(kept):
    old = {"case": "case", "seed": 1, "value": 4}
    (kept / "results").mkdir()
    (kept / "results" / "bench.json").write_text(json.dumps({"rows": [{**old, "seed": 0}, old]}))
    common.run_jobs("bench", [job(0, lambda: {"value": 5})], OPTIONS)
    assert [row["value"] for row in results(kept)["rows"]] == [5, 4]


def test_a_line_that_a_kill_cut_off_is_ignored(kept):
    common.run_jobs("bench", [job(0, lambda: {"value": 1})], OPTIONS)
    with (kept / "kept" / "bench.jsonl").open("a") as file:
        file.write('{"key": "abc", "val')
    assert len(common.read_rows(kept / "kept" / "bench.jsonl")) == 1


def test_missing_data_ends_the_benchmark_in_one_line(kept, capsys):
    def missing():
        raise common.MissingDataError("no real images: set UNPOISON_DATA")

    assert common.run_jobs("bench", [job(0, missing)], OPTIONS) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "no real images: set UNPOISON_DATA"


@pytest.mark.parametrize(
    ("values", "how", "text"),
    [
        ([1.0, 0.9, 1.0], {"percent": True}, "100 (90–100)"),
        ([3.2], {}, "3"),
        ([None], {}, "–"),
        ([0.5, None, 0.25], {"digits": 2}, "0.38 (0.25–0.50)"),
    ],
)
def test_a_cell_is_median_and_range(values, how, text):
    assert common.spread(values, **how) == text


def test_the_settings_of_a_case_make_its_key():
    here = common.settings_of(CASE, 0)
    assert common.digest(here) != common.digest(common.settings_of(CASE, 1))
    longer = replace(CASE, victim=replace(VICTIM, epochs=2))
    assert common.digest(here) != common.digest(common.settings_of(longer, 0))
    assert torch.get_num_threads() >= 1
