import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from unpoison.data.load import fingerprint_of
from unpoison.data.sources import open_source
from unpoison.encoders.checkpoints import load_encoder

TINY = ("--epochs", 1, "--batch-size", 4, "--width", 4, "--image-size", 16)


@pytest.fixture
def victim(run, image_folder, tmp_path) -> Path:
    path = tmp_path / "victim.safetensors"
    assert run("pretrain", "simclr", image_folder, "--out", path, *TINY, "--seed", 3).exit_code == 0
    return path


@pytest.fixture
def scanned(image_folder, tmp_path) -> Path:
    """A run folder that flagged dog/1.png."""
    source, folder = open_source(image_folder), tmp_path / "run"
    folder.mkdir()
    verdict = {"verdict": "poisoned", "images_fingerprint": fingerprint_of(source)}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    (folder / "run.json").write_text(json.dumps({"images": {"signature": source.signature()}}))
    findings = pd.DataFrame({"id": source.ids, "skip_reason": None})
    findings["flagged"] = findings["id"] == "dog/1.png"
    findings.to_parquet(folder / "findings.parquet")
    (folder / "clean.txt").write_text("".join(f"{id}\n" for id in source.ids if id != "dog/1.png"))
    return folder


def test_an_encoder_is_trained_again_by_its_own_recipe(run, victim, scanned, image_folder, tmp_path):
    out = tmp_path / "clean.safetensors"
    done = run("repair", "retrain", victim, image_folder, "--run", scanned, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["method"], said["epochs"], said["seed"], said["image_size"]) == ("simclr", 1, 3, 16)
    assert (said["n_images"], said["n_left_out"], said["same_images"]) == (5, 1, True)
    done = run("repair", "retrain", victim, image_folder, "--run", scanned, "--out", out)
    assert done.exit_code == 2 and "exists and is not overwritten" in done.stderr
    done = run(
        "repair", "retrain", victim, image_folder, "--run", scanned, "--out", out, "--fresh", "--seed", 4
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("simclr resnet10 again, seed 4, on 5 images of 16 px, 1 left out: loss ")
    assert lines[2] == (
        f"before: unpoison evaluate {victim} --train LABELLED --test LABELLED --plan plan.json"
    )


def test_i_cutmix_alone_leaves_nothing_out(run, victim, image_folder, tmp_path):
    out = tmp_path / "mixed.safetensors"
    done = run("repair", "retrain", victim, image_folder, "--out", out, "--i-cutmix", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["i_cutmix"], said["n_images"], said["n_left_out"]) == (True, 6, 0)
    done = run("repair", "retrain", victim, image_folder, "--out", out, "--i-cutmix", "--fresh")
    assert done.stdout.startswith("simclr resnet10 again, i-CutMix, seed 3, on 6 images of 16 px")


def test_a_student_is_distilled_and_names_its_teacher(run, victim, image_folder, tmp_path):
    out = tmp_path / "student.safetensors"
    command = ("repair", "distill", victim, image_folder, "--out", out, "--epochs", 2, "--batch-size", 2)
    done = run(*command, "--share", 0.5, "--json")
    assert done.exit_code == 0, done.output
    said, teacher = json.loads(done.stdout), load_encoder(victim, device="cpu")
    assert (said["n_images"], said["share"], said["queues"], said["arch"]) == (3, 0.5, 2, "resnet10")
    assert said["distilled_from"] == str(victim) and said["teacher_fingerprint"] == teacher.fingerprint
    with safe_open(out, "pt") as file:
        notes = {key: json.loads(value) for key, value in file.metadata().items()}
    assert notes["distilled"] == {"teacher": teacher.name, "weights": teacher.fingerprint, "n_images": 3}
    assert (notes["method"], notes["config"]["share"], notes["config"]["width"]) == ("compress", 0.5, 4)
    before = out.read_bytes()
    done = run(*command, "--share", 0.5)
    assert done.exit_code == 2 and "exists and is not overwritten" in done.stderr
    done = run(*command, "--share", 0.5, "--fresh")
    assert done.stdout.startswith("resnet10 distilled from victim.safetensors") and out.read_bytes() == before
    # A student says how it came about, and that is no recipe for images alone.
    done = run("repair", "retrain", out, image_folder, "--out", tmp_path / "c.safetensors")
    assert done.exit_code == 2 and "does not say how it was trained" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--share", 1.5), "share=1.5: expected a share in (0, 1]"),
        (("--queues", 3), "queues=3: expected 1 or 2"),
        (("--out", "VICTIM", "--fresh"), "is the encoder to replace, which is kept"),
        (("--image-size", 32), "but the file says 16"),
    ],
)
def test_a_wrong_distillation_is_one_line(run, victim, image_folder, tmp_path, options, message):
    options = [victim if option == "VICTIM" else option for option in options]
    out = () if "--out" in options else ("--out", tmp_path / "student.safetensors")
    done = run("repair", "distill", victim, image_folder, *out, *options, "--quiet")
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (tmp_path / "student.safetensors").exists()


