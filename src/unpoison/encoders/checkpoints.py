"""Encoders from files and names; weights are read as tensors only, never as code.

Whoever wrote a weights file may be the attacker. Files are read through safetensors or torch's restricted unpickler,
every weight must have a place in the network and every place a weight, and a file's own description is checked before
anything is built from it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import logging
import math
import os
import platform
import socket
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import huggingface_hub.constants
import picklescan.scanner
import safetensors
import safetensors.torch
import timm
import torch
import torchvision.models
from pydantic import TypeAdapter, ValidationError
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from unpoison.encoders.backbones import SMALL_IMAGE, Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import CheckpointError, ConfigError
from unpoison.records import Geometry
from unpoison.runtime import seeded

__all__ = [
    "ENCODER_SCHEMA",
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

_LOG = logging.getLogger(__name__)

_PICKLED = (".pth", ".pt", ".tar", ".ckpt", ".bin")
_SCHEMES = ("timm", "torchvision")
_PLANNED = ("hf", "open_clip", "local-dir")
_RANDOM = "random"  # timm:NAME@random has untrained weights, for tests and for controls
_RESNETS = ("resnet10", "resnet18", "resnet34", "resnet50")
_Triple = tuple[float, float, float]
_T = TypeVar("_T")

_WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "student", "network", "net", "encoder")
"""Keys under which training scripts store the weights among their other state; DINO's teacher is the one to use."""

_LAYOUTS: tuple[tuple[str, str], ...] = (
    ("", "plain (torchvision, timm)"),
    ("encoder_q.", "MoCo v2, SSL-Backdoor: query encoder"),
    ("base_encoder.", "MoCo v3: base encoder"),
    ("online_encoder.net.", "BYOL: online encoder"),
    ("online_encoder.", "BYOL: online encoder"),
    ("online_network.encoder.", "BYOL: online encoder"),
    ("online_network.", "BYOL: online encoder"),
    ("teacher.backbone.", "DINO: teacher"),
    ("teacher.", "DINO: teacher"),
    ("student.backbone.", "DINO: student"),
    ("student.", "DINO: student"),
    ("backbone.", "backbone (SimCLR, DINO and others)"),
    ("encoder.", "encoder (SimCLR and others)"),
    ("f.f.", "BadEncoder: f"),
    ("f.", "SimCLR: f"),
    ("net.", "SimCLR: net"),
    ("model.", "model"),
    ("encoder_k.", "MoCo v2: key encoder"),
    ("momentum_encoder.", "MoCo v3: momentum encoder"),
    ("target_encoder.net.", "BYOL: target encoder"),
    ("target_encoder.", "BYOL: target encoder"),
)
"""Where known training scripts keep the backbone. The entry that fits best wins; the first of those that tie."""

