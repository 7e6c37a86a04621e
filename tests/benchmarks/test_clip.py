import argparse
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import clip
import common

from pairs import CONFIG, NAMES, coloured

OPTIONS = argparse.Namespace(threads=1, device="cpu", fresh=False, retrain=False, scans=None)


def split(n, seed):
    images, labels = coloured(n, seed)
    return common.Split(images, labels, NAMES)


def test_trusted_images_are_the_last_of_each_class_and_nothing_is_in_both_parts(monkeypatch):
    monkeypatch.setattr(clip, "TRUSTED", 3)
    whole = split(40, 0)
    train, trusted = clip.parted(whole)
    assert train.labels.bincount().tolist() == [7] * 4 and trusted.labels.bincount().tolist() == [3] * 4
    assert sorted(train.images.ids + trusted.images.ids) == list(whole.images.ids)
    for label in range(4):
        own = [id_ for id_, of in zip(whole.images.ids, whole.labels.tolist(), strict=True) if of == label]
        assert [
            id_ for id_, of in zip(trusted.images.ids, trusted.labels.tolist(), strict=True) if of == label
        ] == own[-3:]


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(clip, "TRUSTED", 16)
    monkeypatch.setattr(clip, "DATA", dataclasses.replace(clip.DATA, size=16, classes=4))
    monkeypatch.setattr(clip, "VICTIM", CONFIG)
    monkeypatch.setattr(
        clip, "REPAIRS", {"CleanCLIP": dataclasses.replace(clip.REPAIRS["CleanCLIP"], epochs=1)}
    )
    monkeypatch.setattr(
        common, "load_split", lambda _data, which: split(*{"train": (192, 0)}.get(which, (32, 1)))
    )
    monkeypatch.setattr(clip, "audited", lambda pair, seed: {"mask_share": 0.1})
    seen = []

    def scanned(images, encoder, config, plan, seed):
        seen.append((len(images), len(plan.poisoned)))
        return {"verdict": "poisoned", "top20": 1.0, "recall": 0.9, "precision": 0.8}

    monkeypatch.setattr(common, "scan_once", scanned)
    return seen


def test_a_case_measures_both_models_before_and_after_and_keeps_them(small, capsys):
    jobs = [
        common.Job("a tenth", 0, clip.settings_of(0.1, 0), lambda: clip.run_case("a tenth", 0.1, 0, OPTIONS))
    ]
    assert common.run_jobs("clip", jobs, OPTIONS) == 0
    assert small == [(128, 13)]  # the trusted images are not scanned
    common.print_table("clip", clip.table)
    victim, control = capsys.readouterr().out.splitlines()[2:]
    assert victim.startswith("| a tenth (13) | poisoned pairs | 1 | ")
    assert victim.endswith("| 10.0 | 1 × poisoned | 100 | 90 / 80 |")
    assert control.startswith("|  | the same, clean | 1 | ") and control.endswith("| – | – | – |")
    row = clip.run_case("a tenth", 0.1, 0, OPTIONS)
    for who in ("victim", "control"):
        assert row[who].keys() >= {"accuracy", "attack_success", "untriggered_rate", "audit", "CleanCLIP"}
    kept = list((common.KEPT / "encoders").glob("*.words.safetensors"))
    assert len(kept) == 2  # not trained a second time under other names
    (known,) = common.known_rows("clip", common.KEPT / "clip.jsonl")[-1:]
    rescanned = clip.run_case(
        "a tenth", 0.1, 0, argparse.Namespace(**{**vars(OPTIONS), "scans": ["default"]})
    )
    assert len(small) == 3 and rescanned["victim"] == known["victim"] and "key" not in rescanned


def test_seeds_have_targets_and_triggers_of_their_own():
    attacks = [clip.attack_of(0.01, seed) for seed in range(10)]
    assert len({attack.targets for attack in attacks}) == len({attack.triggers for attack in attacks}) == 10
    assert torch.tensor([attack.rate for attack in attacks]).eq(0.01).all()
