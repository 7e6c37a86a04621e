"""The stage caches of runs: where they lie, what they take, and removing them.

RUN/cache lets a killed scan go on, and holds every decoded image. Once there is a verdict nothing reads it any more.
That of an audit is small, and stays: it judges the same encoder by another reference without another search.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from unpoison.errors import ConfigError, DataError

__all__ = ["RUN_MARK", "StageCache", "clear_cache", "find_caches"]

RUN_MARK = "unpoison_run"
"""Tells our run.json from another program's, whose folder must not be touched; its value is the file's schema."""

_LARGEST_SETTINGS = 2**20


@dataclass(frozen=True)
class StageCache:
    """The cache of one scan.

    Attributes:
        run: RUN, the folder.
        complete: whether the run has its verdict and needs its cache no more.
        size: of all files, bytes.
    """

    run: Path
    complete: bool
    size: int


def find_caches(folder: Path) -> list[StageCache]:
    """The caches of a scan, or of all scans in a folder at any depth, in the order of their paths.

    Links are not followed.

    Raises:
        ConfigError: no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: expected a run folder, or a folder with runs in it; there is no such folder"
        )
    found = []
    for path, folders, _ in os.walk(folder):
        run = Path(path)
        folders.sort()
        if "cache" in folders and not (run / "cache").is_symlink() and _is_scan(run):
            folders.remove("cache")
            found.append(StageCache(run, (run / "verdict.json").is_file(), _size(run / "cache")))
    return found


def clear_cache(cache: StageCache) -> None:
    """Remove the files of a cache; the run's results stay.

    Raises:
        DataError: they cannot be removed.
    """
    try:
        shutil.rmtree(cache.run / "cache")
    except OSError as error:
        raise DataError(f"{cache.run / 'cache'}: cannot be removed: {error.strerror}") from error


def _is_scan(folder: Path) -> bool:
    path = folder / "run.json"
    try:
        if path.stat().st_size > _LARGEST_SETTINGS:
            return False
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and RUN_MARK in settings and "audit" not in settings


def _size(folder: Path) -> int:
    return sum(
        os.lstat(os.path.join(path, name)).st_size for path, _, names in os.walk(folder) for name in names
    )
