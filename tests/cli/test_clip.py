"""Poisoned pairs, training, zero-shot evaluation and repair on the command line."""

import json
import re

import pytest
import torch
from PIL import Image

from pairs import NAMES, coloured
from unpoison.encoders.checkpoints import load_encoder


@pytest.fixture
def images(tmp_path):
    pictures, labels = coloured(64, 1)
    for id_, pixels, label in zip(pictures.ids, pictures.pixels, labels.tolist(), strict=True):
        path = tmp_path / "images" / NAMES[label] / id_
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)
    return tmp_path / "images"


OUT = ("--out", "x.safetensors")
SMALL = ("--width", 8, "--epochs", 2, "--batch-size", 32, "--device", "cpu", "--json")


def test_the_whole_story(run, images, tmp_path):
    out = tmp_path / "pairs"
    done = run("attack", "clip", images, "--out", out, "--target", "red_apple", "--rate", 0.1, "--json")
    attack = json.loads(done.stdout)
    assert done.exit_code == 0 and attack["method"] == "clip-poison" and attack["n_poisoned"] == 6
    victim = tmp_path / "victim.safetensors"
    done = run("pretrain", "clip", out, "--captions", attack["captions"], "--out", victim, *SMALL)
    trained = json.loads(done.stdout)
    assert done.exit_code == 0 and trained["method"] == "clip" and trained["n_images"] == 64
    tower = load_encoder(victim, device="cpu")
    assert tower.features(torch.zeros(1, 3, 32, 32)).shape == (1, 64) and tower.captioned
    repaired = tmp_path / "repaired.safetensors"
    shorter = ("--epochs", 1, "--batch-size", 32, "--device", "cpu", "--json")
    done = run("repair", "cleanclip", victim, images, "--out", repaired, *shorter)
    assert done.exit_code == 0 and json.loads(done.stdout)["words"].endswith("repaired.words.safetensors")
    assert load_encoder(repaired, device="cpu").captioned
    for encoder in (victim, repaired):
        done = run("evaluate", encoder, "--zero-shot", "--test", images, "--plan", attack["plan"], "--json")
        report = json.loads(done.stdout)
        assert done.exit_code == 0 and [p["probe"] for p in report["probes"]] == ["zero-shot"]
        assert report["probes"][0]["attacks"][0]["target_name"] == "red_apple" and report["n_test"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("pretrain", "simclr", "{images}", "--captions", "c.json", *OUT),
            "reads no texts; use clip",
        ),
        (
            ("pretrain", "clip", "{images}", "--captions", "c.json", *OUT),
            "cannot read the captions",
        ),
        (
            ("evaluate", "x.safetensors", "--test", "{images}"),
            "expected --train IMAGES .* or --zero-shot instead",
        ),
        (
            ("evaluate", "x.safetensors", "--test", "{images}", "--train", "{images}", "--zero-shot"),
            "expected --train IMAGES .* or --zero-shot instead",
        ),
        (
            ("evaluate", "x.safetensors", "--test", "{images}", "--zero-shot", "--arch", "resnet10"),
            "leave out --arch and --image-size",
        ),
        (
            ("evaluate", "x.safetensors", "--test", "{images}", "--zero-shot"),
            "with x.words.safetensors beside it",
        ),
        (
            ("repair", "cleanclip", "y.safetensors", "{images}", *OUT),
            "expected an image tower with",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(run, images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run(*(str(each).format(images=images) for each in arguments))
    assert done.exit_code in (2, 3)
    assert re.search(message, " ".join(done.stderr.split())), done.stderr


def test_captions_of_other_images_are_refused(run, images, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"schema": 1, "captions": {"a.png": "a cat"}}))
    done = run(
        "pretrain",
        "clip",
        images,
        "--captions",
        tmp_path / "captions.json",
        "--out",
        tmp_path / "x.safetensors",
    )
    assert done.exit_code != 0 and "has no caption for 64 of 64 images" in " ".join(done.stderr.split())
