"""Encoders from files and names: every known layout, and everything that must be refused."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from unpoison.data.views import ViewConfig
from unpoison.encoders import checkpoints
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.checkpoints import ENCODER_SCHEMA, as_encoder, load_encoder, save_encoder
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import CheckpointError, ConfigError
from unpoison.pretrain.loop import PretrainConfig, TrainedEncoder, pretrain
from unpoison.records import Geometry, ImageSet
from unpoison.runtime import seeded

State = dict[str, Any]


def backbone(name: str = "resnet10", size: int = 32, seed: int = 1) -> nn.Module:
    with seeded(seed, "test"):
        architecture = Architecture(name=name, image_size=size, width=8, stem_stride=1 if size < 96 else None)
        network = build_backbone(architecture)
        for parameter in network.parameters():  # fresh norm layers are all ones, which would hide a mix-up
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


def load(path: Path | str, **options: Any) -> Encoder:
    return load_encoder(path, device="cpu", precision="fp32", **options)


def tiny(path: Path | str, **options: Any) -> Encoder:
    return load(path, **({"arch": "resnet10", "width": 8} | options))


@pytest.mark.parametrize("stages", ["layer1 layer2 layer3 layer4", "4 5 6 7", "3 4 5 6"])
def test_the_width_of_a_resnet_is_read_off_its_weights(stages: str, tmp_path: Path) -> None:
    network = backbone()
    names = dict(zip(("layer1", "layer2", "layer3", "layer4"), stages.split(), strict=True))
    stem = {} if "layer1" in names.values() else {"conv1": "0", "bn1": "1"}
    renamed = {}
    for name, tensor in network.state_dict().items():
        first, _, rest = name.partition(".")
        renamed[f"module.encoder.{(names | stem).get(first, first)}.{rest}"] = tensor
    torch.save(renamed, tmp_path / "narrow.pth")
    assert same_weights(load(tmp_path / "narrow.pth", arch="resnet10"), network)


def pixels(size: int = 32, n: int = 2) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def head(prefix: str) -> State:
    return {f"{prefix}.0.weight": torch.ones(4, 64), f"{prefix}.0.bias": torch.ones(4)}


def same_weights(encoder: Encoder, network: nn.Module) -> bool:
    assert isinstance(encoder.network, nn.Module)
    loaded, original = encoder.network.state_dict(), network.state_dict()
    return loaded.keys() == original.keys() and all(torch.equal(loaded[k], original[k]) for k in loaded)


# --- Our own files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def trained() -> TrainedEncoder:
    architecture = Architecture(name="resnet10", image_size=16, width=8, stem_stride=2)
    with seeded(0, "trained"):
        network = build_backbone(architecture)
    preprocessing = Preprocessing(geometry=Geometry(16, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    encoder = Encoder(network, preprocessing, device="cpu", precision="fp32")
    config = PretrainConfig(width=8, stem_stride=2, views=ViewConfig(crop=0.5))
    return TrainedEncoder(encoder, architecture, (2.0, 1.5), config, 7, "images")


def test_an_encoder_comes_back_as_it_was(trained: TrainedEncoder, tmp_path: Path) -> None:
    path = tmp_path / "new" / "encoder.safetensors"
    save_encoder(trained, path)
    loaded = load(path)
    assert torch.equal(loaded.features(pixels(16)), trained.encoder.features(pixels(16)))
    assert loaded.preprocessing == trained.encoder.preprocessing
    assert loaded.name == "encoder.safetensors (moco-v2 resnet10)"
    assert len(loaded.fingerprint) == 64
    assert [p.name for p in path.parent.iterdir()] == ["encoder.safetensors"]


@pytest.mark.parametrize(("method", "arch"), [("moco-v3", "vit_tiny"), ("byol", "resnet18")])
def test_a_trained_encoder_of_any_kind_comes_back(method: str, arch: str, tmp_path: Path) -> None:
    images = ImageSet(tuple("abcdefgh"), pixels(16, n=8), fingerprint="images")
    config = PretrainConfig(method=method, arch=arch, width=4, epochs=1, batch_size=8)
    trained = pretrain(images, config, seed=0, device="cpu", precision="fp32")
    path = tmp_path / "encoder.safetensors"
    save_encoder(trained, path)
    loaded = load(path)
    assert isinstance(trained.encoder.network, nn.Module) and same_weights(loaded, trained.encoder.network)
    assert torch.equal(loaded.features(pixels(16)), trained.encoder.features(pixels(16)))
    assert loaded.name == f"encoder.safetensors ({method} {arch})"
    other = {"vit_tiny": "resnet10", "resnet18": "vit_tiny"}[arch]
    lying = rewritten(path, architecture=json.dumps({**ARCHITECTURE, "name": other, "width": 4}))
    with pytest.raises(CheckpointError, match=f"of the .* weights of {other} are missing"):
        load(lying)


def test_a_saved_encoder_says_how_it_was_made(trained: TrainedEncoder, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(trained, path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata["schema"] == ENCODER_SCHEMA
    assert metadata["architecture"] == {
        "name": "resnet10",
        "image_size": 16,
        "width": 8,
        "stem_stride": 2,
    }
    assert metadata["preprocessing"]["geometry"] == {"size": 16, "resize": 16, "interpolation": "bilinear"}
    assert metadata["preprocessing"]["std"] == [0.4, 0.5, 0.6]
    assert (metadata["method"], metadata["seed"], metadata["fingerprint"]) == ("moco-v2", 7, "images")
    assert metadata["losses"] == [2.0, 1.5] and metadata["config"]["views"]["crop"] == 0.5
    assert set(metadata["versions"]) == {"python", "torch", "timm"}


def test_the_same_encoder_gives_the_same_bytes(trained: TrainedEncoder, tmp_path: Path) -> None:
    for name in "ab":
        save_encoder(trained, tmp_path / f"{name}.safetensors")
    first, second = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert first == second
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_a_failed_write_keeps_the_earlier_file_and_leaves_nothing(
    trained: TrainedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(b"earlier")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="the encoder cannot be written .No space left on device."):
        save_encoder(trained, path)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_another_suffix_is_refused(trained: TrainedEncoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an encoder is written as .safetensors; end the name so"):
        save_encoder(trained, tmp_path / "encoder.pth")


def rewritten(path: Path, **changes: str | None) -> Path:
    """The same file with other metadata; None removes a key."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    metadata = {k: v for k, v in (metadata | changes).items() if v is not None}
    other = path.with_name("other.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(path), other, metadata)
    return other


ARCHITECTURE = {"name": "resnet10", "image_size": 16, "width": 8, "stem_stride": 2}
PREPROCESSING: State = {
    "geometry": {"size": 16, "resize": 16},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schema": '"unpoison/encoder/9"'},
            "schema 'unpoison/encoder/9', this version reads 'unpoison/encoder/1'",
        ),
        ({"schema": "unpoison/"}, "metadata's 'schema' is not JSON"),
        ({"architecture": None}, "metadata has no 'architecture'"),
        ({"architecture": "{"}, "metadata's 'architecture' is not JSON"),
        ({"architecture": "[" * 100_000}, "metadata's 'architecture' is not JSON"),
        ({"architecture": "[]"}, "metadata's architecture: "),
        ({"architecture": json.dumps(ARCHITECTURE | {"image_size": 10**9})}, "expected 8 to 1024 pixels"),
        ({"architecture": json.dumps(ARCHITECTURE | {"width": 10**9})}, "expected 4 to 512 channels"),
        (
            {"architecture": json.dumps(ARCHITECTURE | {"width": "wide"})},
            "architecture.width: Input should be a valid int",
        ),
        (
            {"preprocessing": json.dumps(PREPROCESSING | {"std": [1, 1]})},
            "preprocessing.std.2: Field required",
        ),
        (
            {"preprocessing": json.dumps(PREPROCESSING | {"std": [1, 1, 0]})},
            "expected three positive numbers",
        ),
        (
            {"preprocessing": json.dumps(PREPROCESSING | {"mean": [0, 0, float("nan")]})},
            "its description contradicts itself",
        ),
        (
            {"preprocessing": json.dumps(PREPROCESSING | {"geometry": {"size": 32, "resize": 32}})},
            "contradicts itself",
        ),
        (
            {"preprocessing": json.dumps(PREPROCESSING | {"geometry": {"size": 16, "resize": 99}})},
            "contradicts itself",
        ),
        ({"method": "[1]"}, "contradicts itself"),
    ],
)
def test_a_malformed_description_is_refused_in_one_line(
    trained: TrainedEncoder, tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    save_encoder(trained, tmp_path / "encoder.safetensors")
    path = rewritten(tmp_path / "encoder.safetensors", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value) and "other.safetensors" in str(caught.value)


def test_a_file_that_lies_about_its_size_costs_no_memory(
    trained: TrainedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder(trained, tmp_path / "encoder.safetensors")
    path = rewritten(
        tmp_path / "encoder.safetensors",
        architecture=json.dumps(ARCHITECTURE | {"name": "resnet50", "width": 512}),
    )
    devices: list[str] = []
    build = build_backbone

    def watched(architecture: Architecture) -> nn.Module:
        network = build(architecture)
        devices.append(next(network.parameters()).device.type)
        return network

    monkeypatch.setattr(checkpoints, "build_backbone", watched)
    with pytest.raises(CheckpointError, match="weights of resnet50 are missing"):
        load(path)
    assert devices == ["meta"]


def test_options_that_contradict_the_file_are_refused(trained: TrainedEncoder, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(trained, path)
    assert load(path, arch="resnet10", image_size=16, mean=(0.1, 0.2, 0.3)).fingerprint
    for options, message in (
        ({"arch": "resnet18"}, "arch='resnet18', but the file says 'resnet10'; leave the option out"),
        ({"image_size": 32}, "image_size=32, but the file says 16"),
        ({"std": (1.0, 1.0, 1.0)}, r"std=\(1.0, 1.0, 1.0\), but the file says \(0.4"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(path, **options)


# --- Other people's files --------------------------------------------------------------------------------------------

NUMBERS_WITH_POOL = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
NUMBERS_WITHOUT_POOL = {"conv1": "0", "bn1": "1", "layer1": "3", "layer2": "4", "layer3": "5", "layer4": "6"}


def numbered(state: State, numbers: dict[str, str]) -> State:
    return {f"{numbers[name.partition('.')[0]]}.{name.partition('.')[2]}": t for name, t in state.items()}


LAYOUTS: dict[str, Callable[[State, State], Any]] = {
    "plain": lambda state, _: state | {"fc.weight": torch.ones(10, 64), "fc.bias": torch.ones(10)},
    "moco v2": lambda state, other: {
        "epoch": 200,
        "state_dict": prefixed(other, "module.encoder_k.")
        | prefixed(state, "module.encoder_q.")
        | prefixed(head("fc"), "module.encoder_q.")
        | {"module.queue": torch.ones(128, 16)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.03}]},
    },
    "moco v3": lambda state, other: {
        "state_dict": prefixed(other, "module.momentum_encoder.")
        | prefixed(state, "module.base_encoder.")
        | prefixed(head("head"), "module.base_encoder.")
        | prefixed(head("predictor"), "module.")
    },
    "moco v3, momentum encoder only": lambda state, _: {
        "state_dict": prefixed(state, "module.momentum_encoder.")
    },
    "ssl-backdoor": lambda state, other: {
        "model": prefixed(state, "module.encoder_q.") | prefixed(other, "module.encoder_t.")
    },
    "simclr f": lambda state, _: prefixed(state, "f.") | prefixed(head("g"), ""),
    "simclr backbone": lambda state, _: {"state_dict": prefixed(state | head("fc"), "backbone.")},
    "simclr encoder": lambda state, _: prefixed(state, "encoder.") | head("projector"),
    "simclr net": lambda state, _: prefixed(state, "net."),
    "badencoder": lambda state, _: {
        "state_dict": prefixed(numbered(state, NUMBERS_WITHOUT_POOL), "f.f.") | head("g")
    },
    "lightly": lambda state, _: (
        prefixed(numbered(state, NUMBERS_WITH_POOL), "backbone.") | head("projection_head")
    ),
    "byol": lambda state, other: (
        prefixed(other, "target_encoder.net.")
        | prefixed(state, "online_encoder.net.")
        | prefixed(head("projector"), "online_encoder.")
    ),
    "byol, target only": lambda state, _: prefixed(state, "target_encoder."),
    "dino": lambda state, other: {
        "args": argparse.Namespace(arch="resnet10", lr=0.1),
        "student": prefixed(other, "module.backbone.") | prefixed(head("head"), "module."),
        "teacher": prefixed(state, "backbone.") | prefixed(head("head"), ""),
    },
    "dino, flat": lambda state, other: (
        prefixed(other, "student.module.backbone.") | prefixed(state, "teacher.module.backbone.")
    ),
    "compiled": lambda state, _: {"model_state_dict": prefixed(state, "_orig_mod.")},
    "barlow twins": lambda state, other: {"backbone": state, "head": {"weight": torch.ones(2)}},
    "vissl": lambda state, _: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": prefixed(state, "_feature_blocks."), "heads": {}}}
        }
    },
    "any words": lambda state, other: (
        {"weights": prefixed(state, "my.own.network.") | prefixed(other, "twin.")} | {"step": 3}
    ),
    "cifar's resnets": lambda state, _: {
        "net": {name.replace("downsample", "shortcut"): tensor for name, tensor in state.items()}
        | head("linear")
    },
    "numbers and paths of other libraries": lambda state, _: {
        "state_dict": prefixed(state, "module.encoder_q."),
        "best": np.float64(71.3),
        "history": np.arange(3),
        "folder": Path("somewhere"),
        "seen": collections.defaultdict(list, {"images": [1]}),
    },
    "options of its own class": lambda state, _: {
        "state_dict": prefixed(state, "backbone."),
        "hyper_parameters": Options(lr=0.1),
    },
}


class Options(dict[str, float]):
    """What a training script may store beside its weights: items, and attributes."""

    def __init__(self, **values: float) -> None:
        super().__init__(values)
        self.frozen = True


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_known_layout_round_trips(layout: str, tmp_path: Path) -> None:
    network, other = backbone(), backbone(seed=2)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(LAYOUTS[layout](dict(network.state_dict()), dict(other.state_dict())), path)
    loaded = tiny(path)
    assert same_weights(loaded, network)
    assert loaded.name.startswith("checkpoint.pth.tar (resnet10, ")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".PTH"])
