"""A run folder: stages survive a kill, other runs and other people's files are never overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch
from torch import Tensor

from fakes import fake_result
from unpoison import runs
from unpoison.errors import ConfigError, DataError
from unpoison.records import Evidence
from unpoison.runs import MemoryRun, RunFolder, Stages, load_result

SETTINGS = {"seed": 0, "config": {"clusters": 5, "alpha": 0.01}, "images": {"signature": "abc"}}


class Work:
    """A stage that counts how often it is computed, and the encoder passes that it costs."""

    def __init__(self) -> None:
        self.computed = 0
        self.passes = 0

    def __call__(self) -> dict[str, Tensor]:
        self.computed += 1
        self.passes += 10
        return {"values": torch.arange(6.0).view(2, 3), "rows": torch.tensor([2, 1])}

    def on(self, run: Stages, name: str = "features") -> dict[str, Tensor]:
        return run.stage(name, self, passes=lambda: self.passes)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- Stages ----------------------------------------------------------------------------------------------------------


def test_a_run_in_memory_computes_and_counts() -> None:
    run, work = MemoryRun(), Work()
    work.on(run, "explore-00")
    work.on(run, "explore-01")
    work.on(run, "confirm")
    assert work.computed == 3 and run.passes == 30
    assert set(run.seconds) == {"explore", "confirm"} and min(run.seconds.values()) >= 0


def test_a_second_run_computes_nothing_and_costs_the_same(tmp_path: Path) -> None:
    first, work = RunFolder(tmp_path / "run", SETTINGS), Work()
    made = {name: work.on(first, name) for name in ("features", "explore-00", "explore-01")}
    second, idle = RunFolder(tmp_path / "run", SETTINGS), Work()
    found = {name: idle.on(second, name) for name in made}
    assert idle.computed == 0
    assert (second.passes, second.seconds) == (first.passes, first.seconds) and first.passes == 30
    for name in made:
        assert all(torch.equal(made[name][key], found[name][key]) for key in ("values", "rows"))


def test_tensors_of_any_layout_are_kept(tmp_path: Path) -> None:
    tensors = {
        "turned": torch.arange(6.0).view(2, 3).T,
        "channels_last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "empty": torch.empty(0, 5),
        "number": torch.tensor(0.25, dtype=torch.float64),
    }
    RunFolder(tmp_path / "run", SETTINGS).stage("odd", lambda: tensors)
    found = RunFolder(tmp_path / "run", SETTINGS).stage("odd", dict)
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert all(found[key].dtype == tensors[key].dtype for key in tensors)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * len(b)])
def test_a_damaged_stage_is_computed_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    Work().on(RunFolder(tmp_path / "run", SETTINGS))
    file = tmp_path / "run" / "cache" / "features.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    work = Work()
    again = work.on(RunFolder(tmp_path / "run", SETTINGS))
    assert work.computed == 1 and again["rows"].tolist() == [2, 1]
    idle = Work()
    idle.on(RunFolder(tmp_path / "run", SETTINGS))
    assert idle.computed == 0


def test_a_stage_that_is_killed_leaves_nothing_and_the_others_stay(tmp_path: Path) -> None:
    def killed() -> dict[str, Tensor]:
        raise KeyboardInterrupt

    work = Work()
    first = RunFolder(tmp_path / "run", SETTINGS)
    before = work.on(first)
    with pytest.raises(KeyboardInterrupt):
        first.stage("explore-00", killed)
    assert [p.name for p in first.cache.iterdir()] == ["features.safetensors"] and not first.complete

    idle, more = Work(), Work()
    second = RunFolder(tmp_path / "run", SETTINGS)
    assert torch.equal(idle.on(second)["values"], before["values"])
    more.on(second, "explore-00")
    assert (idle.computed, more.computed, second.passes) == (0, 1, 20)


def test_a_kill_while_writing_leaves_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            Work().on(RunFolder(tmp_path / "run", SETTINGS))
    work = Work()
    work.on(RunFolder(tmp_path / "run", SETTINGS))
    assert work.computed == 1


# --- Whose folder is it? ---------------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", SETTINGS)
    before = files_below(tmp_path)
    other = {**SETTINGS, "seed": 3, "config": {"clusters": 9, "alpha": 0.01}}
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path / "run", other)
    assert "holds a run with other settings: config.clusters was 5, now 9; seed was 0, now 3;" in str(
        caught.value
    )
    assert "choose another --out, or --fresh" in str(caught.value) and "\n" not in str(caught.value)
    assert files_below(tmp_path) == before


def test_many_differences_are_counted(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {**SETTINGS, **{f"s{i}": 0 for i in range(5)}})
    with pytest.raises(
        ConfigError, match=r"s0 was 0, now 1; s1 was 0, now 1; s2 was 0, now 1 \(and 2 more\)"
    ):
        RunFolder(tmp_path / "run", {**SETTINGS, **{f"s{i}": 1 for i in range(5)}})


def test_settings_compare_as_they_are_written(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {**SETTINGS, "mean": (0.5, 0.5)})
    RunFolder(tmp_path / "run", {**SETTINGS, "mean": (0.5, 0.5)})  # a tuple comes back as a list


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "content", [{"holiday.jpg": b"x"}, {"run.json": b"not json"}, {"verdict.json": b"{}"}, {"cache/a": b"x"}]
)
def test_a_folder_that_holds_something_else_is_refused_and_untouched(
    tmp_path: Path, content: dict[str, bytes], fresh: bool
) -> None:
    for name, data in content.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(data)
    with pytest.raises(ConfigError, match="exists and holds no unpoison run; choose another --out"):
        RunFolder(tmp_path / "run", SETTINGS, fresh=fresh)
    assert files_below(tmp_path / "run") == content


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("content", ["[]", '{"learning_rate": 0.1}'])
def test_a_run_of_another_program_is_refused_and_untouched(tmp_path: Path, content: str, fresh: bool) -> None:
    folder = tmp_path / "run"
    (folder / "cache").mkdir(parents=True)
    (folder / "run.json").write_text(content)
    (folder / "encoder.safetensors").write_bytes(b"precious")
    (folder / "cache" / "mine").write_bytes(b"precious too")
    before = files_below(folder)
    with pytest.raises(ConfigError, match="choose another --out"):
        RunFolder(folder, SETTINGS, fresh=fresh)
    assert files_below(folder) == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; --out names a folder"):
        RunFolder(tmp_path / "run", SETTINGS, fresh=True)
    assert (tmp_path / "run").read_text() == "mine"


def test_an_empty_folder_and_one_with_only_a_log_will_do(tmp_path: Path) -> None:
    for name in ("empty", "logged"):
        (tmp_path / name).mkdir()
    (tmp_path / "logged" / "log.txt").write_text("earlier\n")
    for name in ("empty", "logged"):
        assert not RunFolder(tmp_path / name, SETTINGS).complete
    assert (tmp_path / "logged" / "log.txt").read_text() == "earlier\n"


def test_fresh_removes_what_runs_write_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = RunFolder(folder, SETTINGS)
    Work().on(run)
    run.save(fake_result())
    (folder / "triggers" / "trigger-1.png").write_bytes(b"png")
    (folder / "report.html").write_text("report")
    (folder / "encoder.safetensors").write_bytes(b"weights")
    (folder / "notes.txt").write_text("mine")
    (folder / "log.txt").write_text("log")
    (folder / "album").mkdir()
    again = RunFolder(folder, {**SETTINGS, "seed": 1}, fresh=True)
    assert not again.complete
    assert {p.name for p in folder.iterdir()} == {"run.json", "cache", "notes.txt", "log.txt", "album"}
    assert not list((folder / "cache").iterdir())
    assert json.loads((folder / "run.json").read_text())["seed"] == 1


def test_fresh_needs_no_earlier_run(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "a" / "b", SETTINGS, fresh=True).cache.is_dir()


def test_a_run_that_is_refused_at_once_leaves_no_trace(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", SETTINGS).forget()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("log")
    RunFolder(tmp_path / "run", SETTINGS).forget()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["log.txt"]


def test_a_run_that_goes_on_is_not_forgotten(tmp_path: Path) -> None:
    Work().on(RunFolder(tmp_path / "run", SETTINGS))
    before = files_below(tmp_path)
    RunFolder(tmp_path / "run", SETTINGS).forget()
    assert files_below(tmp_path) == before


# --- Results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["poisoned", "no_evidence", "inconclusive"])
def test_a_result_comes_back_as_it_was(tmp_path: Path, verdict: str) -> None:
    result = fake_result(verdict, skipped={"broken.png": "cannot be decoded"})
    run = RunFolder(tmp_path / "run", SETTINGS)
    run.save(result)
    assert run.complete
    found = load_result(tmp_path / "run")
    assert (found.verdict, found.summary, found.flagged) == (result.verdict, result.summary, result.flagged)
    pandas.testing.assert_frame_equal(found.findings, result.findings, check_dtype=False)
    assert found.evidence.ids == result.evidence.ids
    assert torch.equal(found.evidence.pixels, result.evidence.pixels)
    assert torch.equal(found.evidence.attention, result.evidence.attention)
    assert len(found.triggers) == len(result.triggers)
    for one, other in zip(found.triggers, result.triggers, strict=True):
        assert torch.equal(one.patches, other.patches)
        names = (
            "target_cluster target_clusters flip_rate control_rate p_value n_sources source_ids boxes image"
        )
        assert all(getattr(one, name) == getattr(other, name) for name in names.split())


def test_a_result_without_evidence_comes_back_too(tmp_path: Path) -> None:
    result = fake_result("no_evidence")
    empty = Evidence((), result.evidence.pixels[:0], result.evidence.attention[:0])
    RunFolder(tmp_path / "run", SETTINGS).save(
        type(result)(result.verdict, result.findings, (), empty, result.summary)
    )
    assert load_result(tmp_path / "run").evidence.pixels.shape == (0, 3, 32, 32)


def test_lists_hold_each_readable_image_once(tmp_path: Path) -> None:
    result = fake_result(skipped={"broken.png": "cannot be decoded"})
    RunFolder(tmp_path / "run", SETTINGS).save(result)
    clean, flagged = (
        (tmp_path / "run" / name).read_text().splitlines() for name in ("clean.txt", "flagged.txt")
    )
    assert flagged == list(result.flagged)
    assert (tmp_path / "run/triggers/trigger-1.txt").read_text().splitlines() == flagged
    assert sorted(clean + flagged + ["broken.png"]) == sorted(result.findings["id"])


def test_the_verdict_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, set[str]] = {}
    write = runs.write_json_atomically

    def watched(path: Path, value: object) -> None:
        there[path.name] = {p.name for p in path.parent.iterdir()}
        write(path, value)

    run = RunFolder(tmp_path / "run", SETTINGS)
    monkeypatch.setattr(runs, "write_json_atomically", watched)
    run.save(fake_result())
    everything = {
        "findings.parquet",
        "clean.txt",
        "flagged.txt",
        "evidence.safetensors",
        "run.json",
        "cache",
    } | {"triggers"}
    assert there["verdict.json"] == everything


def test_a_kill_while_saving_leaves_an_unfinished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    run = RunFolder(tmp_path / "run", SETTINGS)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save(fake_result())
    assert not RunFolder(tmp_path / "run", SETTINGS).complete
    run.save(fake_result())
    assert load_result(tmp_path / "run").verdict == "poisoned"


def test_no_finished_run_is_said_so(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", SETTINGS)
    for folder in (tmp_path / "run", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"holds no finished run \(no verdict.json\)"):
            load_result(folder)


@pytest.mark.parametrize("name", ["findings.parquet", "evidence.safetensors", "verdict.json"])
@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_result_is_said_so(tmp_path: Path, name: str, content: bytes | None) -> None:
    RunFolder(tmp_path / "run", SETTINGS).save(fake_result())
    file = tmp_path / "run" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    expected = ConfigError if (name, content) == ("verdict.json", None) else DataError
    with pytest.raises(expected, match="--fresh|holds no finished run"):
        load_result(tmp_path / "run")


def test_a_folder_that_cannot_be_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match="file/run: cannot be written: Not a directory; choose another --out"
    ):
        RunFolder(tmp_path / "file" / "run", {"seed": 0})


def test_files_are_as_readable_as_others_and_a_killed_runs_are_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {"seed": 0})
    run.stage("features", lambda: {"x": torch.zeros(2)})
    kept = tmp_path / "run" / "cache" / "features.safetensors"
    assert kept.stat().st_mode == (tmp_path / "run" / "run.json").stat().st_mode
    (tmp_path / "run" / "cache" / "features.safetensors.1.tmp").write_bytes(b"half")
    RunFolder(tmp_path / "run", {"seed": 0})
    assert [path.name for path in kept.parent.iterdir()] == ["features.safetensors"]


def test_a_folder_of_the_users_stays_when_a_run_is_refused(tmp_path: Path) -> None:
    for name in ("mine", "new"):
        if name == "mine":
            (tmp_path / name).mkdir()
        RunFolder(tmp_path / name, {"seed": 0}).forget()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
