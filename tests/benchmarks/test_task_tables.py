import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import task_tables

from fakes import TINY_STUDY
from unpoison.benchmark.cells import Bench
from unpoison.benchmark.task import read_task


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr(task_tables, "TASKS", tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY_STUDY)
    return read_task(tmp_path / "tiny.toml")


def test_a_study_without_a_finished_cell_is_left_alone(task, tmp_path):
    assert task_tables.write("tiny", tmp_path / "store", tmp_path / "tables") == (0, 6)
    assert not (tmp_path / "tables").exists()


def test_finished_cells_become_a_table_with_its_plots(task, tmp_path):
    Bench(task, tmp_path / "store").compute(task.cells[0])
    assert task_tables.write("tiny", tmp_path / "store", tmp_path / "tables") == (1, 6)
    text = (tmp_path / "tables" / "tiny.md").read_text()
    assert "1 of 6 cells" in text and "| digits | no defence | 1 of 2 |" in text
    assert "(tiny/1.svg)" in text and (tmp_path / "tables" / "tiny" / "1.svg").exists()