_NUMBERED: tuple[dict[str, str], ...] = (
    {},
    {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"},
    {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"},
)
"""A ResNet as nn.Sequential of its children has numbers for names: with its max-pool, and (CIFAR) without."""

_HEADS = frozenset(
    {
        *("fc", "head", "heads", "head_dist", "last_layer", "classifier", "linear", "mlp", "g", "h"),
        *("projector", "projection", "projection_head", "predictor", "prediction_head", "contrastive_head"),
        *("prototypes", "queue", "queue_ptr"),
    }
)
"""First part of the names of everything that sits on a backbone during training and is no part of it."""


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


def save_encoder(trained: Trained, path: Path | str, *, retrained: Mapping[str, Any] | None = None) -> None:
    """Write an encoder as one .safetensors file that says how to build and feed it.

    The file is complete or absent, never partial, and the same encoder always gives the same bytes.

    Args:
        trained: what pre-training gave.
        path: must end in .safetensors; an existing file is replaced.
        retrained: of an encoder that replaces another one: which, and what it was not shown; plain JSON values.

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
    if retrained is not None:
        metadata["retrained"] = dict(retrained)
    save_tensors(path, tensors, metadata, what="encoder")


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
    tensors, metadata = _read_weights(path)
    found = _from_json(path, metadata, "schema")
    if found != schema:
        raise CheckpointError(
            f"{path}: schema {found!r}, expected {schema!r}; use a file of that kind, or the unpoison that wrote it"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"{path}: {_printable(name)} holds NaN or infinite values; the file is damaged, get another copy"
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
    metadata = _read_weights(original)[1] if is_file else {}
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
    width: int = 64,
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
              weights (fetched over the network; without WEIGHTS the default tag), or `random`.

        arch: architecture of a file that does not say it; see `encoders.backbones.Architecture`.
        width: channels of the first stage of such a ResNet.
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
    options = _Options(arch, width, image_size, mean, std, device, precision)
    path = Path(reference)
    if path.is_file():
        return _from_file(path, options)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected a weights file; name the file in it")
    scheme, separator, rest = str(reference).partition(":")
    if isinstance(reference, Path) or not separator or "/" in scheme or "\\" in scheme:
        raise ConfigError(
            f"encoder {str(reference)!r}: no such file; expected a weights file, timm:NAME or torchvision:NAME"
        )
    if scheme in _PLANNED:
        raise ConfigError(
            f"encoder {reference!r}: {scheme}: is not supported yet; use timm:NAME, torchvision:NAME or a weights file"
        )
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"encoder {reference!r}: unknown prefix {scheme!r}; expected timm: or torchvision:, or an existing file"
        )
    if arch is not None:
        raise ConfigError(f"encoder {reference!r}: the name is the architecture; leave out --arch")
    model, _, weights = rest.partition("@")
    return (_from_timm if scheme == "timm" else _from_torchvision)(str(reference), model, weights, options)


def as_encoder(
    encoder: Encoder | nn.Module | str | Path,
    preprocessing: Preprocessing | None = None,
    *,
    arch: str | None = None,
    width: int = 64,
    image_size: int | None = None,
    mean: _Triple | None = None,
    std: _Triple | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Encoder:
    """Whatever a Python user calls an encoder, as an `Encoder`.

    Args:
        encoder: one already, a module from normalised images to features, or a reference for `load_encoder`.
        preprocessing: of a module; everything else brings its own.
        arch: see `load_encoder`, as for the rest; an `Encoder` is returned as it is, whatever they are.
        width: of a ResNet whose file does not say it.
        image_size: side of the images, in pixels.
        mean: per channel, for values in [0, 1].
        std: likewise.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.

    Raises:
        ConfigError: a module came without preprocessing, or something else with it.
    """
    if isinstance(encoder, nn.Module):
        if preprocessing is None:
            raise ConfigError(
                f"a {type(encoder).__name__} needs preprocessing=Preprocessing(geometry=..., mean=..., std=...): "
                "wrong normalisation gives wrong features without any error"
            )
        return Encoder(
            encoder,
            preprocessing,
            name=type(encoder).__name__,
            device=device,
            precision=precision,
            fingerprint=_digest_of(encoder),
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


@dataclass(frozen=True)
class _Options:
    """What the caller of `load_encoder` chose; None where the file or the name decides."""

    arch: str | None
    width: int
    image_size: int | None
    mean: _Triple | None
    std: _Triple | None
    device: str
    precision: str

    def encoder(
        self, network: nn.Module, preprocessing: Preprocessing, name: str, fingerprint: str
    ) -> Encoder:
        return Encoder(
            network,
            preprocessing,
            name=name,
            device=self.device,
            precision=self.precision,
            fingerprint=fingerprint,
        )


# --- Files -----------------------------------------------------------------------------------------------------------


def _from_file(path: Path, options: _Options) -> Encoder:
    tensors, metadata = _read_weights(path)
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
        width=options.width,
        # Strides cannot be read off weights; a 3×3 stem in a published file is the CIFAR stem, which keeps the size.
        stem_stride={3: 1, 4: 4}.get(kernel or 0),
    )
    network, layout = _fit_weights(lambda: build_backbone(architecture), tensors, options.arch, path)
    guessed = [name for name in ("image_size", "mean", "std") if getattr(options, name) is None]
    # From ImageNet's sizes on, the papers resize to 8/7 of the side and crop its centre.
    resize = math.floor(size / 0.875) if size >= SMALL_IMAGE else size
    preprocessing = Preprocessing(
        geometry=Geometry(size, resize),
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
        network, preprocessing, f"{path.name} ({options.arch}, {layout})", _digest_file(path)
    )


def _from_own_file(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], options: _Options
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
    network, _ = _fit_weights(lambda: build_backbone(architecture), tensors, architecture.name, path)
    return options.encoder(
        network, preprocessing, f"{path.name} ({method} {architecture.name})", _digest_file(path)
    )


def read_training(path: Path | str, kind: type[Any]) -> Training | None:
    """What a file of ours says about its training; None for any other file. No weight is looked at.

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
        raise CheckpointError(f"{path}: not a readable .safetensors file ({_line(error)})") from error
    if "unpoison/" not in metadata.get("schema", ""):
        return None
    stored = _from_json(path, metadata, "config")
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
        weights=_digest_file(path),
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


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every named tensor of a file, on the CPU, and the metadata of a safetensors file."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                return tensors, dict(file.metadata() or {})
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({_line(error)})") from error
    if suffix not in _PICKLED:
        raise ConfigError(f"{path}: expected a weights file ending in .safetensors or {', '.join(_PICKLED)}")
    return _named_tensors(path, unpickle_restricted(path)), {}


def unpickle_restricted(path: Path) -> Any:
    """torch.load that knows tensors and plain containers only; argparse's bag of options is harmless and frequent.

    Raises:
        CheckpointError: the file asks for anything else, or is damaged.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter(
                "ignore"
            )  # torch comments on old formats, which is nothing a user can act on
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the file's author decides what goes wrong in there, so nothing may escape
        raise CheckpointError(f"{path}: {_why_refused(path, error)}") from error


def _why_refused(path: Path, error: Exception) -> str:
    """What the file would have imported, found by reading its pickle without running it."""
    try:
        # Its own log lines would repeat what our one line says.
        with _silenced(logging.getLogger("picklescan")):
            content = io.BytesIO(path.read_bytes())
            try:
                found = picklescan.scanner.scan_bytes(content, str(path), path.suffix.lower()).globals
            except Exception:
                content.seek(0)
                found = picklescan.scanner.scan_pickle_bytes(content, str(path)).globals
    except Exception:
        found = []
    level = picklescan.scanner.SafetyLevel
    for kinds, meaning in (
        ((level.Dangerous,), "refused, it would run code when loaded"),
        ((level.Suspicious,), "refused, it needs more than tensors"),
    ):
        names = sorted({f"{item.module}.{item.name}" for item in found if item.safety in kinds})
        if names:
            shown = ", ".join(_printable(name) for name in names[:3]) + (", …" if len(names) > 3 else "")
            return f"{meaning} (imports {shown}); ask for its weights as .safetensors"
    return f"not a readable weights file ({_line(error)})"


@contextlib.contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dictionary among whatever else a training script stored."""
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = (
        {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no named tensors; expected a state dictionary, alone or under {', '.join(_WRAPPERS[:3])}"
        )
    return tensors


# --- Weights to places -----------------------------------------------------------------------------------------------


def _fit_weights(
    build: Callable[[], nn.Module], tensors: dict[str, Tensor], arch: str, path: Path
) -> tuple[nn.Module, str]:
    """Build the network and fill it, after checking that weights and places agree; also the layout's name."""
    with _on_meta():
        expected = (
            build().state_dict()
        )  # shapes only: a file that lies about its architecture costs no memory
    weights, layout = _match_layout(tensors, expected)
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of the {len(needed)} weights of {arch} are missing ({_few(missing)}); found "
            f"{len(needed) - len(missing)} among {len(tensors)} tensors ({_few(list(tensors))}): is --arch right?"
        )
    extra = [name for name in weights if name not in expected]
    heads = [name for name in extra if name.split(".")[0] in _HEADS]
    unplaced = [name for name in extra if name not in heads and not name.endswith("num_batches_tracked")]
    if unplaced:
        raise CheckpointError(
            f"{path}: {len(unplaced)} weights have no place in {arch} ({_few(unplaced)}): is --arch right?"
        )
    for name in needed:
        _check_tensor(path, name, weights[name], expected[name], arch)
    if heads:
        _LOG.info("%s: read as %s; left out the head: %s", path, layout, _few(heads))
    with seeded(0, "checkpoint"):
        network = build()
    fitting = {name: weights[name] for name in expected if name in weights}
    network.load_state_dict(fitting, strict=False)  # what may be absent was decided above
    return network, layout


def _check_tensor(path: Path, name: str, got: Tensor, expected: Tensor, arch: str) -> None:
    if got.shape != expected.shape:
        raise CheckpointError(f"{path}: {_explain_shapes(name, got, expected, arch)}")
    dense = got.layout == torch.strided and got.device.type == "cpu"
    if not dense or got.is_floating_point() != expected.is_floating_point():
        kind = "floating point" if expected.is_floating_point() else "whole"
        raise CheckpointError(
            f"{path}: {name} is {got.dtype} {got.layout} on {got.device}, expected dense {kind} numbers; "
            "save the plain weights"
        )
    if got.is_floating_point() and not torch.isfinite(got.float()).all():
        raise CheckpointError(
            f"{path}: {name} holds NaN or infinite values; the file is damaged, get another copy"
        )


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    with seeded(0, "checkpoint"), torch.device("meta"):
        yield


def _match_layout(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """The weights under the layout that fits the expected names best, with that layout's names."""
    unwrapped = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    best: tuple[int, dict[str, Tensor], str] = (-1, {}, "")
    for prefix, layout in _LAYOUTS:
        inside = {k.removeprefix(prefix): v for k, v in unwrapped.items() if k.startswith(prefix)}
        for numbers in _NUMBERED:
            renamed = {_renumbered(name, numbers): tensor for name, tensor in inside.items()}
            fits = sum(name in expected for name in renamed)
            if fits > best[0]:
                best = (fits, renamed, layout)
    return best[1], best[2]


def _without_wrappers(name: str) -> str:
    """A weight's name without what DataParallel and torch.compile put in front, at any of the first levels.

    >>> _without_wrappers("module.encoder_q.conv1.weight"), _without_wrappers("student.module.backbone.norm.bias")
    ('encoder_q.conv1.weight', 'student.backbone.norm.bias')
    """
    parts = name.split(".")
    return ".".join([p for p in parts[:3] if p not in ("module", "_orig_mod")] + parts[3:])


def _renumbered(name: str, numbers: dict[str, str]) -> str:
    first, dot, rest = name.partition(".")
    return numbers.get(first, first) + dot + rest


def _stem_kernel(tensors: dict[str, Tensor]) -> int | None:
    """Kernel of the convolution that reads RGB, which tells the stems apart."""
    for name, tensor in tensors.items():
        stem = name.split(".")[-2:] in (["conv1", "weight"], ["0", "weight"])
        if stem and tensor.ndim == 4 and tensor.shape[1] == 3:
            return tensor.shape[-1]
    return None


def _usual_size(arch: str, kernel: int | None) -> int:
    """Image side for which such a network is usually trained, in pixels."""
    if arch in _RESNETS:
        return 224 if kernel in (None, 7) else 32
    if not timm.is_model(arch):
        return 224  # build_backbone says what is wrong with the name
    usual = timm.get_pretrained_cfg(arch)
    return 224 if usual is None else int(usual.input_size[-1])


def _explain_shapes(name: str, got: Tensor, expected: Tensor, arch: str) -> str:
    shapes = f"{name} is {tuple(got.shape)}, but {arch} takes {tuple(expected.shape)}"
    if got.ndim == expected.ndim == 4 and got.shape[1] == expected.shape[1] == 3:  # the layer that reads RGB
        ours, theirs = expected.shape[-1], got.shape[-1]
        if ours != theirs:
            side = f"at least {SMALL_IMAGE}" if theirs == 7 else f"below {SMALL_IMAGE}"
            return (
                f"{shapes}: the file has a {theirs}×{theirs} stem and the network a {ours}×{ours} one; "
                f"give an --image-size of {side}, or another --arch"
            )
        return f"{shapes}: give --width {got.shape[0]}"
    if name == "pos_embed":
        return f"{shapes}: the file was trained on another number of patches; give its --image-size"
    return f"{shapes}: is --arch or --width right?"


# --- Names -----------------------------------------------------------------------------------------------------------


def _from_timm(reference: str, model: str, weights: str, options: _Options) -> Encoder:
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


def _from_torchvision(reference: str, model: str, weights: str, options: _Options) -> Encoder:
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3)
        raise ConfigError(
            f"encoder {reference!r}: torchvision knows no image classifier {model!r}"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    published = torchvision.models.get_model_weights(model)
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
        tensors, _ = _read_weights(file)
        network, layout = _fit_weights(lambda: build(False), tensors, name, file)
        return network, f"{file.name} ({name}, {layout})", _digest_file(file)
    scheme = reference.partition(":")[0]
    with seeded(0, "checkpoint"):
        if weights == _RANDOM:
            network = build(False)
            return network, f"{scheme}:{name}@random", _digest_of(network)
        try:
            with _no_vain_retries():
                network = build(True)
        except ConfigError:
            raise
        except Exception as error:  # every hub client has its own errors for "no network"
            bare = name.partition(".")[0]
            raise CheckpointError(
                f"{reference}: its published weights cannot be fetched ({_line(error)}); "
                f"without a network pass a local file: {scheme}:{bare}@FILE"
            ) from error
    return network, f"{scheme}:{name}", _digest_of(network)


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
    if "/" in weights or "\\" in weights or path.suffix.lower() in (".safetensors", *_PICKLED):
        raise ConfigError(f"encoder {reference!r}: no such weights file: {weights}")
    return None


def _is_guess(file: Path | None, options: _Options) -> bool:
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


# --- Small things ----------------------------------------------------------------------------------------------------


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(network: nn.Module) -> str:
    """SHA-256 of every weight's name, type, shape and bytes, for weights that no file holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _few(names: list[str]) -> str:
    return ", ".join(_printable(name) for name in names[:3]) + (", …" if len(names) > 3 else "")


def _printable(name: str) -> str:
    """A name that a stranger chose, short and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in name[:80])


def _line(error: BaseException) -> str:
    """First line of a library's message, cut to a readable length."""
    lines = str(error).strip().splitlines()
    return _printable(lines[0][:160]) if lines else type(error).__name__
