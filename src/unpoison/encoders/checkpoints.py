"""Encoders from files, and into them: our own, which are complete, and everybody else's.

A file's own description is checked before anything is built from it; its weights are read in `encoders.weights`.
Encoders that have a name instead of a file are in `encoders.hub`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import safetensors
import safetensors.torch
import timm
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from unpoison.encoders.backbones import SMALL_IMAGE, Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.encoders.hub import SCHEMES, LoadOptions, encoder_of_name
from unpoison.encoders.weights import digest_file, first_line, fit_weights, printable, read_weights
from unpoison.errors import CheckpointError, ConfigError
from unpoison.records import Geometry

__all__ = [
    "ENCODER_SCHEMA",
    "PAIRED",
    "Training",
    "as_encoder",
    "load_encoder",
    "read_tensors",
    "read_training",
    "save_encoder",
    "save_retouched",
    "save_tensors",
]

ENCODER_SCHEMA = "unpoison/encoder/1"
"""What our own files call themselves; the number grows when an older reader would misread a newer file."""

PAIRED = ("clip", "cleanclip")
"""Methods that need captions, which no recipe holds: see `pretrain.clip` and `repair.cleanclip`."""

_LOG = logging.getLogger(__name__)

_SCHEMES = ", ".join(f"{scheme}:" for scheme in SCHEMES)
_RESNETS = ("resnet10", "resnet18", "resnet34", "resnet50")
_Triple = tuple[float, float, float]
_T = TypeVar("_T")


class Trained(Protocol):
    """What a training run must say of its encoder for the file to be complete; `pretrain.TrainedEncoder` does."""

    @property
    def encoder(self) -> Encoder:
        """With an `nn.Module` as network."""

    @property
    def architecture(self) -> Architecture:
        """Builds the network again."""

    @property
    def config(self) -> Any:
        """A dataclass with a field `method`."""

    @property
    def seed(self) -> int:
        """Of every draw."""

    @property
    def fingerprint(self) -> str:
        """Of the images."""

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss of every epoch."""

    @property
    def training_state(self) -> Path | None:
        """What a run that is killed before the encoder is written goes on from."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one of our own encoder files came about.

    Attributes:
        config: the settings of its training, of the type that was asked for.
        image_size: side of its images, pixels.
        seed: of every draw.
        fingerprint: of the images.
        weights: digest of the file, as `Encoder.fingerprint`.
    """

    config: Any
    image_size: int
    seed: int
    fingerprint: str
    weights: str


