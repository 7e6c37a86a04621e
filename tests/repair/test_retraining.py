"""Training again with the victim's own recipe, on tiny images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from unpoison.data.load import fingerprint_of, load_images
from unpoison.data.sources import open_source
from unpoison.encoders.checkpoints import load_encoder, save_encoder
from unpoison.errors import CheckpointError, ConfigError
from unpoison.pretrain.loop import PretrainConfig, pretrain
from unpoison.records import Geometry
from unpoison.repair.retraining import VictimRecipe, read_recipe, retrain, training_state

CONFIG = PretrainConfig(method="simclr", epochs=2, width=4, batch_size=4, learning_rate=0.1)
ON = {"device": "cpu", "precision": "fp32", "workers": 1}


@pytest.fixture
def victim(image_folder: Path, tmp_path: Path) -> Path:
    """An encoder that was trained on all six images, with seed 3."""
    images = load_images(open_source(image_folder), Geometry(16, 16), workers=1)
    path = tmp_path / "victim.safetensors"
    save_encoder(pretrain(images, CONFIG, seed=3, device="cpu", precision="fp32"), path)
    return path


@pytest.fixture
def scanned(image_folder: Path, tmp_path: Path) -> Path:
    """A run folder that flagged dog/1.png."""
    import pandas as pd

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


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def test_the_recipe_is_the_victims(victim: Path) -> None:
    recipe = read_recipe(victim)
    assert recipe.config == read_recipe(victim).config and recipe.config.method == "simclr"
    assert (recipe.config.epochs, recipe.config.width, recipe.config.learning_rate) == (2, 4, 0.1)
    assert (recipe.image_size, recipe.seed, recipe.of) == (16, 3, "victim.safetensors")
    assert recipe.weights == load_encoder(victim).fingerprint
    assert recipe.fingerprint == metadata(victim)["fingerprint"]


def test_only_the_images_differ_from_the_victims_training(
    victim: Path, scanned: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "clean.safetensors"
    done = retrain(read_recipe(victim), image_folder, out, run=scanned, **ON)
    assert (done.kept, done.left_out, done.skipped, done.same_images) == (5, ("dog/1.png",), 0, True)
    said = metadata(out)
    assert said["retrained"] == {
        "from": "victim.safetensors",
        "weights": load_encoder(victim).fingerprint,
        "fingerprint": metadata(victim)["fingerprint"],
        "verdict": "poisoned",
        "n_kept": 5,
        "left_out": ["dog/1.png"],
    }
    assert {**said, **dict.fromkeys(("fingerprint", "losses", "preprocessing"))} == {
        **metadata(victim),
        **dict.fromkeys(("fingerprint", "losses", "preprocessing")),
        "retrained": said["retrained"],
    }
    # The same as pre-training on those images; from a list of ids, or from a cleaned copy, likewise.
    kept = load_images(open_source(image_folder).select(_kept(scanned)), Geometry(16, 16))
    again = pretrain(kept, read_recipe(victim).config, seed=3, device="cpu", precision="fp32")
    save_encoder(again, tmp_path / "again.safetensors", retrained=said["retrained"])
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    by_list = retrain(
        read_recipe(victim), image_folder, tmp_path / "list.safetensors", only=_kept(scanned), **ON
    )
    assert by_list.left_out == ("dog/1.png",) and by_list.same_images is None
    (image_folder / "dog/1.png").unlink()
    copied = retrain(read_recipe(victim), image_folder, tmp_path / "copy.safetensors", **ON)
    assert copied.left_out == () and copied.trained.losses == by_list.trained.losses == again.losses


def _kept(run: Path) -> tuple[str, ...]:
    return tuple((run / "clean.txt").read_text().split())


def test_a_killed_training_goes_on(victim: Path, scanned: Path, image_folder: Path, tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole.safetensors", tmp_path / "halved.safetensors"
    retrain(read_recipe(victim), image_folder, whole, run=scanned, **ON)

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("pretrain") and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrain(read_recipe(victim), image_folder, halved, run=scanned, progress=stop, **ON)
    assert training_state(halved).exists() and not halved.exists()
    retrain(read_recipe(victim), image_folder, halved, run=scanned, **ON)
    assert halved.read_bytes() == whole.read_bytes() and not training_state(halved).exists()


def test_what_would_be_the_victim_again_is_refused(
    victim: Path, scanned: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "clean.safetensors"
    with pytest.raises(ConfigError, match=r"was trained on exactly these 6 images: say what to leave out"):
        retrain(read_recipe(victim), image_folder, out, **ON)
    ids = open_source(image_folder).ids
    (scanned / "clean.txt").write_text("".join(f"{id}\n" for id in ids))
    with pytest.raises(
        ConfigError, match=r"flagged nothing \(verdict poisoned\), so there is nothing to leave"
    ):
        retrain(read_recipe(victim), image_folder, out, run=scanned, **ON)
    assert not out.exists()


def test_i_cutmix_alone_is_a_change(victim: Path, scanned: Path, image_folder: Path, tmp_path: Path) -> None:
    recipe, out = read_recipe(victim), tmp_path / "mixed.safetensors"
    done = retrain(recipe, image_folder, out, i_cutmix=True, **ON)
    assert done.left_out == () and done.kept == 6
    assert read_recipe(out).config == dataclasses.replace(recipe.config, i_cutmix=True)
    assert metadata(out)["config"]["i_cutmix"] is True and metadata(victim)["config"]["i_cutmix"] is False
    assert done.trained.fingerprint == recipe.fingerprint
    both = retrain(recipe, image_folder, tmp_path / "both.safetensors", run=scanned, i_cutmix=True, **ON)
    assert both.left_out == ("dog/1.png",) and both.trained.config.i_cutmix
    with pytest.raises(ConfigError, match="was trained on exactly these 6 images"):
        retrain(read_recipe(out), image_folder, tmp_path / "again.safetensors", i_cutmix=True, **ON)
    rotation = dataclasses.replace(recipe, config=dataclasses.replace(CONFIG, method="rotation"))
    with pytest.raises(ConfigError, match="i_cutmix: rotation cannot mix images"):
        retrain(rotation, image_folder, tmp_path / "rotation.safetensors", i_cutmix=True, **ON)


def test_a_victim_of_other_images_is_told_apart(
    victim: Path, scanned: Path, image_folder: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(read_recipe(victim), fingerprint="another")
    out = tmp_path / "clean.safetensors"
    assert retrain(recipe, image_folder, out, run=scanned, **ON).same_images is False


def test_an_encoder_that_does_not_say_how_it_was_trained(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.save({"w": torch.zeros(1)}, tmp_path / "moco.pth")
    save_file({"w": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for name in ("moco.pth", "plain.safetensors"):
        with pytest.raises(
            ConfigError, match=rf"{name} does not say how it was trained.*: give --method, --arch"
        ):
            read_recipe(tmp_path / name)
    with pytest.raises(ConfigError, match=r"no such file; expected the weights file of an encoder"):
        read_recipe(tmp_path / "missing.pth")


def test_a_file_that_cannot_be_trusted(victim: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "bad.safetensors").write_text("x")
    with pytest.raises(CheckpointError, match=r"bad.safetensors: not a readable .safetensors file"):
        read_recipe(tmp_path / "bad.safetensors")
    said = metadata(victim)
    for change, message in (
        (
            {"config": said["config"] | {"warp": 1}},
            "trained with the setting 'warp', which this version does not",
        ),
        ({"config": said["config"] | {"epochs": 0}}, r"metadata's config.*epochs=0"),
        ({"config": "all of it"}, "metadata's config"),
        ({"seed": "x"}, "metadata's seed"),
    ):
        changed = {key: json.dumps(value) for key, value in (said | change).items()}
        save_file(load_file(victim), tmp_path / "odd.safetensors", changed)
        with pytest.raises(CheckpointError, match=message):
            read_recipe(tmp_path / "odd.safetensors")


def test_a_recipe_of_ones_own(scanned: Path, image_folder: Path, tmp_path: Path) -> None:
    recipe = VictimRecipe(config=CONFIG, image_size=16, seed=0, of="moco.pth")
    done = retrain(recipe, image_folder, tmp_path / "clean.safetensors", run=scanned, **ON)
    assert done.same_images is None and done.kept == 5
