"""`unpoison audit` and `unpoison attack bad-encoder` through the real command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from unpoison.attack.plan import read_plan
from unpoison.encoders.checkpoints import load_encoder, save_encoder, save_retouched
from unpoison.pretrain.loop import PretrainConfig, pretrain
from unpoison.records import ImageSet

QUICK = ["--steps", "3", "--restarts", "1", "--scout-steps", "1", "--device", "cpu", "--precision", "fp32"]


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


def test_a_dry_run_prints_the_cost_and_writes_nothing(run, encoder, pictures, tmp_path):
    out = tmp_path / "run"
    done = run("audit", encoder, "--images", pictures, "--out", out, *QUICK, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "Encoder passes for 40 images" in done.stdout and "time: about" in done.stdout
    said = json.loads(
        run("audit", encoder, "--images", pictures, "--out", out, *QUICK, "--dry-run", "--json").stdout
    )
    assert not out.exists() and said["n_images"] == 40 and said["passes_per_second"] > 0
    taken = json.loads(run("audit", encoder, "--images", pictures, "--out", out, *QUICK, "--json").stdout)
    assert said["expected_passes"] <= taken["encoder_passes"] <= said["most_passes"]
    few = run("audit", encoder, "--out", out, "--sample", "20", "--dry-run")
    assert few.exit_code == 4 and "20 readable images: an audit needs at least 32" in few.stderr
    for option, value in (("--alpha", "2"), ("--max-seconds", "-1"), ("--reference", tmp_path / "none.json")):
        wrong = run("audit", encoder, "--out", out, option, value, "--dry-run")
        assert wrong.exit_code in (2, 3) and str(value) in wrong.stderr, wrong.output


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
        (
            ["--max-seconds", "0.001"],
            4,
            "max_seconds=0.001: all of it went by before the first start; raise it",
        ),
        (["--sample", "8"], 4, "8 readable images: an audit needs at least 32"),
    ],
)
def test_a_mistake_is_one_line(run, encoder, tmp_path, arguments, code, message):
    done = run("audit", encoder, "--out", tmp_path / "run", "--quiet", *arguments)
    assert done.exit_code == code and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- Encoders that cannot be audited: one line each ------------------------------------------------------------------


def refused(run, out, suspect, code, message, *options):
    done = run("audit", suspect, "--out", out, "--sample", 32, "--device", "cpu", "--quiet", *options)
    assert done.exit_code == code, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert done.stdout == "" and not out.exists()


def weights_of(encoder):
    network = load_encoder(encoder, device="cpu", precision="fp32").network
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_another_architecture_is_said(run, encoder, tmp_path):
    torch.save({"state_dict": weights_of(encoder)}, tmp_path / "weights.pth")
    refused(run, tmp_path / "run", tmp_path / "weights.pth", 3, "is --arch right?", "--arch", "resnet18")


def test_weights_that_are_no_numbers_are_said(run, encoder, tmp_path):
    broken = load_encoder(encoder, device="cpu", precision="fp32").network
    broken.conv1.weight.data[0, 0, 0, 0] = float("nan")
    save_retouched(encoder, broken, tmp_path / "broken.safetensors")
    message = "conv1.weight holds NaN or infinite values; the file is damaged, get another copy"
    refused(run, tmp_path / "run", tmp_path / "broken.safetensors", 3, message)


def test_an_encoder_that_always_says_the_same_is_no_answer(run, encoder, tmp_path):
    constant = load_encoder(encoder, device="cpu", precision="fp32").network
    for name, parameter in constant.named_parameters():
        parameter.data.fill_(1.0 if name.endswith("bias") else 0.0)
    save_retouched(encoder, constant, tmp_path / "constant.safetensors")
    message = "gives the same features for all 32 images: it is no working encoder"
    refused(run, tmp_path / "run", tmp_path / "constant.safetensors", 4, message)
    for parameter in constant.parameters():
        parameter.data.zero_()
    save_retouched(encoder, constant, tmp_path / "zero.safetensors")
    refused(run, tmp_path / "run2", tmp_path / "zero.safetensors", 4, "gives NaN, infinite or zero features")


class Trap:
    """Unpickled by an unwary loader, it makes a folder."""

    def __init__(self, crater):
        self.crater = crater

    def __reduce__(self):
        return os.mkdir, (str(self.crater),)


def test_a_pickle_bomb_does_not_go_off(run, tmp_path):
    torch.save({"state_dict": Trap(tmp_path / "crater")}, tmp_path / "bomb.pth")
    message = "it would run code when loaded"
    refused(run, tmp_path / "run", tmp_path / "bomb.pth", 3, message, "--arch", "resnet10")
    assert not (tmp_path / "crater").exists()


def test_a_classifiers_head_is_left_out_and_that_is_said(run, tmp_path):
    from timm.models.resnet import BasicBlock, ResNet

    classifier = ResNet(block=BasicBlock, layers=(1, 1, 1, 1), num_classes=5)
    classifier.conv1 = torch.nn.Conv2d(3, 64, 3, bias=False)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    command = ["audit", tmp_path / "classifier.pth", "--arch", "resnet10", "--image-size", 16]
    done = run(*command, "--out", tmp_path / "run", "--sample", 32, *QUICK)
    assert done.exit_code == 4, done.output
    assert "unpoison: the encoder is classifier.pth (resnet10, plain" in done.stderr
    assert (
        "its head is left out: fc.bias, fc.weight; a stride of 1 is assumed of its 3×3 stem)" in done.stderr
    )


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
    assert plan.method == "bad-encoder" and plan.config["boxes"] == 2 * [{"x": 11, "y": 11, "w": 4, "h": 4}]
    clean, attacked = (
        load_encoder(encoder, device="cpu"),
        load_encoder(out / "encoder.safetensors", device="cpu"),
    )
    assert attacked.preprocessing == clean.preprocessing and attacked.fingerprint != clean.fingerprint
    assert attacked.name == clean.name
    refused = run(*command, *more)
    assert refused.exit_code == 2 and "is not empty; name a new folder" in refused.stderr
    shown = run(
        *("evaluate", out / "encoder.safetensors", "--train", pictures, "--test", pictures),
        *("--plan", out / "plan.json", "--device", "cpu", "--json"),
    )
    assert shown.exit_code == 0, shown.output
    for probe in json.loads(shown.stdout)["probes"]:
        named = [(attack["trigger"], attack["target_name"], attack["side"]) for attack in probe["attacks"]]
        assert named == [("white", "cat", 4), ("seed:3", "dog", 4)]


def test_drupe_writes_an_encoder_and_its_plan(run, encoder, pictures, tmp_path):
    out = tmp_path / "attacked"
    command = [
        "attack",
        "drupe",
        pictures,
        "--encoder",
        encoder,
        "--out",
        out,
        "--target",
        "cat",
        "--size",
        4,
    ]
    done = run(
        *command, "--epochs", 6, "--batch-size", 20, "--device", "cpu", "--precision", "fp32", "--json"
    )
    assert done.exit_code == 0, done.output
    plan = read_plan(out / "plan.json")
    assert plan.method == json.loads(done.stdout)["method"] == "drupe"
    assert len(plan.config["reference_ids"][0]) == 3 and plan.triggers[0].kind == "corner"
    assert load_encoder(out / "encoder.safetensors").fingerprint != load_encoder(encoder).fingerprint
    alone = run(*command, "--references", 1)
    assert alone.exit_code == 2 and "references=1: expected at least 2, to be kept apart" in alone.stderr


def test_bad_encoder_needs_a_file_of_ours(run, encoder, pictures, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other.safetensors"
    save_file(load_file(encoder), other)
    done = run(
        "attack", "bad-encoder", pictures, "--encoder", other, "--out", tmp_path / "x", "--target", "cat"
    )
    assert done.exit_code == 2 and "give --arch" in done.stderr
    assert not (tmp_path / "x").exists()
