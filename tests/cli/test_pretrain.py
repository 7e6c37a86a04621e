import json

import pytest
from safetensors import safe_open

from unpoison.data.load import usual_side
from unpoison.data.sources import open_source

TINY = ("--epochs", 1, "--batch-size", 4, "--width", 4, "--image-size", 16)


def test_an_encoder_is_written_and_never_overwritten(run, image_folder, tmp_path):
    out = tmp_path / "encoder.safetensors"
    done = run("pretrain", "simclr", image_folder, "--out", out, *TINY, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert (value["n_images"], value["image_size"], value["epochs"]) == (6, 16, 1) and out.is_file()
    assert [path.name for path in tmp_path.iterdir() if "state" in path.name] == []
    before = out.read_bytes()
    done = run("pretrain", "simclr", image_folder, "--out", out, *TINY)
    assert done.exit_code == 2 and "exists and is not overwritten" in done.stderr
    assert run("pretrain", "simclr", image_folder, "--out", out, *TINY, "--fresh").exit_code == 0
    assert out.read_bytes() == before


def test_i_cutmix_is_said_in_the_file(run, image_folder, tmp_path):
    out = tmp_path / "encoder.safetensors"
    done = run("pretrain", "byol", image_folder, "--out", out, *TINY, "--i-cutmix", "--json")
    assert json.loads(done.stdout)["i_cutmix"] is True, done.output
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["config"])["i_cutmix"] is True


def test_only_listed_images_are_used(run, image_folder, tmp_path):
    only = tmp_path / "clean.txt"
    only.write_text("cat/0.png\ncat/1.png\ndog/0.png\n")
    out = tmp_path / "encoder.safetensors"
    done = run("pretrain", "moco-v2", image_folder, "--out", out, *TINY, "--only", only, "--json")
    assert json.loads(done.stdout)["n_images"] == 3


@pytest.mark.parametrize(
    ("method", "arch"), [("moco-v3", "vit_tiny"), ("byol", "resnet10"), ("byol", "vit_tiny")]
)
def test_an_encoder_of_each_kind_serves_a_scan(run, picture, tmp_path, method, arch):
    images, out = tmp_path / "images", tmp_path / "encoder.safetensors"
    images.mkdir()
    for number in range(60):
        picture(number, 16, 16).save(images / f"{number:02}.png")
    own = () if method == "moco-v3" else ("--arch", arch)
    options = ("--epochs", 1, "--batch-size", 20, "--width", 4, "--image-size", 16, *own)
    done = run("pretrain", method, images, "--out", out, *options, "--json")
    assert json.loads(done.stdout)["arch"] == arch, done.output
    for attention in ("mask", "gradcam"):
        options = ("--attention", attention, "--clusters", 4, "--precision", "fp32", "--json")
        done = run("scan", images, "--encoder", out, "--out", tmp_path / attention, *options)
        value = json.loads(done.stdout)
        assert value["n_scored"] > 0 and value["config"]["attention"] == attention, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("dino",),
            "method 'dino': expected moco-v2 or simclr or moco-v3 or byol or simsiam or msf or rotation or clip",
        ),
        (("moco-v3", "--image-size", "18"), "image_size=18: vit_tiny cuts it into patches of 4 pixels"),
        (("simclr", "--epochs", "0"), "epochs=0: expected at least 1"),
        (("simsiam", "--i-cutmix"), "i_cutmix: simsiam cannot mix images, expected one of moco-v2"),
        (("simclr", "--out", "encoder.pth"), "expected a name that ends in .safetensors"),
    ],
)
def test_bad_settings_are_2(run, image_folder, tmp_path, arguments, message):
    method, *more = arguments
    out = () if "--out" in more else ("--out", tmp_path / "encoder.safetensors")
    done = run("pretrain", method, image_folder, *out, *more)
    assert done.exit_code == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("size", "side"), [((24, 16), 32), ((70, 60), 64), ((300, 500), 224), ((90, 200), 96)]
)
def test_the_input_side_fits_the_images(picture, tmp_path, size, side):
    for row in range(3):
        picture(row, *size).save(tmp_path / f"{row}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert usual_side(open_source(tmp_path)) == side
