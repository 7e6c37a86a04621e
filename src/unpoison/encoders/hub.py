"""Encoders from names: timm, torchvision, Hugging Face transformers and OpenCLIP, each with its own preprocessing.

A name says which network and how its images are prepared; nothing is guessed where the library knows it. Networks are
built by the installed library alone: code that comes with weights is never fetched and never run, and weights that a
stranger wrote are read in `encoders.weights`. Only the image tower of an image-text model is built.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import math
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import huggingface_hub.constants
import timm
import torch
import torchvision.models
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.encoders.weights import (
    PICKLED,
    digest_file,
    digest_of,
    few,
    first_line,
    fit_weights,
    on_meta,
    printable,
    read_weights,
)
from unpoison.errors import CheckpointError, ConfigError
from unpoison.records import Geometry
from unpoison.runtime import seeded

__all__ = ["SCHEMES", "LoadOptions", "encoder_of_name"]

SCHEMES = ("timm", "torchvision", "hf", "open_clip")
"""What a name may begin with."""

_RANDOM = "random"  # timm:NAME@random has untrained weights, for tests and for controls
_Triple = tuple[float, float, float]


@dataclass(frozen=True)
class LoadOptions:
    """What the caller of `load_encoder` chose; None where the file or the name decides."""

    arch: str | None
    width: int | None
    image_size: int | None
    mean: _Triple | None
    std: _Triple | None
    device: str
    precision: str

    def encoder(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        name: str,
        fingerprint: str,
        *,
        captioned: bool = False,
    ) -> Encoder:
        """The encoder of a network, on the device and in the precision of choice."""
        return Encoder(
            network,
            preprocessing,
            name=name,
            device=self.device,
            precision=self.precision,
            fingerprint=fingerprint,
            captioned=captioned,
        )


def encoder_of_name(reference: str, scheme: str, name: str, options: LoadOptions) -> Encoder:
    """The encoder that `SCHEME:NAME` stands for.

    Args:
        reference: the whole of it, for errors.
        scheme: one of `SCHEMES`.
        name: what follows the colon.
        options: what the caller chose.

    Raises:
        ConfigError: no such model, tag or folder, or a library is missing.
        CheckpointError: the weights are refused, missing, not finite or do not fit, or cannot be fetched.
    """
    if scheme == "hf":
        return _from_hf(reference, name, options)
    if scheme == "open_clip":
        return _from_open_clip(reference, name, options)
    model, _, weights = name.partition("@")
    return (_from_timm if scheme == "timm" else _from_torchvision)(reference, model, weights, options)


# --- timm and torchvision --------------------------------------------------------------------------------------------


def _from_timm(reference: str, model: str, weights: str, options: LoadOptions) -> Encoder:
    base, _, tag = model.partition(".")
    if not timm.is_model(base) or ":" in model or "/" in model:
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        raise ConfigError(
            f"encoder {reference!r}: timm knows no model {base!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()")
        )
    file = _weights_file(reference, weights)
    if file is None and weights != _RANDOM:
        tag = weights or tag
        tags = [name.partition(".")[2] for name in timm.list_models(f"{base}.*", pretrained=True)]
        tags += ["" for name in timm.list_models(base, pretrained=True)]
        if not tags:
            raise ConfigError(
                f"encoder {reference!r}: timm publishes no weights of {base}; give timm:{base}@FILE"
            )
        if tag and tag not in tags:
            raise ConfigError(
                f"encoder {reference!r}: {tag!r} is neither a file nor a tag of {base}; tags: {', '.join(tags[:8])}"
            )
    name = f"{base}.{tag}" if tag else base

    def build(pretrained: bool = False) -> nn.Module:
        create = cast(Callable[..., nn.Module], timm.create_model)
        arguments: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained}
        if options.image_size is None:
            return create(name, **arguments)
        try:
            return create(name, img_size=options.image_size, **arguments)
        except TypeError:  # convolutional networks take no image size
            return create(name, **arguments)

    network, label, fingerprint = _named_network(reference, name, weights, file, build)
    data: dict[str, Any] = cast(Callable[..., dict[str, Any]], resolve_model_data_config)(network)
    if data["input_size"][1] != data["input_size"][2] and options.image_size is None:
        raise ConfigError(
            f"encoder {reference!r}: made for {data['input_size'][1:]} images; give a square --image-size"
        )
    size = options.image_size or int(data["input_size"][-1])
    known = data["interpolation"] in ("bilinear", "bicubic") and data["crop_mode"] == "center"
    preprocessing = Preprocessing(
        geometry=Geometry(
            size,
            math.floor(size / data["crop_pct"]),
            data["interpolation"] if data["interpolation"] == "bilinear" else "bicubic",
        ),
        mean=options.mean or _triple(data["mean"]),
        std=options.std or _triple(data["std"]),
        assumed=not known or _is_guess(file, options),
    )
    return options.encoder(network, preprocessing, label, fingerprint)


def _from_torchvision(reference: str, model: str, weights: str, options: LoadOptions) -> Encoder:
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3)
        raise ConfigError(
            f"encoder {reference!r}: torchvision knows no image classifier {model!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    published = torchvision.models.get_model_weights(model)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE  # as --offline sets it; torchvision does not know it
    file = _weights_file(reference, weights)
    tag = "DEFAULT" if file is not None or weights in ("", _RANDOM) else weights
    if tag not in published.__members__:
        raise ConfigError(
            f"encoder {reference!r}: {tag!r} is neither a file nor weights of {model}; "
            f"expected {', '.join(published.__members__)}"
        )
    source = published[tag]

    def build(pretrained: bool = False) -> nn.Module:
        arguments: dict[str, Any] = {"weights": None}
        if options.image_size is not None and model.startswith("vit_"):
            arguments["image_size"] = options.image_size
        network = torchvision.models.get_model_builder(model)(**arguments)
        if pretrained:
            kept = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rpartition("/")[2]
            if offline and not kept.exists():
                raise CheckpointError(f"offline, and {kept} does not exist")
            network.load_state_dict(source.get_state_dict(progress=False, check_hash=True, weights_only=True))
        return _without_head(network, reference)

    network, label, fingerprint = _named_network(reference, model, weights, file, build)
    view = source.transforms()
    size = options.image_size or int(view.crop_size[0])
    preprocessing = Preprocessing(
        geometry=Geometry(
            size,
            max(size, math.floor(size * view.resize_size[0] / view.crop_size[0])),
            "bilinear" if view.interpolation.value == "bilinear" else "bicubic",
        ),
        mean=options.mean or _triple(view.mean),
        std=options.std or _triple(view.std),
        assumed=_is_guess(file, options),
    )
    return options.encoder(network, preprocessing, label, fingerprint)


def _named_network(
    reference: str, name: str, weights: str, file: Path | None, build: Callable[[bool], nn.Module]
) -> tuple[nn.Module, str, str]:
    """The network of a name with local, random or published weights; also its label and fingerprint."""
    if file is not None:
        tensors, _ = read_weights(file)
        network, layout = fit_weights(lambda: build(False), tensors, name, file)
        return network, f"{file.name} ({name}, {layout})", digest_file(file)
    scheme = reference.partition(":")[0]
    with seeded(0, "checkpoint"):
        if weights == _RANDOM:
            network = build(False)
            return network, f"{scheme}:{name}@random", digest_of(network)
        try:
            # torchvision announces its downloads on stdout, which belongs to --json.
            with _no_vain_retries(), contextlib.redirect_stdout(sys.stderr):
                network = build(True)
        except ConfigError:
            raise
        except Exception as error:  # every hub client has its own errors for "no network"
            bare = name.partition(".")[0]
            raise CheckpointError(
                f"{reference}: its published weights cannot be fetched ({first_line(error)}); "
                f"without a network pass a local file: {scheme}:{bare}@FILE"
            ) from error
    return network, f"{scheme}:{name}", digest_of(network)


@contextlib.contextmanager
def _no_vain_retries() -> Iterator[None]:
    """Where the hub's name does not even resolve, look in its cache only; its client would retry for a minute."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():  # behind a proxy, names are resolved elsewhere
            socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _weights_file(reference: str, weights: str) -> Path | None:
    if weights in ("", _RANDOM):
        return None
    path = Path(weights)
    if path.is_file():
        return path
    if "/" in weights or "\\" in weights or path.suffix.lower() in (".safetensors", *PICKLED):
        raise ConfigError(f"encoder {reference!r}: no such weights file: {weights}")
    return None