def save_encoder(
    trained: Trained,
    path: Path | str,
    *,
    retrained: Mapping[str, Any] | None = None,
    distilled: Mapping[str, Any] | None = None,
) -> None:
    """Write an encoder as one .safetensors file that says how to build and feed it; remove its training state.

    The file is complete or absent, never partial, and the same encoder always gives the same bytes.

    Args:
        trained: what pre-training gave.
        path: must end in .safetensors; an existing file is replaced.
        retrained: of an encoder that replaces another one: which, and what it was not shown; plain JSON values.
        distilled: of a student: its teacher, and what it was shown; likewise.

    Raises:
        ConfigError: the name does not end in .safetensors.
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: an encoder is written as .safetensors; end the name so")
    network = trained.encoder.network
    assert isinstance(network, nn.Module), "pre-training gives a module"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {
        "schema": ENCODER_SCHEMA,
        "architecture": asdict(trained.architecture),
        "preprocessing": asdict(trained.encoder.preprocessing),
        "method": trained.config.method,
        "config": asdict(trained.config),
        "seed": trained.seed,
        "fingerprint": trained.fingerprint,
        "losses": list(trained.losses),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "timm": timm.__version__,
        },
    }
    for key, origin in (("retrained", retrained), ("distilled", distilled)):
        if origin is not None:
            metadata[key] = dict(origin)
    save_tensors(path, tensors, metadata, what="encoder")
    if trained.training_state is not None:
        trained.training_state.unlink(missing_ok=True)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, what: str
) -> None:
    """Write tensors and what they are as one .safetensors file, complete or absent; same values, same bytes.

    Args:
        path: an existing file is replaced.
        tensors: on the CPU, contiguous.
        metadata: plain JSON values.
        what: the tensors are, for the error.

    Raises:
        CheckpointError: the file cannot be written.
    """
    described = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    data = _serialise(dict(tensors), described)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: the {what} cannot be written ({error.strerror or error})") from error


def read_tensors(path: Path, schema: str) -> tuple[dict[str, Tensor], Callable[[str, type[_T]], _T]]:
    """The tensors of one of our own files, and a function that reads and checks an entry of its metadata.

    Args:
        path: a .safetensors file that `save_tensors` wrote.
        schema: what its metadata must call themselves.

    Returns:
        Finite dense tensors on the CPU by name, and `entry(key, kind)`, which raises `CheckpointError` when the
        entry is missing or no valid `kind`.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: the file is damaged, of another kind or of another version.
    """
    if not path.is_file() or path.suffix != ".safetensors":
        raise ConfigError(f"{path}: no such file; expected a .safetensors file of schema {schema}")
    tensors, metadata = read_weights(path)
    found = _from_json(path, metadata, "schema")
    if found != schema:
        raise CheckpointError(
            f"{path}: schema {found!r}, expected {schema!r}; use a file of that kind, or the unpoison that wrote it"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"{path}: {printable(name)} holds NaN or infinite values; the file is damaged, get another copy"
            )

    def entry(key: str, kind: type[_T]) -> _T:
        return _validated(path, metadata, key, kind)

    return tensors, entry


def save_retouched(original: Path | str, network: nn.Module, path: Path) -> None:
    """Write a network whose weights were changed, as a file that says of itself what the original says.

    Args:
        original: an encoder file of ours.
        network: of the same architecture.
        path: an existing file is replaced.

    Raises:
        ConfigError: there is no such file, or it is none of ours.
        CheckpointError: it is damaged, or the new file cannot be written.
    """
    original = Path(original)
    is_file = original.is_file() and original.suffix == ".safetensors"
    metadata = read_weights(original)[1] if is_file else {}
    if "unpoison/" not in metadata.get("schema", ""):
        raise ConfigError(
            f"{original}: expected an encoder file that unpoison wrote, which says how to build it again"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    described = {key: json.loads(value) for key, value in metadata.items()}
    save_tensors(path, tensors, described, what="encoder")


def _serialise(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file with its header in sorted order; the library orders metadata anew in every process."""
    data = safetensors.torch.save(tensors, metadata)
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def load_encoder(
    reference: str | Path,
    *,
    arch: str | None = None,
    width: int | None = None,
    image_size: int | None = None,
    mean: _Triple | None = None,
    std: _Triple | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Encoder:
    """The encoder that a file or a name stands for.

    Args:
        reference: one of

            - a .safetensors file that unpoison wrote: complete by itself;
            - any other .safetensors, or a .pth, .pt, .tar, .ckpt or .bin file of tensors: needs `arch`;
            - `timm:NAME[@WEIGHTS]`, `torchvision:NAME[@WEIGHTS]`: WEIGHTS is a local file, the tag of published
              weights (fetched over the network; without WEIGHTS the default tag), or `random`;
            - `hf:REPO[@REVISION]` or `hf:FOLDER`: a vision model, or the image tower, of the transformers library;
            - `open_clip:MODEL/WEIGHTS` (a tag, a file, or `random`) or `open_clip:FOLDER`: an OpenCLIP image tower.

        arch: architecture of a file that does not say it; see `encoders.backbones.Architecture`.
        width: channels of the first stage of such a ResNet; None reads it off the weights.
        image_size: side of the images, in pixels; None takes what the file or the name says, else a guess.
        mean: per channel, for values in [0, 1]; None as for `image_size`.
        std: likewise.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.

    Returns:
        The encoder; `preprocessing.assumed` is True when mean, std or size had to be guessed.

    Raises:
        ConfigError: no such file, scheme, model or tag, or `arch` is missing or contradicts the file.
        CheckpointError: the weights are refused, missing, not finite or do not fit, or cannot be fetched.
    """
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and (len(value) != 3 or not all(math.isfinite(v) for v in value)):
            raise ConfigError(f"{name}={value}: expected three numbers for values in [0, 1]")
    options = LoadOptions(arch, width, image_size, mean, std, device, precision)
    path = Path(reference)
    if path.is_file():
        return _from_file(path, options)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a weights file; name the file in it")
    scheme, separator, rest = str(reference).partition(":")
    if isinstance(reference, Path) or not separator or "/" in scheme or "\\" in scheme:
        raise ConfigError(
            f"encoder {str(reference)!r}: no such file; expected a weights file, or a name with {_SCHEMES}"
        )
    if scheme not in SCHEMES:
        raise ConfigError(
            f"encoder {reference!r}: unknown prefix {scheme!r}; expected {_SCHEMES}, or an existing file"
        )
    if arch is not None:
        raise ConfigError(f"encoder {reference!r}: the name is the architecture; leave out --arch")
    return encoder_of_name(str(reference), scheme, rest, options)


def as_encoder(
    encoder: Encoder | nn.Module | str | Path,
    preprocessing: Preprocessing | None = None,
    *,
    arch: str | None = None,
    width: int | None = None,
    image_size: int | None = None,
    mean: _Triple | None = None,
    std: _Triple | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Encoder:
    """Whatever a Python user calls an encoder, as an `Encoder`.

    Args:
        encoder: one already, a module from normalised images to features, or a reference for `load_encoder`.
        preprocessing: of a module; everything else brings its own. None: what timm says of a module of its own, else
            usual values, which the verdict then calls assumed.
        arch: see `load_encoder`, as for the rest; an `Encoder` is returned as it is, whatever they are.
        width: see `load_encoder`.
        image_size: side of the images, in pixels.
        mean: per channel, for values in [0, 1].
        std: likewise.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.

    Raises:
        ConfigError: preprocessing that is none, or came with something else than a module.
    """
    if isinstance(encoder, nn.Module):
        if preprocessing is None:
            preprocessing = _preprocessing_of(encoder, image_size, mean, std)
        if not isinstance(preprocessing, Preprocessing):
            raise ConfigError(
                f"preprocessing is a {type(preprocessing).__name__}: expected unpoison.Preprocessing(geometry=..., "
                "mean=..., std=...), since images are decoded and resized by us"
            )
        for name in ("fc", "head", "classifier"):
            if isinstance(getattr(encoder, name, None), nn.Linear):
                _LOG.warning(
                    "%s ends in %s: if that is a classifier's head, put nn.Identity() in its place, for it is what "
                    "comes before that is judged",
                    type(encoder).__name__,
                    name,
                )
        return Encoder(
            _copied(encoder),
            preprocessing,
            name=type(encoder).__name__,
            device=device,
            precision=precision,
        )
    if preprocessing is not None:
        raise ConfigError(
            "preprocessing goes with an nn.Module; files, names and Encoders bring their own: leave it out"
        )
    if isinstance(encoder, Encoder):
        return encoder
    return load_encoder(
        encoder,
        arch=arch,
        width=width,
        image_size=image_size,
        mean=mean,
        std=std,
        device=device,
        precision=precision,
    )


def _preprocessing_of(
    module: nn.Module, image_size: int | None, mean: _Triple | None, std: _Triple | None
) -> Preprocessing:
    """What a module of timm says of itself; of any other ImageNet's values, and a size that suits its first layer."""
    said = getattr(module, "pretrained_cfg", None)
    known = dict(said) if isinstance(said, Mapping) else {}
    stem = _stem_kernel(dict(module.named_parameters()))
    side = getattr(getattr(module, "patch_embed", None), "img_size", None) or known.get("input_size")
    size = image_size or (int(side[-1]) if isinstance(side, tuple) else _usual_size("resnet18", stem))
    found = Preprocessing(
        geometry=_usual_geometry(size),
        mean=mean or known.get("mean") or Preprocessing.mean,
        std=std or known.get("std") or Preprocessing.std,
        assumed=True,
    )
    _LOG.warning(
        "%s came without preprocessing=Preprocessing(...), assumed %d px, mean %s, std %s; wrong values give wrong "
        "features without any error",
        type(module).__name__,
        size,
        found.mean,
        found.std,
    )
    return found


def _usual_geometry(size: int) -> Geometry:
    """From ImageNet's sizes on, the papers resize to 8/7 of the side and crop its centre."""
    return Geometry(size, math.floor(size / 0.875) if size >= SMALL_IMAGE else size)


def _copied(module: nn.Module) -> nn.Module:
    """A copy, since an encoder freezes its network, and the caller may want to train on."""
    try:
        return copy.deepcopy(module)
    except Exception as error:  # what a module holds is its author's affair
        _LOG.warning("%s cannot be copied (%s) and is frozen", type(module).__name__, first_line(error))
        return module


# --- Files -----------------------------------------------------------------------------------------------------------


def _from_file(path: Path, options: LoadOptions) -> Encoder:
    tensors, metadata = read_weights(path)
    if "schema" in metadata and "unpoison/" in metadata["schema"]:
        return _from_own_file(path, tensors, metadata, options)
    if options.arch is None:
        raise ConfigError(
            f"{path}: the file does not say which network its weights belong to; give --arch, such as resnet18"
        )
    kernel = _stem_kernel(tensors) if options.arch in _RESNETS else None
    size = options.image_size or _usual_size(options.arch, kernel)
    architecture = Architecture(
        name=options.arch,
        image_size=size,
        width=options.width or _stored_width(tensors) or Architecture.width,
        # Strides cannot be read off weights; a 3×3 stem in a published file is the CIFAR stem, which keeps the size.
        stem_stride={3: 1, 4: 4}.get(kernel or 0),
    )
    stem = kernel if kernel in (3, 4, 7) else None
    network, layout = fit_weights(
        lambda: build_backbone(architecture, stem_kernel=stem), tensors, options.arch, path
    )
    if stem == 3:
        layout += "; a stride of 1 is assumed of its 3×3 stem"
    guessed = [name for name in ("image_size", "mean", "std") if getattr(options, name) is None]
    preprocessing = Preprocessing(
        geometry=_usual_geometry(size),
        mean=options.mean or Preprocessing.mean,
        std=options.std or Preprocessing.std,
        assumed=bool(guessed),
    )
    if guessed:
        _LOG.warning(
            "%s: %s not given, assumed %d px, mean %s, std %s",
            path,
            ", ".join(guessed),
            size,
            preprocessing.mean,
            preprocessing.std,
        )
    return options.encoder(
        network, preprocessing, f"{path.name} ({options.arch}, {layout})", digest_file(path)
    )


def _from_own_file(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], options: LoadOptions
) -> Encoder:
    schema = _from_json(path, metadata, "schema")
    if schema != ENCODER_SCHEMA:
        raise CheckpointError(
            f"{path}: schema {schema!r}, this version reads {ENCODER_SCHEMA!r}; use the unpoison that wrote it"
        )
    architecture = _validated(path, metadata, "architecture", Architecture)
    preprocessing = _validated(path, metadata, "preprocessing", Preprocessing)
    method = _from_json(path, metadata, "method")
    geometry = preprocessing.geometry
    numbers = (*preprocessing.mean, *preprocessing.std)
    if (
        geometry.size != architecture.image_size
        or not geometry.size <= geometry.resize <= 4 * geometry.size
        or geometry.interpolation not in ("bilinear", "bicubic")
        or not all(math.isfinite(v) for v in numbers)
        or not isinstance(method, str)
    ):
        raise CheckpointError(
            f"{path}: its description contradicts itself (method {method!r}, {architecture}, {preprocessing}); "
            "write the file again"
        )
    stored = {
        "arch": architecture.name,
        "image_size": geometry.size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }
    for name, value in stored.items():
        given = getattr(options, name)
        if given is not None and given != value:
            raise ConfigError(f"{path}: {name}={given!r}, but the file says {value!r}; leave the option out")
    network, _ = fit_weights(lambda: build_backbone(architecture), tensors, architecture.name, path)
    name = f"{path.name} ({method} {architecture.name})"
    return options.encoder(network, preprocessing, name, digest_file(path), captioned=method in PAIRED)


def read_training(path: Path | str, kind: type[Any]) -> Training | None:
    """What a file of ours says about its training; None where that needed more than images, and for any other file.

    No weight is read.

    Args:
        path: an encoder file.
        kind: the dataclass of the settings, `pretrain.loop.PretrainConfig`.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: the file is damaged, or names settings that this version does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"encoder {str(path)!r}: no such file; expected the weights file of an encoder")
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file ({first_line(error)})") from error
    if "unpoison/" not in metadata.get("schema", "") or "distilled" in metadata:
        return None
    stored = _from_json(path, metadata, "config")
    if isinstance(stored, dict) and stored.get("method") in PAIRED:
        return None
    unknown = sorted(set(stored) - set(kind.__dataclass_fields__)) if isinstance(stored, dict) else []
    if unknown:
        raise CheckpointError(
            f"{path}: trained with the setting {unknown[0]!r}, which this version does not know; "
            "use the unpoison that wrote it"
        )
    return Training(
        config=_validated(path, metadata, "config", kind),
        image_size=_validated(path, metadata, "preprocessing", Preprocessing).geometry.size,
        seed=_validated(path, metadata, "seed", int),
        fingerprint=_validated(path, metadata, "fingerprint", str),
        weights=digest_file(path),
    )


def _from_json(path: Path, metadata: dict[str, str], key: str) -> Any:
    if key not in metadata:
        raise CheckpointError(f"{path}: its metadata has no {key!r}; write the file again")
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata's {key!r} is not JSON; write the file again") from error


def _validated(path: Path, metadata: dict[str, str], key: str, kind: type[_T]) -> _T:
    try:
        return TypeAdapter(kind).validate_python(_from_json(path, metadata, key))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (key, *first["loc"]))
        raise CheckpointError(
            f"{path}: its metadata's {where}: {first['msg']}; write the file again"
        ) from error


def _stem_kernel(tensors: dict[str, Tensor]) -> int | None:
    """Kernel of the convolution that reads RGB, which tells the stems apart."""
    for name, tensor in tensors.items():
        stem = name.split(".")[-2:] in (["conv1", "weight"], ["0", "weight"])
        if stem and tensor.ndim == 4 and tensor.shape[1] == 3:
            return tensor.shape[-1]
    return None


def _stored_width(tensors: dict[str, Tensor]) -> int | None:
    """Channels of a ResNet's first stage: of the four stages' first blocks, whatever they are called, the narrowest."""
    widths = [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if name.split(".")[-3:] == ["0", "conv1", "weight"] and tensor.ndim == 4 and tensor.shape[1] != 3
    ]
    return min(widths) if widths and 4 <= min(widths) <= 512 else None


def _usual_size(arch: str, kernel: int | None) -> int:
    """Image side for which such a network is usually trained, in pixels."""
    if arch in _RESNETS:
        return 224 if kernel in (None, 7) else 32
    if not timm.is_model(arch):
        return 224  # build_backbone says what is wrong with the name
    usual = timm.get_pretrained_cfg(arch)
    return 224 if usual is None else int(usual.input_size[-1])
