"""Encoders from names; local weights are in each library's own format."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from unpoison.audit.decree import DecreeConfig
from unpoison.audit_pipeline import audit
from unpoison.encoders import hub
from unpoison.encoders.checkpoints import load_encoder
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import CheckpointError, ConfigError
from unpoison.records import Geometry
from unpoison.runtime import seeded


def load(path: Path | str, **options: Any) -> Encoder:
    return load_encoder(path, device="cpu", precision="fp32", **options)


def pixels(size: int = 32, n: int = 2) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def same_weights(encoder: Encoder, network: nn.Module) -> bool:
    assert isinstance(encoder.network, nn.Module)
    loaded, original = encoder.network.state_dict(), network.state_dict()
    return loaded.keys() == original.keys() and all(torch.equal(loaded[k], original[k]) for k in loaded)


# --- timm and torchvision --------------------------------------------------------------------------------------------


def test_timm_names_bring_their_preprocessing() -> None:
    encoder = load("timm:resnet10t@random")
    assert encoder.preprocessing == Preprocessing(geometry=Geometry(176, 201, "bicubic"))
    assert encoder.name == "timm:resnet10t@random"
    small = load("timm:vit_tiny_patch16_224@random", image_size=32)
    assert small.preprocessing.geometry == Geometry(32, 35, "bicubic")
    assert small.preprocessing.mean == (0.5, 0.5, 0.5)
    assert small.features(pixels()).shape == (2, 192)
    convolutional = load("timm:resnet10t@random", image_size=32)
    assert convolutional.features(pixels()).shape == (2, 512)


def test_random_weights_are_the_same_every_time_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (load("timm:resnet10t@random", image_size=32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.features(pixels()), second.features(pixels()))
    assert first.fingerprint == second.fingerprint != ""


def test_timm_takes_local_weights(tmp_path: Path) -> None:
    with seeded(3, "timm"):
        network = timm.create_model("resnet10t", num_classes=5).eval()
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    loaded = load(f"timm:resnet10t@{path}", image_size=32)
    assert loaded.preprocessing.assumed
    network.reset_classifier(0)
    assert same_weights(loaded, network)
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    assert not load(f"timm:resnet10t@{path}", mean=mean, std=std).preprocessing.assumed


def test_torchvision_names_bring_their_preprocessing() -> None:
    encoder = load("torchvision:resnet18@random")
    assert encoder.preprocessing == Preprocessing(geometry=Geometry(224, 256))
    small = load("torchvision:resnet18@random", image_size=32)
    assert small.preprocessing.geometry == Geometry(32, 36)
    assert small.features(pixels()).shape == (2, 512)
    second = load("torchvision:mobilenet_v3_small@random", image_size=32)
    assert second.features(pixels()).shape == (2, 1024)


@pytest.mark.parametrize("reference", ["timm:resnet18", "timm:resnet18.a1_in1k", "timm:resnet18@a1_in1k"])
def test_published_timm_weights_without_a_network_fail_in_one_line(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def offline(name: str, *, pretrained: bool, **_: object) -> nn.Module:
        asked.append((name, pretrained))
        raise ConnectionError("Name or service not known\nMax retries exceeded")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        CheckpointError, match="without a network pass a local file: timm:resnet18@FILE"
    ) as caught:
        load(reference)
    assert asked == [("resnet18" if reference == "timm:resnet18" else "resnet18.a1_in1k", True)]
    assert "cannot be fetched (Name or service not known)" in str(caught.value) and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize("reference", ["torchvision:resnet18", "torchvision:resnet18@IMAGENET1K_V1"])
def test_published_torchvision_weights_without_a_network_fail_in_one_line(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def offline(self: object, *_: object, **options: object) -> None:
        asked.append(options)
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(
        CheckpointError, match="without a network pass a local file: torchvision:resnet18@FILE"
    ):
        load(reference)
    assert asked == [{"progress": False, "check_hash": True, "weights_only": True}]


def test_offline_means_no_network_for_torchvision_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: object, **__: object) -> dict[str, torch.Tensor]:
        print("Downloading")
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert load("torchvision:resnet18", image_size=32).name == "torchvision:resnet18"
    assert "Downloading" in (said := capsys.readouterr()).err and said.out == ""
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"cannot be fetched \(offline, and .*checkpoints.* does not exist"
    ):
        load("torchvision:resnet18")


def test_the_hubs_retries_are_skipped_where_its_name_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    constants = hub.huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE

    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "getaddrinfo", unknown)
    with hub._no_vain_retries():
        assert constants.HF_HUB_OFFLINE
    assert before == constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub.socket, "getaddrinfo", lambda *_: [])
    with hub._no_vain_retries():
        assert before == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "missing.pth",
            "no such file; expected a weights file, or a name with timm:, torchvision:, hf:, open_",
        ),
        (Path("missing.pth"), "no such file"),
        ("a/b:c", "no such file"),
        (
            "foo:bar",
            "unknown prefix 'foo'; expected timm:, torchvision:, hf:, open_clip:, or an existing file",
        ),
        ("timm:resnet18x", "timm knows no model 'resnet18x'; did you mean resnet18"),
        ("timm:", "timm knows no model ''; see timm.list_models"),
        ("timm:hf-hub:someone/else", "timm knows no model 'hf-hub:someone/else'"),
        ("timm:resnet18@missing.pth", "no such weights file: missing.pth"),
        ("timm:resnet18@folder/missing", "no such weights file: folder/missing"),
        ("timm:resnet18@v9", "'v9' is neither a file nor a tag of resnet18; tags: a1_in1k, "),
        ("timm:resnet18.v9", "'v9' is neither a file nor a tag of resnet18"),
        ("torchvision:resnet17", "torchvision knows no image classifier 'resnet17'; did you mean "),
        ("torchvision:zzz", "torchvision knows no image classifier 'zzz'$"),
        (
            "torchvision:resnet18@V9",
            "'V9' is neither a file nor weights of resnet18; expected IMAGENET1K_V1, DEFAULT",
        ),
        ("torchvision:squeezenet1_0@random", "its classifier is no linear layer that could be left out"),
    ],
)
def test_references_that_name_nothing_are_refused(reference: str | Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(reference)
    assert "\n" not in str(caught.value)


def test_models_without_published_weights_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = timm.list_models
    monkeypatch.setattr(
        timm, "list_models", lambda *a, **k: [] if k.get("pretrained") else everything(*a, **k)
    )
    with pytest.raises(ConfigError, match="timm publishes no weights of resnet18; give timm:resnet18@FILE"):
        load("timm:resnet18")


def test_an_architecture_beside_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="the name is the architecture; leave out --arch"):
        load("timm:resnet10t@random", arch="resnet10")


# --- Hugging Face transformers ---------------------------------------------------------------------------------------

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 8}
WORDS = {
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the extra hf is not installed")


def saved(folder: Path, network: Any, **processor: Any) -> Path:
    """A folder as the library itself writes it."""
    library = transformers()
    with hub._quiet(library):
        network.eval().save_pretrained(folder)
    if processor:
        getattr(library, processor.pop("kind"))(**processor).save_pretrained(folder)
    return folder


def clip_folder(folder: Path) -> tuple[Any, Path]:
    library = transformers()
    config = library.CLIPConfig(
        text_config=TINY | WORDS,
        vision_config=TINY | IMAGES,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=1,
    )
    with seeded(1, "clip"):
        network = library.CLIPModel(config)
    return network, saved(
        folder, network, kind="CLIPImageProcessor", size={"shortest_edge": 18}, crop_size=16
    )


def test_a_clip_image_tower_brings_its_projection_and_its_preprocessing(tmp_path: Path) -> None:
    network, folder = clip_folder(tmp_path / "clip")
    encoder = load(f"hf:{folder}")
    assert encoder.preprocessing.geometry == Geometry(16, 18, "bicubic")
    assert encoder.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
    assert not encoder.preprocessing.assumed and encoder.name == f"hf:{folder}"
    features = encoder.features(pixels(16))
    with torch.no_grad():
        expected = network.get_image_features(pixel_values=encoder.normalise(pixels(16)))
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(features, expected)
    assert features.shape == (2, 12) and type(encoder.network).__name__ == "CLIPVisionModelWithProjection"
    assert not any("text" in name for name in encoder.network.state_dict())  # type: ignore[union-attr]


def vision_networks(library: Any) -> dict[str, tuple[Any, Callable[[Any, Tensor], Tensor], int]]:
    """Name to a network as it is published, what its features are, and how many."""
    config = TINY | IMAGES
    return {
        "a classifier": (
            library.ViTForImageClassification(library.ViTConfig(**config)),
            lambda network, x: network.vit(x).last_hidden_state[:, 0],
            16,
        ),
        "a masked autoencoder": (
            library.ViTMAEForPreTraining(
                library.ViTMAEConfig(
                    **config,
                    decoder_hidden_size=8,
                    decoder_num_hidden_layers=1,
                    decoder_num_attention_heads=1,
                    decoder_intermediate_size=8,
                    mask_ratio=0.0,
                )
            ),
            lambda network, x: network.vit(x).last_hidden_state[:, 0],
            16,
        ),
        "DINOv2": (
            library.Dinov2Model(library.Dinov2Config(**config)),
            lambda network, x: network(x).pooler_output,
            16,
        ),
        "a ResNet": (
            library.ResNetModel(
                library.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic"
                )
            ),
            lambda network, x: network(x).last_hidden_state.mean(dim=(2, 3)),
            24,
        ),
        "SigLIP": (
            library.SiglipModel(library.SiglipConfig(text_config=TINY | WORDS, vision_config=config)),
            lambda network, x: network.vision_model(x).pooler_output,
            16,
        ),
    }


@pytest.mark.parametrize("name", ["a classifier", "a masked autoencoder", "DINOv2", "a ResNet", "SigLIP"])
def test_vision_models_give_the_features_that_their_library_gives(name: str, tmp_path: Path) -> None:
    with seeded(2, "hf"):
        network, features_of, width = vision_networks(transformers())[name]
    encoder = load(f"hf:{saved(tmp_path / 'model', network)}", image_size=16)
    assert encoder.preprocessing.assumed  # there is no preprocessor_config.json
    with torch.no_grad():
        expected = features_of(network.eval(), encoder.normalise(pixels(16)))
    features = encoder.features(pixels(16))
    assert features.shape == (2, width)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(
    ("processor", "geometry", "mean"),
    [
        (
            {"kind": "ViTImageProcessor", "size": {"height": 16, "width": 16}},
            Geometry(16, 16),
            (0.5, 0.5, 0.5),
        ),
        (
            {"kind": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.5, "resample": 3},
            Geometry(16, 32, "bicubic"),
            (0.5, 0.5, 0.5),
        ),
        (
            {"kind": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "do_normalize": False},
            Geometry(16, 16),
            (0.0, 0.0, 0.0),
        ),
    ],
)
def test_every_spelling_of_the_preprocessing_is_read(
    processor: dict[str, Any], geometry: Geometry, mean: tuple[float, ...], tmp_path: Path
) -> None:
    library = transformers()
    folder = saved(tmp_path / "model", library.ViTModel(library.ViTConfig(**TINY, **IMAGES)), **processor)
    preprocessing = load(f"hf:{folder}").preprocessing
    assert (preprocessing.geometry, preprocessing.mean) == (geometry, mean)
    assert preprocessing.std == (1.0, 1.0, 1.0) or preprocessing.std[0] < 1


def test_several_files_are_joined_and_stay_in_their_folder(tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path / "clip")
    before = load(f"hf:{folder}").features(pixels(16))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {f"model-0000{n}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    for part, names in halves.items():
        safetensors.torch.save_file({name: tensors[name] for name in names}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: part for part, names in halves.items() for n in names}}))
    assert torch.equal(load(f"hf:{folder}").features(pixels(16)), before)
    index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected a weight_map with the names of files beside it"):
        load(f"hf:{folder}")


class Trap:
    """Unpickled by an unwary loader, it creates a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_old_weights_are_read_by_the_restricted_loader_only(tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path / "clip")
    before = load(f"hf:{folder}").features(pixels(16))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load(f"hf:{folder}").features(pixels(16)), before)
    torch.save(tensors | {"trap": Trap(tmp_path / "crater")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="it would run code when loaded"):
        load(f"hf:{folder}")
    assert not (tmp_path / "crater").exists()


def described(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "code.Model"}},
            "knows no model of type 'mine'; it needs code of its own, which is never run",
        ),
        ({"model_type": "bert"}, "bert takes no images alone; expected a vision model"),
        ({"num_hidden_layers": 10**9}, "describes 1000000000 layers and holds 24 tensors"),
        ({"hidden_size": 2**14}, "config.json describes .* weights and the files hold"),
        ({"num_hidden_layers": 0}, "16 weights have no place in ViTModel"),
        ({"intermediate_size": 8}, "the weights do not fit its config.json"),
    ],
)
def test_a_description_that_lies_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    library = transformers()
    network = library.ViTForImageClassification(library.ViTConfig(**TINY, **IMAGES))
    folder = saved(tmp_path / "model", network)
    described(folder, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load(f"hf:{folder}")
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_known_model_is_not_run(tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path / "clip")
    before = load(f"hf:{folder}").features(pixels(16))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'crater')!r})\n")
    described(folder, auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    assert torch.equal(load(f"hf:{folder}").features(pixels(16)), before)
    assert not (tmp_path / "crater").exists()


def test_damaged_and_incomplete_folders_are_refused(tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path / "clip")
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = "vision_model.embeddings.class_embedding"

    def refuse(message: str) -> None:
        with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
            load(f"hf:{folder}")
        assert "\n" not in str(caught.value)

    safetensors.torch.save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, weights)
    refuse("holds NaN or infinite values")
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, weights)
    refuse(r"1 weights of CLIPVisionModelWithProjection are missing \(vision_model.embeddings.class_emb")
    weights.unlink()
    refuse("holds no weights; expected a file model.safetensors in it")
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(ConfigError, match="takes no images of 24 pixels .*; leave out --image-size"):
        load(f"hf:{folder}", image_size=24)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": []}'
    )
    refuse("its preprocessing cannot be read")
    (folder / "config.json").write_text("{")
    refuse("config.json: is not JSON")