def test_every_suffix_round_trips(suffix: str, tmp_path: Path) -> None:
    network = backbone()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    assert same_weights(tiny(path), network)


def test_the_format_of_old_torch_versions_round_trips(tmp_path: Path) -> None:
    network, path = backbone(), tmp_path / "old.pth"
    torch.save({"state_dict": network.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert same_weights(tiny(path), network)


def test_a_module_with_its_head_on_is_said(caplog: pytest.LogCaptureFixture) -> None:
    preprocessing = Preprocessing(geometry=Geometry(32, 32))
    network = backbone()
    as_encoder(network, preprocessing, device="cpu")
    assert caplog.text == ""
    network.fc = nn.Linear(64, 10)
    as_encoder(network, preprocessing, device="cpu")
    assert "ResNet ends in fc: if that is a classifier's head, put nn.Identity() in its place" in caplog.text


def test_the_head_is_left_out_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS["plain"](dict(backbone().state_dict()), {}), path)
    with caplog.at_level("INFO", logger="unpoison"):
        encoder = tiny(path)
    assert "its head is left out: fc.bias, fc.weight" in encoder.name
    assert "image_size, mean, std not given, assumed 32 px" in caplog.text


def test_torchvision_resnets_fit_by_name(tmp_path: Path) -> None:
    with seeded(0, "torchvision"):
        network = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), path)
    loaded = load(path, arch="resnet18")
    assert loaded.preprocessing.geometry == Geometry(224, 256) and loaded.preprocessing.assumed
    network.fc = nn.Identity()
    with torch.inference_mode():
        expected = network(loaded.normalise(pixels(224)))
    torch.testing.assert_close(loaded.features(pixels(224)), expected, atol=1e-3, rtol=1e-3)
    again = load(f"torchvision:resnet18@{path}")
    torch.testing.assert_close(again.features(pixels(224)), expected, atol=1e-3, rtol=1e-3)
    assert again.preprocessing.assumed and again.fingerprint == loaded.fingerprint


