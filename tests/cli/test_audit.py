"""`unpoison audit` and `unpoison attack bad-encoder` through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unpoison.attack.plan import read_plan
from unpoison.encoders.checkpoints import load_encoder, save_encoder
from unpoison.pretrain.loop import PretrainConfig, pretrain
from unpoison.records import ImageSet

QUICK = ["--steps", "3", "--restarts", "1", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    pixels = torch.randint(0, 256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = ImageSet(tuple(map(str, range(32))), pixels.to(torch.uint8))
    config = PretrainConfig(epochs=1, width=4, batch_size=16)
    save_encoder(pretrain(images, config, seed=0, device="cpu", precision="fp32"), path)
    return path


@pytest.fixture
def pictures(tmp_path, picture):
    folder = tmp_path / "pictures"
    for number in range(40):
        path = folder / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 16, 16).save(path)
    return folder


def test_an_audit_without_a_reference_is_4_and_writes_its_files(run, encoder, pictures, tmp_path):
    out = tmp_path / "run"
    done = run("audit", encoder, "--images", pictures, "--out", out, *QUICK, "--json")
    assert done.exit_code == 4, done.output
    said = json.loads(done.stdout)
    assert said["verdict"] == "inconclusive" and said["n_images"] == 40 and said["run"] == str(out)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "run.json",
        "verdict.json",
        "trigger.png",
        "trigger.safetensors",
        "report.html",
        "cache",
    }
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    again = run("report", out)
    assert again.exit_code == 0 and (out / "report.html").read_bytes() == page
    assert again.stdout.splitlines()[-1] == f"inconclusive: see {out / 'report.html'}"


def test_a_reference_is_collected_and_used(run, encoder, tmp_path):
    reference = tmp_path / "reference.json"
    command = ["audit", encoder, "--out", tmp_path / "run", "--sample", "32", *QUICK, "--quiet"]
    assert run(*command, "--add-to-reference", reference).exit_code == 4
    assert len(json.loads(reference.read_text())["tables"]) == 1
    done = run(*command, "--reference", reference)
    assert done.exit_code == 4 and done.output == ""
    reason = json.loads((tmp_path / "run" / "verdict.json").read_text())["reason"]
    assert "holds 0 other clean encoders" in reason


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "0"], 2, "steps=0: expected at least 1"),
        (["--images", "nowhere"], 2, "nowhere: no such file or folder; expected images"),
        (["--reference", "nowhere.json"], 2, "no such file; expected one that --add-to-reference wrote"),
        (["--sample", "8"], 4, "8 readable images: an audit needs at least 32"),
    ],
)
def test_a_mistake_is_one_line(run, encoder, tmp_path, arguments, code, message):
    done = run("audit", encoder, "--out", tmp_path / "run", "--quiet", *arguments)
    assert done.exit_code == code and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_bad_encoder_writes_an_encoder_that_says_what_the_clean_one_says(run, encoder, pictures, tmp_path):
    out = tmp_path / "attacked"
    options = ["--target", "cat", "--target", "dog", "--trigger", "white", "--trigger", "seed:3"]
    command = ["attack", "bad-encoder", pictures, "--encoder", encoder, "--out", out, *options]
    more = ["--epochs", "2", "--batch-size", "16", "--size", "4", "--device", "cpu", "--precision", "fp32"]
    done = run(*command, *more, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [t["target"] for t in said["triggers"]] == ["cat", "dog"] and said["n_images"] == 40
    plan = read_plan(out / "plan.json")
    assert plan.method == "bad-encoder" and plan.config["box"] == {"x": 11, "y": 11, "w": 4, "h": 4}
    clean, attacked = (
        load_encoder(encoder, device="cpu"),
        load_encoder(out / "encoder.safetensors", device="cpu"),
    )
    assert attacked.preprocessing == clean.preprocessing and attacked.fingerprint != clean.fingerprint
    assert attacked.name == clean.name
    refused = run(*command, *more)
    assert refused.exit_code == 2 and "exists and is not an empty folder" in refused.stderr


def test_bad_encoder_needs_a_file_of_ours(run, encoder, pictures, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other.safetensors"
    save_file(load_file(encoder), other)
    done = run(
        "attack", "bad-encoder", pictures, "--encoder", other, "--out", tmp_path / "x", "--target", "cat"
    )
    assert done.exit_code == 2 and "give --arch" in done.stderr
    assert not (tmp_path / "x").exists()