def _is_guess(file: Path | None, options: LoadOptions) -> bool:
    """A local file need not follow the preprocessing that its architecture's published weights have."""
    return file is not None and None in (options.mean, options.std)


def _without_head(network: nn.Module, reference: str) -> nn.Module:
    """Replace the last linear layer, torchvision's classifier, by nothing; what precedes it pools or normalises."""
    for attribute in ("fc", "classifier", "heads", "head"):
        head = getattr(network, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(network, attribute, nn.Identity())
            return network
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            head[-1] = nn.Identity()
            return network
    raise ConfigError(
        f"encoder {reference!r}: its classifier is no linear layer that could be left out; use another model"
    )


def _triple(values: Any) -> _Triple:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


# --- Hugging Face transformers ---------------------------------------------------------------------------------------

_HF_DESCRIPTION = ("config.json", "preprocessor_config.json", "processor_config.json")
_HF_SAFE = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_HF_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
_HF_OPTIONS = ("auto_map", "attn_implementation", "quantization_config")  # may name code elsewhere
_HF_TWINS = {"vit_mae": "vit"}  # whose own class hides random patches, also when it is not trained
_TANH_POOLER = "pooler.dense.weight"


def _from_hf(reference: str, name: str, options: LoadOptions) -> Encoder:
    library = _library(reference, "transformers", "hf")
    folder, label = Path(name), f"hf:{name}"
    if not folder.is_dir():
        folder = _fetch_hf(reference, name)
        label = f"hf:{name.partition('@')[0]}@{folder.name[:12]}"  # a snapshot is named by its commit
    tensors = _read_hf_weights(folder)
    with _quiet(library):
        network = _build_hf(library, reference, folder, tensors)
        preprocessing = _hf_preprocessing(library, reference, folder, network, options)
    # Under its own name: references of clean encoders are kept per kind of network.
    network = type(type(network).__name__, (_Pooled,), {})(network)
    _check_features(reference, network, preprocessing.geometry.size)
    return options.encoder(network, preprocessing, label, digest_of(network))


def _fetch_hf(reference: str, name: str) -> Path:
    """The folder with description and weights of a model on the hub, from its cache when it is there."""
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", repo):
        raise ConfigError(
            f"encoder {reference!r}: no such folder, and no name on the hub; expected hf:OWNER/NAME or hf:FOLDER"
        )
    try:
        with _no_vain_retries():
            for weights in (_HF_SAFE, _HF_PICKLED):
                fetched = huggingface_hub.snapshot_download(
                    repo, revision=revision or None, allow_patterns=[*_HF_DESCRIPTION, *weights]
                )
                if _first_of(Path(fetched), _HF_SAFE + _HF_PICKLED) is not None:
                    break
    except Exception as error:  # the hub's client has an error of its own for every case
        raise CheckpointError(
            f"{reference}: cannot be fetched ({first_line(error)}); without a network put its config.json, "
            "preprocessor_config.json and model.safetensors in a folder and give hf:FOLDER"
        ) from error
    return Path(fetched)


def _read_hf_weights(folder: Path) -> dict[str, Tensor]:
    """All named tensors of a folder; several files are joined as their index says."""
    file = _first_of(folder, _HF_SAFE + _HF_PICKLED)
    if file is None:
        raise CheckpointError(f"{folder}: holds no weights; expected a file model.safetensors in it")
    if file.suffix != ".json":
        return read_weights(file)[0]
    parts = _read_json(file).get("weight_map")
    names = sorted({str(part) for part in parts.values()}) if isinstance(parts, dict) else []
    if not names or any(Path(part).name != part for part in names):
        raise CheckpointError(f"{file}: expected a weight_map with the names of files beside it")
    return {name: tensor for part in names for name, tensor in read_weights(folder / part)[0].items()}


def _build_hf(library: Any, reference: str, folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """The network that the description names, with the weights; the image tower of an image-text model."""
    described = _read_json(folder / "config.json")
    kind = described.get("model_type")
    kind = _HF_TWINS.get(str(kind), kind)
    if kind not in library.CONFIG_MAPPING:
        own = "; it needs code of its own, which is never run" if "auto_map" in described else ""
        raise ConfigError(
            f"encoder {reference!r}: transformers {library.__version__} knows no model of type "
            f"{printable(str(kind))!r}{own}"
        )
    try:
        config = library.CONFIG_MAPPING[kind].from_dict(_harmless(described))
    except Exception as error:  # it checks its fields in many ways
        raise CheckpointError(
            f"{folder / 'config.json'}: no valid description ({first_line(error)})"
        ) from error
    if kind == "clip":
        config.vision_config.projection_dim = config.projection_dim
    config = getattr(config, "vision_config", config)
    if kind == "clip" or (kind == "clip_vision_model" and "visual_projection.weight" in tensors):
        build = library.CLIPVisionModelWithProjection
    else:
        build = library.MODEL_MAPPING.get(type(config), None)
    if build is None or build.main_input_name != "pixel_values":
        raise ConfigError(f"encoder {reference!r}: {kind} takes no images alone; expected a vision model")
    _refuse_more_layers(folder, tensors, getattr(config, "num_hidden_layers", 0))
    with on_meta():
        expected = build(config).state_dict()
    # A layer from language models that other libraries do not have, and that most files leave untrained.
    arguments: dict[str, Any] = {"add_pooling_layer": False} if _TANH_POOLER in expected else {}
    _check_extent(folder, tensors, expected)
    try:
        network, report = build.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
            **arguments,
        )
    except Exception as error:  # sizes that do not fit, above all
        raise CheckpointError(
            f"{folder}: the weights do not fit its config.json ({first_line(error)}); get both from one place"
        ) from error
    _check_hf_report(folder, network, report)
    return cast(nn.Module, network)


def _harmless(described: dict[str, Any]) -> dict[str, Any]:
    """A description without what could name code elsewhere."""
    return {
        key: _harmless(value) if isinstance(value, dict) else value
        for key, value in described.items()
        if not key.startswith("_") and key not in _HF_OPTIONS
    }


def _check_extent(folder: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """A description of a network far larger than its weights would fill the memory before anything is missed."""
    described = sum(t.numel() for name, t in expected.items() if "pooler" not in name)
    held = sum(t.numel() for t in tensors.values())
    if described > held:
        raise CheckpointError(
            f"{folder}: config.json describes {described} weights and the files hold {held}; get both from one place"
        )


def _refuse_more_layers(folder: Path, tensors: dict[str, Tensor], layers: Any) -> None:
    count = sum(layers) if isinstance(layers, list | tuple) else layers
    if not isinstance(count, int) or count > len(tensors):
        raise CheckpointError(
            f"{folder}: describes {printable(str(layers))} layers and holds {len(tensors)} tensors; "
            "get both from one place"
        )


def _check_hf_report(folder: Path, network: Any, report: dict[str, Any]) -> None:
    """Every place must have got a weight; a weight without a place must belong to another tower or a head."""
    missing = sorted(str(name) for name in report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights of {type(network).__name__} are missing ({few(missing)})"
        )
    prefix = f"{network.base_model_prefix}."
    places = {
        name.removeprefix(prefix).partition(".")[0]
        for name in (*dict(network.named_modules()), *network.state_dict())
    } - {""}
    unplaced = sorted(
        name
        for name in map(str, report["unexpected_keys"])
        if name.removeprefix(prefix).partition(".")[0] in places and "pooler." not in name
    )
    if unplaced:
        raise CheckpointError(
            f"{folder}: {len(unplaced)} weights have no place in {type(network).__name__} ({few(unplaced)})"
        )
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{folder}: {printable(name)} holds NaN or infinite values; the file is damaged, get another copy"
            )


def _hf_preprocessing(
    library: Any, reference: str, folder: Path, network: Any, options: LoadOptions
) -> Preprocessing:
    """What the model's own processor does; the network's usual size and a guess where it has none."""
    if _first_of(folder, _HF_DESCRIPTION[1:]) is None:
        size = options.image_size or getattr(network.config, "image_size", 224)
        if not isinstance(size, int):
            raise ConfigError(f"encoder {reference!r}: made for {size} images; give a square --image-size")
        return Preprocessing(
            geometry=Geometry(size, size),
            mean=options.mean or Preprocessing.mean,
            std=options.std or Preprocessing.std,
            assumed=True,
        )
    try:
        own = library.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        whole, cropped = own.size, getattr(own, "crop_size", None) if own.do_center_crop else None
        resize = int(_side(whole))
        size = int(_side(cropped)) if cropped else resize
        share = getattr(own, "crop_pct", None)
        if share and not cropped and resize < 384:  # ConvNeXt's: larger ones are squeezed, these are cropped
            resize = math.floor(size / share)
        mean, std = (
            (_triple(own.image_mean), _triple(own.image_std))
            if own.do_normalize
            else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        )
        usual = own.do_rescale and math.isclose(own.rescale_factor * 255, 1, rel_tol=1e-3)
        interpolation = {2: "bilinear", 3: "bicubic"}.get(int(own.resample or 0))
    except Exception as error:  # a stranger's description goes wrong in many places of the library
        raise CheckpointError(
            f"{folder}: its preprocessing cannot be read ({first_line(error)}); "
            "expected the preprocessor_config.json of an image model"
        ) from error
    wanted = options.image_size or size
    return Preprocessing(
        geometry=Geometry(wanted, max(wanted, wanted * resize // size), interpolation or "bicubic"),
        mean=options.mean or mean,
        std=options.std or std,
        assumed=interpolation is None or not usual,
    )


def _side(sizes: Any) -> Any:
    """The side of a square, of the many spellings that processors have for it."""
    spelled = (getattr(sizes, name, None) for name in ("shortest_edge", "height"))
    return next((side for side in spelled if side is not None), sizes)


class _Pooled(nn.Module):
    """One feature vector per image from a network of transformers.

    The embedding that an image-text model compares, else the network's own pooling, else the class token, else the
    mean over places.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        names = [name for name, _ in network.named_parameters()]
        self.has_class_token = any(name.endswith(("cls_token", "class_embedding")) for name in names)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images to (N, D)."""
        output = self.network(pixel_values=images)
        for pooled in (getattr(output, "image_embeds", None), getattr(output, "pooler_output", None)):
            if pooled is not None:
                return cast(Tensor, pooled.flatten(1))
        last: Tensor = output.last_hidden_state
        if last.ndim == 4:
            return last.mean(dim=(2, 3))
        return last[:, 0] if self.has_class_token else last.mean(dim=1)


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the tables and bars that transformers prints while it loads; what matters is checked here."""
    log = library.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


# --- OpenCLIP --------------------------------------------------------------------------------------------------------

_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
_OPEN_CLIP_USUAL = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
}
"""OpenAI's, which OpenCLIP takes unless a model says otherwise."""
_SMALLEST_TEXT = {"context_length": 2, "vocab_size": 2, "width": 2, "heads": 1, "layers": 1}


def _from_open_clip(reference: str, name: str, options: LoadOptions) -> Encoder:
    library = _library(reference, "open_clip", "open-clip")
    folder = Path(name)
    if folder.is_dir():
        described = _read_json(folder / "open_clip_config.json")
        file = _first_of(folder, _OPEN_CLIP_WEIGHTS)
        if file is None:
            raise CheckpointError(f"{folder}: holds no weights; expected {_OPEN_CLIP_WEIGHTS[0]} in it")
        config, view, known = described.get("model_cfg"), described.get("preprocess_cfg"), True
        model, label = folder.name, f"open_clip:{name}"
    else:
        model, tag = [*re.split("[/@]", name, maxsplit=1), ""][:2]
        config = library.get_model_config(model)
        if config is None:
            near = difflib.get_close_matches(model, library.list_models(), n=3)
            raise ConfigError(
                f"encoder {reference!r}: OpenCLIP knows no model {model!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "; see open_clip.list_models()")
            )
        file, view = _open_clip_file(library, reference, model, tag)
        known, label = tag == _RANDOM or bool(view), f"open_clip:{model}/{Path(tag).name}"
    if not isinstance(config, dict) or not isinstance(config.get("vision_cfg"), dict):
        raise CheckpointError(f"{folder}: its open_clip_config.json has no model_cfg with a vision_cfg")
    view = {**_OPEN_CLIP_USUAL, **(view if isinstance(view, dict) else {})}
    vision = {**config["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
    if not re.fullmatch(r"[\w.\-]*", str(vision.get("timm_model_name") or "")):
        raise CheckpointError(f"{folder}: its timm_model_name is no plain name of a timm model")

    def build() -> nn.Module:
        try:
            return cast(
                nn.Module,
                library.CLIP(
                    embed_dim=config["embed_dim"],
                    vision_cfg=vision,
                    text_cfg=_SMALLEST_TEXT,  # is thrown away
                    quick_gelu=bool(view.get("quick_gelu", config.get("quick_gelu", False))),
                ).visual,
            )
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{reference}: its configuration gives no network ({first_line(error)})"
            ) from error

    if file is None:
        with seeded(0, "checkpoint"):
            network = build()
    else:
        stored, _ = read_weights(file)
        tower = {
            bare.removeprefix("visual."): tensor
            for bare, tensor in ((name.removeprefix("module."), tensor) for name, tensor in stored.items())
            if bare.startswith("visual.")
        }
        if not tower:
            raise CheckpointError(f"{file}: holds no image tower of OpenCLIP (names that begin with visual.)")
        _refuse_more_layers(file, tower, vision.get("layers", 12))
        network, _ = fit_weights(build, tower, model, file)
    preprocessing = _open_clip_preprocessing(reference, network, view, options, known=known)
    _check_features(reference, network, preprocessing.geometry.size)
    return options.encoder(network, preprocessing, label, digest_of(network))


def _open_clip_file(
    library: Any, reference: str, model: str, tag: str
) -> tuple[Path | None, dict[str, Any] | None]:
    """Where the weights are, and the preprocessing that their tag prescribes; of `random` neither."""
    if tag == _RANDOM:
        return None, None
    local = _weights_file(reference, tag) if tag else None
    if local is not None:
        return local, None
    published = library.get_pretrained_cfg(model, tag) if tag else {}
    if not published:
        tags = library.list_pretrained_tags_by_model(model)
        raise ConfigError(
            f"encoder {reference!r}: {tag!r} is neither a file nor a tag of {model}; expected open_clip:{model}/TAG; "
            f"tags: {', '.join(tags[:8])}"
        )
    try:
        with _no_vain_retries():
            return Path(library.download_pretrained(published)), published
    except Exception as error:  # the hub's client has an error of its own for every case
        raise CheckpointError(
            f"{reference}: its published weights cannot be fetched ({first_line(error)}); "
            f"without a network pass a local file: open_clip:{model}@FILE"
        ) from error


def _open_clip_preprocessing(
    reference: str, network: Any, view: dict[str, Any], options: LoadOptions, *, known: bool
) -> Preprocessing:
    side = getattr(network, "image_size", 224)
    height, width = side if isinstance(side, tuple | list) else (side, side)
    if height != width:
        raise ConfigError(f"encoder {reference!r}: made for {height}×{width} images; expected a square input")
    size = options.image_size or int(height)
    try:
        mean, std = _triple(view["mean"]), _triple(view["std"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{reference}: its mean and std are not three numbers each") from error
    return Preprocessing(
        geometry=Geometry(size, size, "bilinear" if view["interpolation"] == "bilinear" else "bicubic"),
        mean=options.mean or mean,
        std=options.std or std,
        assumed=not known and None in (options.mean, options.std),
    )


# --- What several of them need ---------------------------------------------------------------------------------------


def _library(reference: str, module: str, extra: str) -> Any:
    """An optional library, untyped."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"encoder {reference!r}: needs {module}, which is not installed; pip install 'unpoison[{extra}]'"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON; get another copy") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object; get another copy")
    return value


def _first_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _check_features(reference: str, network: nn.Module, size: int) -> None:
    """Whether one image of this side gives one feature vector."""
    try:
        with torch.inference_mode():
            output = network.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # each network has its own way to say so
        raise ConfigError(
            f"encoder {reference!r}: takes no images of {size} pixels ({first_line(error)}); leave out --image-size"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ConfigError(f"encoder {reference!r}: gives no feature vector per image; use another model")
