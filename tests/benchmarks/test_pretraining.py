import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import pretrain_speed
import pretraining

from unpoison.pretrain.loop import METHODS, PretrainConfig
from unpoison.records import ImageSet

OPTIONS = argparse.Namespace(threads=1, device="cpu", fresh=False, retrain=False, seeds=[0], cases=["byol"])


def split(n, seed):
    pixels = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    images = ImageSet(tuple(map(str, range(n))), pixels.to(torch.uint8), fingerprint=str(seed))
    return common.Split(images, torch.arange(n) % 2, ("cat", "dog"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(
        common, "load_split", lambda _data, which: split(*{"train": (12, 0)}.get(which, (6, 1)))
    )
    monkeypatch.setattr(pretraining, "EPOCHS", (1, 2))


def test_each_length_is_a_row_that_is_kept(small, capsys):
    assert common.run_jobs("pretraining", pretraining.jobs(OPTIONS), OPTIONS) == 0
    common.print_table("pretraining", pretraining.table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| method | network | seeds | 1 epochs: kNN % (s) | 2 epochs: kNN % (s) |"
    assert lines[2].startswith("| byol | resnet10 | 1 | ") and lines[3].startswith("| pixels |")
    assert lines[4].startswith("| untrained resnet10 |")
    pretraining.pictures.draw("pretraining", pretraining.plot)
    drawn = (common.RESULTS / "pretraining.svg").read_text()
    assert all(name in drawn for name in ("byol", "pixels", "untrained resnet10"))
    assert common.run_jobs("pretraining", pretraining.jobs(OPTIONS), OPTIONS) == 0
    assert capsys.readouterr().err.count("kept from an earlier run") == 4


def test_every_method_has_its_point_of_every_length():
    options = argparse.Namespace(seeds=[0, 1], cases=list(METHODS))
    jobs = list(pretraining.jobs(options))
    assert len({job.key for job in jobs}) == len(jobs) == 2 * (1 + 2 + len(METHODS) * len(pretraining.EPOCHS))


def test_the_speed_of_all_loops_is_measured(monkeypatch):
    pytest.importorskip("lightly.transforms")
    monkeypatch.setattr(pretrain_speed, "IMAGES", 16)
    monkeypatch.setattr(pretrain_speed, "ROUNDS", 1)
    for method in pretrain_speed.MODULES:
        config = PretrainConfig(method=method, width=4, epochs=1, batch_size=8)
        row = pretrain_speed.measure(config, 0, OPTIONS)
        assert {name: len(values) for name, values in row["rates"].items()} == {
            "ours": 1,
            "lightly": 1,
            "with our views": 1,
        }
        assert row["ratio"] == row["rates"]["ours"][0] / row["rates"]["lightly"][0]
    assert set(pretrain_speed.MODULES) == set(METHODS) - {
        "msf",
        "rotation",
    }  # lightly has no such loss or head


def test_without_lightly_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.delitem(sys.modules, "lightly.transforms", raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain_speed.py"])
    assert pretrain_speed.main() == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("this benchmark needs lightly")
    assert said[0].endswith("pip install 'unpoison[bench]'")


def test_the_table_of_speeds():
    row = {"case": "byol", "arch": "resnet10", "ratio": 2.0}
    rates = {"ours": [10.0], "lightly": [5.0], "with our views": [9.0]}
    text = pretrain_speed.table({"rows": [{**row, "rates": rates}]})
    assert text.splitlines()[-1] == "| byol | resnet10 | 10 | 5 | 2.00 | 9 |"