def test_a_hub_name_without_a_network_says_where_to_put_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers()
    asked: list[tuple[str, str | None]] = []

    def offline(repo: str, *, revision: str | None, **_: object) -> str:
        asked.append((repo, revision))
        raise ConnectionError("Name or service not known\nMax retries exceeded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = r"cannot be fetched \(Name or service not known\); without a network put its config.json, .* hf:FOLDER"
    with pytest.raises(CheckpointError, match=message):
        load("hf:someone/model@v1")
    assert asked == [("someone/model", "v1")]
    with pytest.raises(ConfigError, match="no such folder, and no name on the hub; expected hf:OWNER/NAME"):
        load("hf:/no/such/folder")


def test_a_fetched_model_is_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = clip_folder(tmp_path / ("0123456789ab" + "c" * 28))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert load("hf:someone/model@main").name == "hf:someone/model@0123456789ab"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf:facebook/dinov2", r"needs transformers, which is not installed; pip install 'unpoison\[hf\]'"),
        ("open_clip:ViT-B-32/openai", r"needs open_clip, .*; pip install 'unpoison\[open-clip\]'"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    reference: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("transformers", "open_clip"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=message):
        load(reference)


# --- OpenCLIP --------------------------------------------------------------------------------------------------------

TOWERS: dict[str, dict[str, Any]] = {
    "a ViT": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "a ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "a timm network": {
        "image_size": 32,
        "timm_model_name": "resnet10t",
        "timm_proj": "linear",
        "timm_pool": "",
    },
}
SMALL_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def open_clip() -> Any:
    return pytest.importorskip("open_clip", reason="the extra open-clip is not installed")


def open_clip_folder(folder: Path, tower: str = "a ViT", **preprocess: Any) -> tuple[Any, Path]:
    library = open_clip()
    config = {"embed_dim": 12, "vision_cfg": TOWERS[tower], "text_cfg": SMALL_TEXT, "quick_gelu": True}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    with seeded(3, "open_clip"):
        network = library.create_model(f"local-dir:{folder}", load_weights=False)
    safetensors.torch.save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return network.eval(), folder


@pytest.mark.parametrize("tower", TOWERS)
def test_an_open_clip_folder_gives_the_features_that_its_library_gives(tower: str, tmp_path: Path) -> None:
    network, folder = open_clip_folder(tmp_path / "clip", tower, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    encoder = load(f"open_clip:{folder}")
    size = TOWERS[tower]["image_size"]
    assert encoder.preprocessing == Preprocessing(
        geometry=Geometry(size, size, "bicubic"), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    with torch.no_grad():
        expected = network.encode_image(encoder.normalise(pixels(size)))
    torch.testing.assert_close(encoder.features(pixels(size)), expected)
    assert encoder.name == f"open_clip:{folder}" and len(encoder.fingerprint) == 64


def test_an_open_clip_name_takes_a_file_or_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, folder = open_clip_folder(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip(), "get_model_config", lambda name: config if name == "tiny" else None)
    file = folder / "open_clip_model.safetensors"
    encoder = load(f"open_clip:tiny@{file}")
    assert same_weights(encoder, network.visual)
    assert encoder.preprocessing.assumed and encoder.preprocessing.mean[0] == 0.48145466
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "epoch.pt"
    )
    assert same_weights(load(f"open_clip:tiny/{tmp_path / 'epoch.pt'}"), network.visual)
    state = torch.get_rng_state()
    first, second = (load("open_clip:tiny/random").features(pixels(16)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


def test_a_tag_decides_the_preprocessing_and_the_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = open_clip()
    network, folder = open_clip_folder(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"] | {"quick_gelu": False}
    tag = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "quick_gelu": True}
    monkeypatch.setattr(library, "get_model_config", lambda _: config)
    monkeypatch.setattr(library, "get_pretrained_cfg", lambda model, name: tag if name == "mine" else {})
    monkeypatch.setattr(library, "download_pretrained", lambda _: str(folder / "open_clip_model.safetensors"))
    encoder = load("open_clip:tiny/mine")
    assert encoder.preprocessing == Preprocessing(
        geometry=Geometry(16, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )
    with torch.no_grad():
        expected = network.encode_image(encoder.normalise(pixels(16)))
    torch.testing.assert_close(encoder.features(pixels(16)), expected)
    assert encoder.name == "open_clip:tiny/mine"

    def offline(_: object) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(library, "download_pretrained", offline)
    with pytest.raises(CheckpointError, match="without a network pass a local file: open_clip:tiny@FILE"):
        load("open_clip:tiny/mine")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("open_clip:ViT-B-33/openai", "OpenCLIP knows no model 'ViT-B-33'; did you mean ViT-"),
        ("open_clip:ViT-B-32/nobody", "'nobody' is neither a file nor a tag of ViT-B-32; .* tags: openai, "),
        ("open_clip:ViT-B-32", "'' is neither a file nor a tag of ViT-B-32; expected open_clip:ViT-B-32/TAG"),
        ("open_clip:ViT-B-32@missing.pt", "no such weights file: missing.pt"),
    ],
)
def test_open_clip_references_that_name_nothing_are_refused(reference: str, message: str) -> None:
    open_clip()
    with pytest.raises(ConfigError, match=message) as caught:
        load(reference)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"layers": 10**9}, "describes 1000000000 layers and holds"),
        ({"timm_model_name": "hf-hub:someone/else"}, "its timm_model_name is no plain name of a timm model"),
        ({"colour": "red"}, "its configuration gives no network .*colour"),
        ({"width": 32}, "takes "),
        ("none", "has no model_cfg with a vision_cfg"),
    ],
)
def test_an_open_clip_description_that_lies_is_refused(vision: Any, message: str, tmp_path: Path) -> None:
    _, folder = open_clip_folder(tmp_path / "clip")
    path = folder / "open_clip_config.json"
    value = json.loads(path.read_text())
    cfg = value["model_cfg"]
    cfg["vision_cfg"] = cfg["vision_cfg"] | vision if isinstance(vision, dict) else vision
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(f"open_clip:{folder}")
    assert "\n" not in str(caught.value)


