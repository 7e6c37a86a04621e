import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import zoo

from unpoison.attack.plan import Plan, Trigger
from unpoison.audit.reference import read_reference

WHITE = Trigger(torch.full((3, 1, 1), 255, dtype=torch.uint8), "white", 0, "a", 10, kind="corner")


def a_row(case, seed, share, *, kind="clean", family="ResNet", iou=None):
    said = {
        "mask_share": share,
        "anomaly_index": 1.5,
        "seconds": 20.0,
        "passes": 1000,
        "fingerprint": f"{case}-{seed}",
        "conditions": {"family": family, "image_size": 32, "settings": {"gain": 0.9}, "shadow": "abc"},
        **({} if iou is None else {"iou": iou}),
    }
    linear = {"accuracy": 40.0, "attack_success": [] if kind == "clean" else [95.0], "untriggered_rate": []}
    row = {"case": case, "seed": seed, "kind": kind, "probes": {"linear": linear}}
    if kind == "bad-encoder":
        row["control"] = {"linear": {**linear, "attack_success": [9.0], "accuracy": 41.0}}
    return {**row, "audits": {"default": said, "generated images": dict(said)}}


CLEAN = [a_row("clean", seed, 0.1 + 0.005 * seed) for seed in range(20)]
BAD = [
    a_row("BadEncoder", 0, 0.04, kind="bad-encoder", iou=0.4),
    a_row("BadEncoder", 1, 0.148, kind="bad-encoder", iou=0.1),
]
ALONE = [a_row("BadEncoder, ViT", 0, 0.04, kind="bad-encoder", family="ViT", iou=0.5)]


def test_rows_are_judged_among_the_clean_ones_of_their_family():
    lines = zoo.table({"rows": CLEAN + BAD + ALONE}).splitlines()
    clean, bad, alone = (
        next(line for line in lines if line.startswith(f"| {case} |"))
        for case in ("clean", "BadEncoder", "BadEncoder, ViT")
    )
    # Exactly the clean encoder with the smallest mask ranks first of 20.
    assert "| 1 of 20 |" in clean
    # Masks of 0.04 and 0.148: below all 20, and below 10 of them.
    assert "| 1 of 2 | 1 of 2 | 0.75 | 0.25 (0.10–0.40) |" in bad and "| 41 / 40 | 95 (9) |" in bad
    assert "| no reference | 1 of 1 | – |" in alone
    assert lines[-1] == "| BadEncoder, ViT | 1 | -1.0 | 1 of 1 | 95 (9) | 1 of 1 |"


def test_a_mask_is_drawn_beside_the_true_place(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "KEPT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    plan = Plan("bad-encoder", 0, {}, (WHITE,), (), 0, (0,))
    mask = torch.zeros(1, 32, 32)
    mask[:, 22:, 22:] = 1
    found = SimpleNamespace(mask=mask, pattern=torch.ones(3, 32, 32))
    row = a_row("BadEncoder", 0, 0.04, kind="bad-encoder", iou=0.5)
    zoo.write_sheet([row])
    assert not (tmp_path / "zoo.png").exists()  # nothing is kept here
    path = zoo.picture_of(row["audits"]["default"]["fingerprint"])
    zoo.draw_truth(found, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), plan, path)
    with Image.open(path) as picture:
        assert picture.size == (3 * 64, 64)
        # Inside the frame: the trigger, the mask and the pattern are white there, and black elsewhere.
        assert [picture.getpixel((64 * tile + 52, 52)) for tile in range(3)] == [(255, 255, 255)] * 3
        assert [picture.getpixel((64 * tile + 8, 8)) for tile in range(3)] == [(0, 0, 0)] * 3
    zoo.write_sheet([row, a_row("clean", 0, 0.2)])
    with Image.open(tmp_path / "zoo.png") as sheet:
        assert sheet.size == (4 * 200, 84)


def test_clean_encoders_that_are_held_out_are_judged_but_judge_none():
    held = [
        a_row("clean, held out", 0, 0.09, kind="held-out"),
        a_row("clean, held out", 1, 0.3, kind="held-out"),
    ]
    lines = zoo.table({"rows": CLEAN + held + BAD}).splitlines()
    # 0.09 is below all 20 references: a false alarm. It is none of them: the others are judged as without it.
    assert "| 1 of 2 | 1 of 2 | – |" in next(line for line in lines if line.startswith("| clean, held out |"))
    assert "| 1 of 2 | 1 of 2 | 0.75 |" in next(line for line in lines if line.startswith("| BadEncoder |"))
    (told,) = [line for line in lines if line.startswith("Called backdoored at alpha 0.05. default: ")]
    assert (
        "1 of 2 encoders with BadEncoder and 1 of 2 clean ones held out of the reference, 50 % told" in told
    )


def test_the_clean_rows_become_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "SHIPPED_REFERENCE", tmp_path / "reference.json")
    zoo.write_reference({"rows": json.loads(json.dumps(CLEAN + BAD))})
    (only,) = read_reference(tmp_path / "reference.json")
    assert len(only.mask_shares) == 20 and min(only.mask_shares.values()) == 0.1
    with pytest.raises(SystemExit, match="holds no clean encoder"):
        zoo.write_reference({"rows": BAD})


def test_overlap_is_measured_with_the_nearer_trigger():
    hidden = torch.zeros(32, 32, dtype=torch.bool)
    hidden[21:31, 21:26] = True
    plan = Plan("bad-encoder", 0, {}, (WHITE,), (), 10, (5,))
    assert list(zoo.overlaps(hidden, plan)) == [0.5]


def test_every_case_has_settings_and_targets_of_its_own():
    assert len({case.name for case in zoo.CASES}) == len(zoo.CASES)
    assert sum(case.seeds for case in zoo.CASES if case.attack == "clean") >= 20
    assert sum(case.seeds for case in zoo.CASES if case.attack not in ("clean", "held-out")) >= 20
    for case in zoo.CASES:
        for seed in range(case.seeds):
            json.dumps(zoo.settings_of(case, seed), default=str)
            attack = zoo.attack_of(case, seed)
            assert (attack is None) == (case.attack in ("clean", "held-out"))
            assert attack is None or len(set(attack.targets)) == len(set(attack.triggers)) == case.targets


def test_an_audit_of_the_same_encoder_with_the_same_settings_is_not_repeated(monkeypatch):
    case, encoder = zoo.CASES[0], SimpleNamespace(fingerprint="clean-3")
    row = {**CLEAN[3], "settings": json.loads(json.dumps(zoo.settings_of(case, 3)))}
    monkeypatch.setattr(zoo.common, "known_rows", lambda name, path: [row])
    assert zoo.audits_done(case, 3, encoder) == row["audits"]
    row["settings"]["audits"]["default"]["steps"] += 1
    assert list(zoo.audits_done(case, 3, encoder)) == ["generated images"]
    assert zoo.audits_done(case, 4, encoder) == {}
    assert zoo.audits_done(case, 3, SimpleNamespace(fingerprint="another")) == {}
