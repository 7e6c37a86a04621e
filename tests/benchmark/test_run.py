"""A study from the task file to its tables, and what a kill does to it; digits, tiny networks, seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from safetensors import safe_open

from unpoison.benchmark import cells
from unpoison.benchmark.cells import Bench
from unpoison.benchmark.run import plan_benchmark, run_benchmark
from unpoison.benchmark.task import Cell, Task, read_task
from unpoison.encoders.checkpoints import load_encoder
from unpoison.errors import ConfigError, DataError
from unpoison.report.schemas import SCHEMAS
from unpoison.scan.config import ScanConfig
from unpoison.scan.cost import expected_cost

SAME = ("results.md", "results.html", "results.parquet", "plots/1.svg")


def test_a_finished_study_has_tables_pictures_and_tidy_results(study):
    _, out = study
    text = (out / "results.md").read_text()
    assert (
        "| images | defence | cells | ACC clean % | paper | ASR % | paper | ACC clean (kNN) % | removed |"
        in text
    )
    assert "69.7 [1]" in text and "[1] PoisonCAM, Table I" in text and " ± " in text
    page = (out / "results.html").read_text()
    assert "69.7 [1]" in page and "<svg" in page and "http:" not in page.replace("http://www.w3.org", "")
    frame = pd.read_parquet(out / "results.parquet")
    assert list(frame.columns[:6]) == ["data", "attack", "victim", "defence", "seed", "cell"]
    assert frame["cell"].nunique() == 6 and set(frame["probe"].dropna()) == {"linear", "knn"}
    planted = frame[frame["measure"] == "planted"]["value"]
    assert planted.tolist() == [20, 20]  # one class, all of it, in both seeds
    tops = frame[(frame["measure"] == "top_accuracy") & (frame["at"] == 5)]
    assert tops["value"].between(0, 100).all() and set(tops["unit"]) == {"%"}


def test_results_fit_their_schema(study):
    _, out = study
    value = json.loads((out / "results.json").read_text())
    schema = SCHEMAS["benchmark"]
    assert set(value) == set(schema["properties"]) and value["schema"] == 1
    entry = schema["properties"]["cells"]["items"]["properties"]
    assert set(entry) <= set(value["cells"][0])
    assert set(value["cells"][0]["measurements"][0]) == set(entry["measurements"]["items"]["properties"])
    assert value["n_done"] == value["n_cells"] == 6 and value["failed"] == []


def test_encoders_are_shared_between_cells_and_kept(study):
    _, out = study
    # Per seed one victim and one control; nothing was flagged, so that the cleaned set is the victim's.
    assert len(list((out / "encoders").glob("*.safetensors"))) == 4
    assert len(list((out / "scans").iterdir())) == 2 and len(list((out / "cells").iterdir())) == 6


def test_a_stopped_study_goes_on_and_gives_the_same_bytes(study, tmp_path, monkeypatch):
    task, finished = study
    out = tmp_path / "out"
    computed: list[Cell] = []
    compute = Bench.compute

    def stop_at_the_third(self, cell, **options):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(cell)
        return compute(self, cell, **options)

    monkeypatch.setattr(Bench, "compute", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(task, out, device="cpu")
    assert "2 of 6 cells" in (out / "results.md").read_text()
    assert [entry.done for entry in plan_benchmark(task, out)] == [True] * 2 + [False] * 4

    def count(self, cell, **options):
        computed.append(cell)
        return compute(self, cell, **options)

    monkeypatch.setattr(Bench, "compute", count)
    left = {path.stem for path in (finished / "encoders").glob("*.safetensors")}
    left -= {path.stem for path in (out / "encoders").glob("*.safetensors")}
    for name in left:
        (out / "encoders" / f"{name}.training").write_bytes(b"of a training that another version began")
    assert left
    run_benchmark(task, out, device="cpu")
    assert list((out / "encoders").glob("*.training")) == []
    assert computed == list(task.cells)  # each once
    for name in SAME:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name

    monkeypatch.setattr(Bench, "compute", None)  # nothing is left to compute
    said: list[str] = []
    run_benchmark(task, out, device="cpu", say=said.append)
    assert sum("finished earlier" in line for line in said) == 6
    assert (out / "results.md").read_bytes() == (finished / "results.md").read_bytes()


@pytest.mark.slow
def test_a_killed_study_goes_on_and_gives_the_same_bytes(study, tmp_path):
    task, finished = study
    out = tmp_path / "out"
    command = [sys.executable, "-m", "unpoison", "benchmark", str(task.root / "task.toml"), "--device", "cpu"]
    command += ["--out", str(out)]
    started = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((out / "cells").glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert 2 <= len(kept) < 6
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for name in SAME:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_another_task_reuses_what_it_shares(study, tiny, tmp_path, monkeypatch):
    _, finished = study
    monkeypatch.setattr(cells, "pretrain", None)  # all encoders and scans are there under other names
    names = (
        "[defence.PoisonCAM]",
        "[defence.other]",
        'defence = "PoisonCAM"',
        'defence = "other"',
        ".patch]",
        ".x]",
    )
    renamed = tiny(*names, 'kind = "none"', 'kind = "clean-trained"')
    results = run_benchmark(renamed, tmp_path / "out", store=finished, device="cpu")
    assert len(results.rows) == 6 and not results.failed


def test_other_settings_have_other_keys(tiny):
    base = tiny()

    def key(task: Task, defence: str = "PoisonCAM", attack: str = "patch") -> str | None:
        return Bench(task, Path("nowhere")).key(
            Cell("digits", attack, "resnet", defence, 0), may_decode=False
        )

    assert key(base) is None  # the bytes of the images are part of it


def test_keys_depend_on_settings_and_not_on_names(study, tiny):
    task, out = study
    cell = task.cells[1]
    key = Bench(task, out).key(cell)
    for changes in (("window = 9", "window = 8"), ("epochs = 1", "epochs = 2"), ("rate = 1.0", "rate = 0.9")):
        assert Bench(tiny(*changes), out).key(cell) != key
    assert (
        Bench(tiny("[victim.resnet]", "[victim.otherwise]"), out).key(replace(cell, victim="otherwise"))
        == key
    )
    assert Bench(task, out).key(replace(cell, seed=1)) != key


def test_fresh_computes_again_with_the_kept_encoders(study, tmp_path, monkeypatch):
    task, finished = study
    monkeypatch.setattr(cells, "pretrain", None)
    before = {path: path.stat().st_mtime_ns for path in (finished / "cells").iterdir()}
    results = run_benchmark(task.only_seed(0), tmp_path / "out", store=finished, device="cpu", fresh=True)
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert len(changed) == 3 and len(results.rows) == 3


def test_a_damaged_cell_is_computed_again(study, tmp_path):
    task, finished = study
    bench = Bench(task, finished)
    key = bench.key(task.cells[0])
    path = finished / "cells" / f"{key}.json"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    assert bench.find(key) is None
    path.write_bytes(content)
    assert bench.find(key) is not None


def test_a_cell_that_fails_costs_no_other(tiny, tmp_path):
    task = tiny(
        "share_of_side = 0.25", "vary = [{ size = 8 }, { size = 200, label = 'too large' }]", "[0, 1]", "[0]"
    )
    task = replace(task, cells=tuple(cell for cell in task.cells if cell.defence != "PoisonCAM"))
    results = run_benchmark(task, tmp_path / "out", device="cpu")
    assert len(results.rows) == 2 and len(results.failed) == 2
    assert "the 200-pixel trigger 'seed:100' fits in 0 of 20 images" in results.failed[0][1]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "### Failed" in text and "patch too large, resnet, no defence, seed 0: the 200-pixel" in text


def test_an_unforeseen_failure_leaves_its_traceback(tiny, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("surprise\nmore")

    monkeypatch.setattr(cells, "load_encoder", fail)
    results = run_benchmark(tiny("[0, 1]", "[0]"), tmp_path / "out", device="cpu")
    assert not results.rows and results.failed[0][1].startswith(
        "unexpected RuntimeError: surprise; the traceback"
    )
    assert "Traceback" in (tmp_path / "out" / "failures.txt").read_text()


def test_a_folder_with_something_else_is_refused(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and holds no benchmark; choose another --out"):
        run_benchmark(tiny(), tmp_path / "out")
    with pytest.raises(ConfigError, match="is a file; --out names a folder"):
        run_benchmark(tiny(), tmp_path / "out" / "thesis.txt")


def test_names_from_the_file_are_escaped(tiny, tmp_path):
    nasty = '<script>alert(1)</script> | "x" & y'
    quoted = json.dumps(nasty)
    task = tiny(
        '"no defence"',
        quoted,
        'title = "A tiny study"',
        f"title = {quoted}",
        'title = "Search"',
        f"title = {quoted}",
    )
    task = replace(task, cells=tuple(cell for cell in task.cells if cell.defence == nasty and cell.seed == 0))
    run_benchmark(task, tmp_path / "out", device="cpu")
    for name in ("results.html", "results.md", "plots/1.svg"):
        content = (tmp_path / "out" / name).read_text()
        assert "<script" not in content and "alert(1)" in unescape(content), name
    row = next(line for line in (tmp_path / "out" / "results.md").read_text().split("\n") if "digits" in line)
    assert "\\|" in row


def test_several_triggers_have_their_own_recall_and_share_one_asr(tiny, tmp_path):
    task = tiny("rate = 1.0", "rate = 0.5\npairs = 2", "[0, 1]", "[0]")
    results = run_benchmark(task, tmp_path / "out", device="cpu")
    frame = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert frame[frame["measure"] == "trigger_recall"]["trigger"].tolist() == [0, 1]
    assert frame[frame["measure"] == "planted"]["value"].tolist() == [20]
    asr = frame[(frame["measure"] == "attack_success") & (frame["probe"] == "linear")]
    assert sorted(asr["trigger"]) == [0, 0, 0, 1, 1, 1] and len(results.rows) == 3


def test_a_trigger_that_covers_the_image_is_planted_scanned_and_measured(tiny, tmp_path):
    patch = "share_of_side = 0.25\nrate = 1.0\nmargin = 0.03125"
    task = tiny(patch, 'rate = 1.0\nmethod = "ctrl"\nstrength = 200.0', "[0, 1]", "[0]")
    results = run_benchmark(task, tmp_path / "out", device="cpu")
    rows = [row for _, row in results.rows]
    assert len(rows) == 3 and all(
        row["settings"]["attack"]["method"] == "ctrl" and row["settings"]["attack"]["magnitude"] == 200
        for row in rows
    )
    frame = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(frame["measure"]) >= {"attack_success", "planted", "trigger_recall"}


def test_a_study_of_searches_alone_probes_nothing(tiny, tmp_path):
    task = tiny("[data.digits]", "[evaluate]\nencoders = false\n[data.digits]", "[0, 1]", "[0]")
    results = run_benchmark(task, tmp_path / "out", device="cpu")
    assert [len(row["measurements"]) > 0 for _, row in results.rows] == [False, True, False]
    assert "no" not in {entry["probe"] for entry in results.rows[1][1]["measurements"]}


def test_one_s_own_images_and_triggers_beside_the_task(task_file, tmp_path, picture):
    for split, count in (("train", 30), ("test", 6)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                seed = index + 100 * len(name + split) + (name == "cat") * 1000
                picture(seed, 40, 36).save(tmp_path / "photos" / split / name / f"{index}.png")
    picture(5, 8, 8).save(tmp_path / "patch.png")
    own = 'images = "photos/train"\ntest_images = "photos/test"\nsize = 16\nresize = 20'
    changes = ('embedded = "digits"\nclasses = 3\ntrain = 20\ntest = 10', own, "[0, 1]", "[0]")
    attack = ("rate = 1.0", 'rate = 1.0\ntargets = ["dog"]\ntriggers = ["patch.png"]')
    task = read_task(
        task_file(*changes, *attack, "[data.digits]", "[data.photos]", "window = 9", "window = 5")
    )
    task = replace(task, cells=tuple(cell for cell in task.cells if cell.defence != "PoisonCAM"))
    planned = plan_benchmark(task, tmp_path / "out")
    assert [entry.training for entry in planned] == [60, 60] and planned[0].passes == 60 + 2 * 12
    results = run_benchmark(task, tmp_path / "out", device="cpu")
    assert len(results.rows) == 2 and not results.failed
    assert results.rows[0][1]["settings"]["attack"]["triggers"] == [
        "patch.png"
    ]  # a name, not a path of this machine
    # Without test images a share of every class is held out.
    own = 'images = "photos/train"\nheld_out = 0.2\nsize = 16'
    half = read_task(task_file(changes[0], own, *changes[2:], *attack, "[data.digits]", "[data.photos]"))
    assert Bench(half, tmp_path / "none").chosen(half.cells[0]).test.__len__() == 12


def test_missing_data_and_triggers_are_said(task_file, tmp_path, monkeypatch):
    monkeypatch.setenv("UNPOISON_DATA", str(tmp_path))
    task = read_task(task_file('embedded = "digits"', 'folder = "nowhere"'))
    with pytest.raises(DataError, match="set UNPOISON_DATA to the folder that holds 'nowhere'"):
        plan_benchmark(task, tmp_path / "out")
    with pytest.raises(DataError, match="set UNPOISON_DATA"):  # once, not once per cell
        run_benchmark(task, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "nowhere").mkdir()
    task = read_task(task_file("rate = 1.0", 'targets = [0]\ntriggers = ["none.png"]'))
    with pytest.raises(
        ConfigError, match=r"trigger 'none.png': expected seed:N, or an image file beside the task"
    ):
        plan_benchmark(task, tmp_path / "out")


def test_a_plan_counts_what_is_left_and_writes_nothing(tiny, tmp_path):
    planned = plan_benchmark(tiny(), tmp_path / "out")
    assert [entry.training for entry in planned] == [
        60,
        60,
        60,
    ] * 2  # the second is the cleaned set's encoder
    assert planned[0].passes == 60 + 2 * 30 and planned[1].passes > 60
    assert not (tmp_path / "out").exists()


def test_i_cutmix_and_distillation_are_defences(study, tiny, tmp_path):
    store = shutil.copytree(study[1], tmp_path / "store")
    text = '[defence."no defence"]\nkind = "none"'
    mixed = text.replace("no defence", "i-CutMix") + "\ni_cutmix = true"
    student = '[defence.student]\nkind = "distill"\nepochs = 2\nbatch_size = 10'
    vary = "vary = [{ share = 0.5 }, { share = 0.5, queues = 1 }]"
    task = tiny("[0, 1]", "[0]", text, "\n\n".join((text, mixed, f"{student}\n{vary}")))
    planned = plan_benchmark(task, tmp_path / "out")
    assert [entry.training for entry in planned] == [
        60,
        60,
        60,
        60,
        60,
        60,
    ]  # the victim is known to students
    task = replace(task, cells=tuple(cell for cell in task.cells if cell.defence != "PoisonCAM"))
    results = run_benchmark(task, tmp_path / "out", store=store, device="cpu")
    assert len(results.rows) == 5 and not results.failed
    settings = {cell.defence: row["settings"]["defence"] for cell, row in results.rows}
    assert settings["i-CutMix"]["i_cutmix"] and settings["student share=0.5"]["distill"]["share"] == 0.5
    files = {path.name: path for path in (store / "encoders").glob("*.safetensors")}
    notes = {name: read_notes(path) for name, path in files.items()}
    students = [said for said in notes.values() if said["method"] == "compress"]
    victims = {load_encoder(path).fingerprint for path in files.values()}
    assert len(students) == 2 and all(said["distilled"]["weights"] in victims for said in students)
    assert [said["config"]["i_cutmix"] for said in notes.values()].count(True) == 1
    # Nothing is trained twice: the students are found again.
    trained = {path: path.stat().st_mtime_ns for path in files.values()}
    again = run_benchmark(task, tmp_path / "again", store=store, device="cpu", fresh=True)
    assert all(path.stat().st_mtime_ns == time for path, time in trained.items())
    assert [row["measurements"] for _, row in again.rows] == [row["measurements"] for _, row in results.rows]


def read_notes(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def test_a_plan_counts_a_scan_as_its_dry_run_does(tiny, tmp_path):
    """One cost model: a table of docs/methods.md, and what `scan --dry-run` says."""
    for config, n_images, side, documented in (
        (ScanConfig(), 5000, 32, 0.28e6),
        (ScanConfig(faithful=True), 100_000, 224, 10.2e6),
        (ScanConfig(method="patchsearch", faithful=True), 126_689, 224, 8.2e6),
    ):
        expected = expected_cost(config.resolve(n_images, side), n_images, side).expected
        assert expected == pytest.approx(documented, rel=0.02)
    task = tiny()
    scanned = next(entry for entry in plan_benchmark(task, tmp_path) if entry.cell.defence == "PoisonCAM")
    config = task.axes["defence"]["PoisonCAM"].config.scan.resolve(60, 16)
    assert scanned.passes >= expected_cost(config, 60, 16).expected > 60
