"""A study that takes a second: digits, tiny networks, one epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from unpoison.benchmark.run import run_benchmark
from unpoison.benchmark.task import Task, read_task

TASK = """
name = "tiny"
title = "A tiny study"
seeds = [0, 1]

[data.digits]
embedded = "digits"
classes = 3
train = 20
test = 10

[attack.patch]
share_of_side = 0.25
rate = 1.0
margin = 0.03125

[victim.resnet]
epochs = 1
width = 4
batch_size = 20

[defence."no defence"]
kind = "none"

[defence.PoisonCAM]
n_flips = 8
exploit = 5
clusters = 4
window = 9
score = "concentrated"
masks = "random"
n_masks = 8

[defence."clean-trained"]
kind = "clean-trained"

[[table]]
title = "ACC and ASR"
rows = ["data", "defence"]
columns = ["accuracy", "attack_success", "knn.accuracy", "removed"]

[[plot]]
title = "Search"
x = "k"
y = ["top_accuracy"]

[[published]]
where = { defence = "PoisonCAM" }
values = { accuracy = 69.7, attack_success = 0.7 }
source = "PoisonCAM, Table I"
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[..., Path]:
    """task_file("old", "new", ...): the tiny study with texts replaced, as a file."""

    def write(*changes: str, text: str = TASK) -> Path:
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
    (folder / "task.toml").write_text(TASK, encoding="utf-8")
    task = read_task(folder / "task.toml")
    run_benchmark(task, folder / "out", device="cpu")
    return task, folder / "out"