def test_a_file_of_others_takes_its_recipe_from_options(run, scanned, image_folder, tmp_path):
    foreign = tmp_path / "moco.pth"
    torch.save({"w": torch.zeros(1)}, foreign)
    command = (
        "repair",
        "retrain",
        foreign,
        image_folder,
        "--run",
        scanned,
        "--out",
        tmp_path / "c.safetensors",
    )
    done = run(*command, "--method", "simclr")
    assert done.exit_code == 2 and "give --method, --arch and --image-size" in done.stderr
    done = run(*command, "--method", "simclr", "--arch", "resnet10", *TINY, "--json")
    assert done.exit_code == 0, done.output
    assert (json.loads(done.stdout)["same_images"], json.loads(done.stdout)["seed"]) == (None, 0)


def test_another_scans_victim_is_pointed_out(run, scanned, image_folder, tmp_path):
    only = tmp_path / "some.txt"
    only.write_text("cat/0.png\ncat/1.png\ndog/0.png\ndog/2.png\n")
    victim = tmp_path / "victim.safetensors"
    run("pretrain", "simclr", image_folder, "--out", victim, *TINY, "--only", only)
    done = run(
        "repair", "retrain", victim, image_folder, "--run", scanned, "--out", tmp_path / "c.safetensors"
    )
    assert done.exit_code == 0 and "was trained on other images than" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--run", "RUN", "--only", "LIST"), 2, "--run and --only both say what to keep: give one of them"),
        ((), 2, "was trained on exactly these 6 images: say what to leave out"),
        (
            ("--run", "RUN", "--epochs", 3),
            2,
            "says how it was trained, and --epochs says it too: leave it out",
        ),
        (("--run", "RUN", "--image-size", 32), 2, "and --image-size says it too"),
        (("--run", "RUN", "--out", "x.pth"), 2, "expected a name that ends in .safetensors"),
        (("--run", "RUN", "--out", "VICTIM", "--fresh"), 2, "is the encoder to replace, which is kept"),
        (("--run", "NOWHERE"), 2, "holds no verdict.json: expected the folder of a finished"),
        (("--only", "NOWHERE"), 2, "cannot be read: expected a text file with one id a line"),
        (("--only", "ODD"), 3, "1 of 1 ids are not in"),
        (("--run", "RUN", "--device", "tpu"), 2, "tpu"),
        (("--run", "RUN", "--root", "RUN"), 2, "only a text list has a root"),
    ],
)
def test_wrong_use_is_one_line(run, victim, scanned, image_folder, tmp_path, options, code, message):
    (tmp_path / "odd.txt").write_text("nope.png\n")
    names = {
        "RUN": scanned,
        "LIST": scanned / "clean.txt",
        "VICTIM": victim,
        "NOWHERE": tmp_path / "nowhere",
        "ODD": tmp_path / "odd.txt",
    }
    options = [names.get(option, option) for option in options]
    out = () if "--out" in options else ("--out", tmp_path / "clean.safetensors")
    done = run("repair", "retrain", victim, image_folder, *out, *options, "--quiet")
    assert done.exit_code == code, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert not (tmp_path / "clean.safetensors").exists()


def test_a_missing_encoder_is_one_line(run, scanned, image_folder, tmp_path):
    done = run("repair", "retrain", "timm:resnet18", image_folder, "--run", scanned, "--out", "x.safetensors")
    assert done.exit_code == 2 and "'timm:resnet18': no such file; expected the weights file" in done.stderr