def test_an_open_clip_folder_without_weights_or_with_others_is_refused(tmp_path: Path) -> None:
    _, folder = open_clip_folder(tmp_path / "clip")
    weights = folder / "open_clip_model.safetensors"
    safetensors.torch.save_file({"conv1.weight": torch.ones(1)}, weights)
    with pytest.raises(CheckpointError, match="holds no image tower of OpenCLIP"):
        load(f"open_clip:{folder}")
    weights.unlink()
    with pytest.raises(CheckpointError, match="holds no weights; expected open_clip_model.safetensors in it"):
        load(f"open_clip:{folder}")


@pytest.mark.parametrize("library", ["hf", "open_clip"])
def test_an_image_tower_of_either_library_is_audited(library: str, tmp_path: Path) -> None:
    folder = (clip_folder if library == "hf" else open_clip_folder)(tmp_path / "clip")[1]
    few = DecreeConfig(steps=2, restarts=1, scout_steps=1)
    said = audit(
        f"{library}:{folder}", config=few, out=tmp_path / "run", sample=32, device="cpu", precision="fp32"
    )
    assert said.verdict == "inconclusive"  # nobody has references of it
    assert said.summary["image_size"] == 16 and "parameters" in said.summary["family"]
    assert 0 < said.summary["mask_share"] <= 1 and (tmp_path / "run" / "report.html").is_file()
