import json
import os
from pathlib import Path

import pandas as pd
import pytest

from unpoison.data.load import fingerprint_of
from unpoison.data.sources import open_source


@pytest.fixture
def scanned(image_folder: Path, tmp_path: Path) -> Path:
    """The run folder of a scan of `image_folder` that flagged dog/1.png."""
    folder = tmp_path / "run"
    folder.mkdir()
    source = open_source(image_folder)
    ids = list(source.ids)
    verdict = {"schema": 1, "verdict": "poisoned", "images_fingerprint": fingerprint_of(source)}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    (folder / "run.json").write_text(json.dumps({"images": {"signature": source.signature()}}))
    findings = pd.DataFrame({"id": ids, "flagged": [id == "dog/1.png" for id in ids], "skip_reason": None})
    findings.to_parquet(folder / "findings.parquet")
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
    verdict = json.loads((scanned / "verdict.json").read_text())
    (scanned / "verdict.json").write_text(json.dumps(verdict | {"verdict": "inconclusive"}))
    done = run("clean", image_folder, "--run", scanned, "--out", tmp_path / "cleaned")
    assert done.exit_code == 0 and "not known to be clean" in done.stderr


def test_where_no_link_is_possible_it_says_so(run, scanned, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("unpoison.data.export._link", lambda *_: False)
    done = run("clean", image_folder, "--run", scanned, "--out", tmp_path / "cleaned", "--link")
    assert done.exit_code == 0 and "no hard link was possible, so everything was copied" in done.stderr


def test_unreadable_images_are_counted_apart(run, scanned, image_folder, tmp_path):
    findings = pd.read_parquet(scanned / "findings.parquet")
    findings.loc[findings["id"] == "cat/0.png", "skip_reason"] = "the file is empty"
    findings.to_parquet(scanned / "findings.parquet")
    keep = (scanned / "clean.txt").read_text().replace("cat/0.png\n", "")
    (scanned / "clean.txt").write_text(keep)
    out = tmp_path / "cleaned"
    done = run("clean", image_folder, "--run", scanned, "--out", out)
    assert done.stdout == f"4 images kept, 2 left out (1 of them unreadable): {out}\n"


def test_images_that_changed_since_the_scan_are_refused(run, scanned, image_folder, tmp_path):
    os.utime(image_folder / "cat/0.png", (1, 1))  # only touched: its bytes are the same
    assert (
        run("clean", image_folder, "--run", scanned, "--out", tmp_path / "cleaned", "--list-only").exit_code
        == 0
    )
    (image_folder / "cat/0.png").write_bytes((image_folder / "dog/1.png").read_bytes())
    done = run("clean", image_folder, "--run", scanned, "--out", tmp_path / "again")
    assert done.exit_code == 3 and "same names, other bytes; scan them again" in done.stderr
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["verdict.json", "findings.parquet", "run.json"])
def test_a_damaged_run_is_one_line(run, scanned, image_folder, tmp_path, name):
    (scanned / name).write_text("no JSON, no parquet")
    done = run("clean", image_folder, "--run", scanned, "--out", tmp_path / "cleaned")
    assert done.exit_code == 3 and "a file of the run is damaged; scan again with --fresh" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_id_that_the_scan_does_not_know_is_refused(run, scanned, image_folder, tmp_path):
    with (scanned / "clean.txt").open("a") as file:
        file.write("../secret.png\n")
    done = run("clean", image_folder, "--run", scanned, "--out", tmp_path / "cleaned")
    assert done.exit_code == 3 and "1 of 6 ids are not in" in done.stderr
