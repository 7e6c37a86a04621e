"""Stage caches: only those of our runs are found, and only they are removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unpoison.caches import clear_cache, find_caches
from unpoison.errors import ConfigError
from unpoison.runs import RunFolder


def begin(path: Path, *, complete: bool = False) -> Path:
    """A run of our own with 1 000 bytes in its cache."""
    RunFolder(path, {"seed": 0})
    (path / "cache" / "pixels").mkdir()
    (path / "cache" / "pixels" / "part").write_bytes(bytes(600))
    (path / "cache" / "features.safetensors").write_bytes(bytes(400))
    if complete:
        (path / "verdict.json").write_text("{}")
    return path


def test_a_run_and_all_runs_below_a_folder_are_found(tmp_path: Path) -> None:
    done, killed = begin(tmp_path / "a" / "deep", complete=True), begin(tmp_path / "b")
    assert [(c.run, c.complete, c.size) for c in find_caches(tmp_path)] == [
        (done, True, 1000),
        (killed, False, 1000),
    ]
    assert [c.run for c in find_caches(done)] == [done]


def test_a_cleared_run_keeps_everything_else(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", complete=True)
    (found,) = find_caches(run)
    clear_cache(found)
    assert find_caches(tmp_path) == [] and sorted(p.name for p in run.iterdir()) == [
        "run.json",
        "verdict.json",
    ]
    assert RunFolder(run, {"seed": 0}).complete  # and the same command still finds its verdict


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    outside = begin(tmp_path / "outside")
    strangers = tmp_path / "runs"
    for name, settings in {
        "none": None,
        "other": {"name": "x"},
        "list": ["unpoison_run"],
        "broken": "{",
    }.items():
        (strangers / name / "cache").mkdir(parents=True)
        if settings is not None:
            text = settings if isinstance(settings, str) else json.dumps(settings)
            (strangers / name / "run.json").write_text(text)
    linked = strangers / "linked"
    linked.mkdir()
    (linked / "run.json").write_text((outside / "run.json").read_text())
    (linked / "cache").symlink_to(outside / "cache")
    (strangers / "way-out").symlink_to(outside)
    assert find_caches(strangers) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing: expected a run folder, or a folder with runs in it"):
        find_caches(tmp_path / "missing")
