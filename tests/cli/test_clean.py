import json
from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture
def scanned(image_folder: Path, tmp_path: Path) -> Path:
    """The run folder of a scan of `image_folder` that flagged dog/1.png."""
    folder = tmp_path / "run"
    folder.mkdir()
    ids = sorted(str(path.relative_to(image_folder)) for path in image_folder.rglob("*.png"))
    (folder / "verdict.json").write_text(json.dumps({"schema": 1, "verdict": "poisoned"}))
    pd.DataFrame({"id": ids, "flagged": [id == "dog/1.png" for id in ids]}).to_parquet(
        folder / "findings.parquet"
    )
    (folder / "clean.txt").write_text("".join(f"{id}\n" for id in ids if id != "dog/1.png"))
    return folder


@pytest.mark.parametrize(("option", "mode"), [((), "copy"), (("--link",), "link")])
def test_what_is_flagged_stays_behind(run, scanned, image_folder, tmp_path, option, mode):
    out = tmp_path / "cleaned"
    done = run("clean", image_folder, "--run", scanned, "--out", out, "--json", *option)
    value = json.loads(done.stdout)
    assert (value["kept"], value["removed"], value["mode"]) == (5, 1, mode)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == [
        "cat/0.png",
        "cat/1.png",
        "cat/2.png",
        "dog/0.png",
        "dog/2.png",
    ]
    assert (image_folder / "dog/1.png").exists()


def test_a_list_is_enough_when_asked(run, scanned, image_folder, tmp_path):
    out = tmp_path / "cleaned"
    done = run("clean", image_folder, "--run", scanned, "--out", out, "--list-only")
    assert done.exit_code == 0 and done.stdout == f"5 images kept, 1 left out: {out}\n"
    assert (out / "clean.txt").read_text() == (scanned / "clean.txt").read_text()


def test_images_that_were_never_examined_are_refused(run, scanned, image_folder, tmp_path):
    (image_folder / "cat/0.png").rename(image_folder / "cat/new.png")
    done = run("clean", image_folder, "--run", scanned, "--out", tmp_path / "cleaned")
    assert done.exit_code == 3 and "is the scan of other images: it knows 1 that" in done.stderr
    (image_folder / "cat/0.png").write_bytes((image_folder / "cat/new.png").read_bytes())
    done = run("clean", image_folder, "--run", scanned, "--out", tmp_path / "cleaned")
    assert done.exit_code == 3 and "never examined 1 of the 7 images" in done.stderr
    assert not (tmp_path / "cleaned").exists()


def test_a_folder_that_is_no_run_is_refused(run, image_folder, tmp_path):
    done = run("clean", image_folder, "--run", tmp_path, "--out", tmp_path / "cleaned")
    assert done.exit_code == 2 and "holds no verdict.json: expected the folder of a finished" in done.stderr


def test_two_modes_are_one_too_many(run, scanned, image_folder, tmp_path):
    out = tmp_path / "cleaned"
    done = run("clean", image_folder, "--run", scanned, "--out", out, "--link", "--list-only")
    assert done.exit_code == 2 and "--link and --list-only contradict each other" in done.stderr


def test_after_an_inconclusive_scan_it_warns(run, scanned, image_folder, tmp_path):
    (scanned / "verdict.json").write_text(json.dumps({"verdict": "inconclusive"}))
    done = run("clean", image_folder, "--run", scanned, "--out", tmp_path / "cleaned")
    assert done.exit_code == 0 and "not known to be clean" in done.stderr
