import json

import pandas as pd
import pytest
import torch
from torch import nn

from unpoison.attack.plan import read_plan
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.records import Geometry


@pytest.fixture
def encoder(monkeypatch):
    """`load_encoder` gives a network of mean colours."""
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    made = Encoder(
        network, Preprocessing(geometry=Geometry(16, 16)), name="colours", device="cpu", precision="fp32"
    )
    monkeypatch.setattr("unpoison.encoders.checkpoints.load_encoder", lambda *args, **options: made)


def test_accuracy_and_attack_success_are_reported(run, encoder, image_folder):
    arguments = ("enc", "--train", image_folder, "--test", image_folder)
    done = run("evaluate", *arguments, "--target", "cat", "--trigger", "seed:7", "--size", 4, "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert [probe["probe"] for probe in value["probes"]] == ["linear", "knn"] and value["n_classes"] == 2
    assert value["probes"][0]["attacks"][0]["target_name"] == "cat" and "scan" not in value
    text = run("evaluate", *arguments).stdout
    assert "ACC %" in text and "colours" in text


def test_a_plan_names_triggers_and_judges_a_scan(run, encoder, image_folder, tmp_path):
    poisoned = tmp_path / "poisoned"
    assert (
        run("attack", "patch", image_folder, "--out", poisoned, "--target", "dog", "--size", 4).exit_code == 0
    )
    bad = {image.id for image in read_plan(poisoned / "plan.json").poisoned}
    ids = sorted(str(path.relative_to(poisoned)) for path in poisoned.rglob("*.png"))
    findings = pd.DataFrame({"id": ids, "cluster": 0, "scored": True, "skip_reason": None})
    findings["flagged"] = findings["id"].isin(bad)
    findings["poison_score"] = findings["poison_probability"] = findings["flagged"].astype(float)
    findings[["box_x", "box_y", "box_w", "box_h"]] = torch.tensor([4, 4, 8, 8]).numpy()
    (tmp_path / "run").mkdir()
    findings.to_parquet(tmp_path / "run" / "findings.parquet")
    arguments = ("enc", "--train", image_folder, "--test", image_folder, "--plan", poisoned / "plan.json")
    done = run("evaluate", *arguments, "--run", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    scan = json.loads(done.stdout)["scan"]
    assert (scan["recall"], scan["precision"], scan["n_poisoned"]) == (1.0, 1.0, 2)
    assert "recall" in run("evaluate", *arguments, "--run", tmp_path / "run").stdout


def test_every_pair_of_a_plan_is_measured(run, encoder, image_folder, tmp_path):
    poisoned = tmp_path / "poisoned"
    pairs = ["--target", "cat", "--trigger", "seed:1", "--target", "dog", "--trigger", "seed:2"]
    pairs += ["--target", "cat", "--trigger", "seed:3"]
    done = run("attack", "patch", image_folder, "--out", poisoned, *pairs, "--size", 4, "--rate", 0.3)
    assert done.exit_code == 0, done.output
    arguments = ("enc", "--train", image_folder, "--test", image_folder, "--plan", poisoned / "plan.json")
    value = json.loads(run("evaluate", *arguments, "--json").stdout)
    for probe in value["probes"]:
        named = [(attack["trigger"], attack["target_name"]) for attack in probe["attacks"]]
        assert named == [("seed:1", "cat"), ("seed:2", "dog"), ("seed:3", "cat")]
    table = run("evaluate", *arguments).stdout
    assert all(pair in table for pair in ("seed:1 → cat", "seed:2 → dog", "seed:3 → cat"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "cat"), "--target and --trigger belong together"),
        (("--plan", "p", "--target", "cat"), "--plan already names targets and triggers"),
        (("--run", "r"), "--run is measured against an answer key: add --plan"),
    ],
)
def test_contradicting_options_are_2(run, image_folder, options, message):
    done = run("evaluate", "enc", "--train", image_folder, "--test", image_folder, *options)
    assert done.exit_code == 2 and message in done.stderr


def test_other_classes_in_the_test_images_are_refused(run, encoder, image_folder, tmp_path):
    (image_folder / "cat").rename(image_folder / "cow")
    (tmp_path / "test" / "emu").mkdir(parents=True)
    (image_folder / "cow/0.png").rename(tmp_path / "test/emu/0.png")
    done = run("evaluate", "enc", "--train", image_folder, "--test", tmp_path / "test")
    assert done.exit_code == 3 and "has the class 'emu', which --train lacks" in done.stderr