def test_vision_transformers_fit_by_name(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    network = backbone(name)
    path = tmp_path / "vit.pth"
    torch.save({"state_dict": prefixed(dict(network.state_dict()), "module.base_encoder.")}, path)
    assert same_weights(load(path, arch=name, image_size=32), network)
    with pytest.raises(
        CheckpointError, match="pos_embed is .*: the file was trained on another number of patches"
    ):
        load(path, arch=name)


def test_preprocessing_is_assumed_unless_all_of_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(backbone().state_dict(), path)
    guessed = tiny(path).preprocessing
    assert guessed == Preprocessing(geometry=Geometry(32, 32), assumed=True)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    given = tiny(path, image_size=64, mean=mean, std=std).preprocessing
    assert given == Preprocessing(geometry=Geometry(64, 64), mean=mean, std=std)
    assert tiny(path, image_size=64, mean=mean).preprocessing.assumed
    with pytest.raises(ConfigError, match="mean=.*: expected three numbers"):
        tiny(path, mean=(0.5, 0.5))
    with pytest.raises(ConfigError, match="std=.*nan.*: expected three numbers"):
        tiny(path, std=(float("nan"), 0.5, 0.5))


def test_a_file_that_does_not_say_its_architecture_needs_one(tmp_path: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        path = tmp_path / name
        if path.suffix == ".pth":
            torch.save(backbone().state_dict(), path)
        else:
            safetensors.torch.save_file(backbone().state_dict(), path, {"format": "pt"})
        with pytest.raises(
            ConfigError, match="does not say which network its weights belong to; give --arch"
        ):
            load(path)


def test_weights_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refuse(state: State, message: str, **options: Any) -> None:
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            tiny(path, **options)
        assert "\n" not in str(caught.value)

    state = dict(backbone().state_dict())
    partial = {name: tensor for name, tensor in state.items() if not name.startswith("layer4.")}
    refuse(
        partial,
        r"15 of the 60 weights of resnet10 are missing \(layer4.0.conv1.weight, layer4.0.bn1.weight, "
        r"layer4.0.bn1.bias, …\); found 45 among 54 tensors \(conv1.weight, .*\): is --arch right",
    )
    refuse({"unrelated": torch.ones(1)}, "60 of the 60 weights of resnet10 are missing")
    refuse(
        dict(backbone("resnet18").state_dict()),
        "40 weights have no place in resnet10 .layer1.1.conv1.weight, ",
    )
    refuse(
        state,
        r"conv1.weight is \(8, 3, 3, 3\), but resnet10 takes \(16, 3, 3, 3\): leave width out, or give 8",
        width=16,
    )
    refuse(
        state | {"conv1.weight": torch.ones(8, 3, 5, 5)},
        "first layer reads 5×5 pixels at once, the network's 3×3; give the --image-size .* another --arch",
        image_size=32,
    )
    refuse(state | {"bn1.weight": torch.ones(9)}, r"bn1.weight is \(9,\), .* is --arch right")
    for bad in (float("nan"), float("inf")):
        refuse(state | {"bn1.bias": torch.full((8,), bad)}, "bn1.bias holds NaN or infinite values")
    refuse(
        state | {"bn1.bias": torch.ones(8).long()}, "bn1.bias is torch.int64 .*, expected .* floating point"
    )
    refuse(
        state | {"bn1.bias": torch.ones(8).to_sparse()},
        "bn1.bias is .*sparse_coo on cpu, expected dense floating point",
    )
    refuse(state | {"bn1.bias": torch.ones(8, device="meta")}, "bn1.bias is .* on meta, expected")
    refuse(state | {"bn1.bias": torch.ones(1).expand(2**50)}, r"bn1.bias is \(1125899906842624,\)")
    refuse({"epoch": 3}, "holds no named tensors; expected a state dictionary")
    refuse([torch.ones(2)], "holds no named tensors")  # type: ignore[arg-type]


@pytest.mark.parametrize(("trained", "shown"), [(96, 32), (96, 64), (32, 128)])
def test_weights_bring_their_stem_to_any_image_size(trained: int, shown: int, tmp_path: Path) -> None:
    network, path = backbone(size=trained), tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    encoder = tiny(path, image_size=shown)
    assert same_weights(encoder, network) and encoder.preprocessing.geometry.size == shown
    with torch.inference_mode():
        expected = network(encoder.normalise(pixels(shown)))
    torch.testing.assert_close(encoder.features(pixels(shown)), expected, atol=1e-3, rtol=1e-3)
    assert ("a stride of 1 is assumed of its 3×3 stem" in encoder.name) == (trained == 32)


def test_a_7x7_stem_means_imagenet_sizes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(backbone(size=96).state_dict(), path)
    assert tiny(path).preprocessing.geometry == Geometry(224, 256)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(backbone().state_dict(), path)
    with pytest.raises(ConfigError, match="architecture 'resnet11': expected one of"):
        load(path, arch="resnet11")


# --- Traps -----------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled by an unwary loader, it creates a file."""

    def __init__(self, target: Path, function: Callable[..., object] = os.mkdir) -> None:
        self.target = target
        self.function = function

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return self.function, (str(self.target),)


def shout(_: str) -> None:
    """No list of dangerous functions knows it."""
    print("boom")


class Shouting:
    """Nor this class, whose call does something."""

    def __init__(self, _: str) -> None:
        print("boom")


def torch_file(content: object, path: Path) -> None:
    torch.save(content, path)


def old_torch_file(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [torch_file, old_torch_file, bare_pickle])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar", ".bin"])
@pytest.mark.parametrize("arch", ["resnet10", None])
def test_a_booby_trapped_file_is_refused_by_name_and_runs_nothing(
    write: Callable[[object, Path], None], suffix: str, arch: str | None, tmp_path: Path
) -> None:
    path, crater = tmp_path / f"bomb{suffix}", tmp_path / "crater"
    write({"state_dict": dict(backbone().state_dict()), "trap": Trap(crater)}, path)
    with pytest.raises(
        CheckpointError, match=r"it would run code when loaded \(imports \w+.mkdir\)"
    ) as caught:
        load(path, arch=arch, width=8)
    assert not crater.exists()
    assert "\n" not in str(caught.value) and "ask for its weights as .safetensors" in str(caught.value)
    with path.open("rb") as file:  # the trap is real
        torch.load(file, weights_only=False) if write is not bare_pickle else pickle.load(file)
    assert crater.exists()


def test_a_whole_pickled_network_is_read_without_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, path = backbone(), tmp_path / "model.pth"
    torch.save({"model": network}, path)
    monkeypatch.setattr(type(network), "__setstate__", lambda *_: pytest.fail("its class was used"))
    assert same_weights(tiny(path), network)


@pytest.mark.parametrize("function", [shout, Shouting])
def test_a_file_that_calls_what_nobody_knows_is_refused_by_name(
    function: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": dict(backbone().state_dict()), "trap": Trap(tmp_path, function)}, path)
    with pytest.raises(CheckpointError, match=f"it would call .*{function.__name__} when loaded") as caught:
        tiny(path)
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


def test_dictionaries_in_themselves_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {f"{number}": {} for number in range(8)}
    for key in content:
        content[key] = content
    deep: dict[str, Any] = {"conv1.weight": torch.ones(3)}
    for _ in range(30):
        deep = {f"{number}": deep for number in range(8)}
    torch.save({"state_dict": content | {"deep": deep}}, path := tmp_path / "loop.pth")
    with pytest.raises(CheckpointError, match="59 of the 60 weights|60 of the 60 weights"):
        tiny(path)


def test_a_torchscript_program_is_said_to_be_one(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(path := tmp_path / "scripted.pt"))
    with pytest.raises(CheckpointError, match="refused, it is a TorchScript program"):
        tiny(path)


def test_a_trap_named_safetensors_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    bare_pickle(Trap(tmp_path / "crater"), path)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        tiny(path)
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 truncated", b"\x80\x04"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_weights_file_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable (weights|safetensors) file") as caught:
        tiny(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_and_a_real_tar_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(backbone().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"not a readable weights file .*; expected \.safetensors"):
        tiny(path)
    with tarfile.open(tmp_path / "weights.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        tiny(tmp_path / "weights.tar")


def test_names_that_a_stranger_chose_cannot_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a\nb\x1b[2J" + "c" * 200: torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"\(a\?b\?\[2Jc{70,80}\)") as caught:
        tiny(path)
    assert "\n" not in str(caught.value)


def test_folders_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, expected a weights file"):
        load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ConfigError, match="expected a weights file ending in .safetensors or .pth"):
        load(tmp_path / "model.onnx")


# --- From Python -----------------------------------------------------------------------------------------------------


def test_a_module_without_preprocessing_is_shown_usual_values_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assumed = as_encoder(backbone(), device="cpu").preprocessing
    assert assumed == Preprocessing(geometry=Geometry(32, 32), assumed=True)
    assert "ResNet came without preprocessing=Preprocessing(...), assumed 32 px, mean (0.485" in caplog.text
    assert as_encoder(backbone(size=96), device="cpu").preprocessing.geometry == Geometry(224, 256)
    clip = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    clip.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "input_size": (3, 224, 224)}
    found = as_encoder(clip, device="cpu").preprocessing
    assert found.geometry == Geometry(64, 64) and found.mean == (0.5, 0.4, 0.3) and found.assumed
    with pytest.raises(ConfigError, match="preprocessing is a Normalize: expected unpoison.Preprocessing"):
        as_encoder(backbone(), torchvision.transforms.Normalize(0.5, 0.5))  # type: ignore[arg-type]


def test_a_module_keeps_its_preprocessing() -> None:
    network, preprocessing = backbone(), Preprocessing(geometry=Geometry(32, 32))
    encoder = as_encoder(network, preprocessing, device="cpu", precision="fp32")
    assert encoder.name == "ResNet" and encoder.features(pixels()).shape == (2, 64)
    assert encoder.fingerprint == as_encoder(network, preprocessing, device="cpu").fingerprint
    assert encoder.fingerprint != as_encoder(backbone(seed=5), preprocessing, device="cpu").fingerprint


def test_everything_else_brings_its_own(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(backbone().state_dict(), path)
    encoder = as_encoder(path, arch="resnet10", width=8, mean=(0.5, 0.5, 0.5), device="cpu")
    assert encoder.preprocessing.mean == (0.5, 0.5, 0.5)
    assert as_encoder(encoder) is encoder
    assert as_encoder(str(path), arch="resnet10", width=8, device="cpu").fingerprint == encoder.fingerprint
    for thing in (encoder, str(path)):
        with pytest.raises(ConfigError, match="preprocessing goes with an nn.Module; .*: leave it out"):
            as_encoder(thing, encoder.preprocessing)
