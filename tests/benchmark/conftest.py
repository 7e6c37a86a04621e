"""A study that takes a second: digits, tiny networks, one epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import TINY_STUDY
from unpoison.benchmark.run import run_benchmark
from unpoison.benchmark.task import Task, read_task


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[..., Path]:
    """task_file("old", "new", ...): the tiny study with texts replaced, as a file."""

    def write(*changes: str, text: str = TINY_STUDY) -> Path:
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / "task.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def tiny(task_file: Callable[..., Path]) -> Callable[..., Task]:
    """tiny("old", "new", ...): the tiny study, read."""
    return lambda *changes: read_task(task_file(*changes))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    """The tiny study and the folder that an uninterrupted run filled."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "task.toml").write_text(TINY_STUDY, encoding="utf-8")
    task = read_task(folder / "task.toml")
    run_benchmark(task, folder / "out", device="cpu")
    return task, folder / "out"
