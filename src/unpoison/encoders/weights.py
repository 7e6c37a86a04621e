"""Weights files: read as tensors only, never as code, and fitted to a network one by one.

Whoever wrote a weights file may be the attacker. Files are read through safetensors or torch's restricted unpickler,
every weight must have a place in the network and every place a weight.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import picklescan.scanner
import safetensors
import torch
from torch import Tensor, nn

from unpoison.encoders.backbones import SMALL_IMAGE
from unpoison.errors import CheckpointError, ConfigError
from unpoison.runtime import seeded

__all__ = [
    "PICKLED",
    "digest_file",
    "digest_of",
    "few",
    "first_line",
    "fit_weights",
    "on_meta",
    "printable",
    "read_weights",
    "unpickle_restricted",
]

PICKLED = (".pth", ".pt", ".tar", ".ckpt", ".bin")
"""Suffixes of files that torch wrote."""

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


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every named tensor of a file, on the CPU, and the metadata of a safetensors file."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                return tensors, dict(file.metadata() or {})
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    if suffix not in PICKLED:
        raise ConfigError(f"{path}: expected a weights file ending in .safetensors or {', '.join(PICKLED)}")
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
            shown = ", ".join(printable(name) for name in names[:3]) + (", …" if len(names) > 3 else "")
            return f"{meaning} (imports {shown}); ask for its weights as .safetensors"
    # By its kind, too: the unpickler's own words are often a bare number.
    said = f"{type(error).__name__}: {first_line(error)}"
    return f"not a readable weights file ({said}); expected .safetensors, or weights saved by torch.save"


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


def fit_weights(
    build: Callable[[], nn.Module], tensors: dict[str, Tensor], arch: str, path: Path
) -> tuple[nn.Module, str]:
    """Build the network and fill it, after checking that weights and places agree; also the layout's name."""
    with on_meta():
        expected = (
            build().state_dict()
        )  # shapes only: a file that lies about its architecture costs no memory
    weights, layout = _match_layout(tensors, expected)
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of the {len(needed)} weights of {arch} are missing ({few(missing)}); found "
            f"{len(needed) - len(missing)} among {len(tensors)} tensors ({few(list(tensors))}): is --arch right?"
        )
    extra = [name for name in weights if name not in expected]
    heads = [name for name in extra if name.split(".")[0] in _HEADS]
    unplaced = [name for name in extra if name not in heads and not name.endswith("num_batches_tracked")]
    if unplaced:
        raise CheckpointError(
            f"{path}: {len(unplaced)} weights have no place in {arch} ({few(unplaced)}): is --arch right?"
        )
    for name in needed:
        _check_tensor(path, name, weights[name], expected[name], arch)
    if heads:
        layout += f"; its head is left out: {few(sorted(heads))}"
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
def on_meta() -> Iterator[None]:
    """Networks that are built inside have shapes but no memory, and draw nothing from the global generator."""
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
        return f"{shapes}: leave width out, or give {got.shape[0]}"
    if name == "pos_embed":
        return f"{shapes}: the file was trained on another number of patches; give its --image-size"
    return f"{shapes}: is --arch right?"


# --- Small things ----------------------------------------------------------------------------------------------------


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(network: nn.Module) -> str:
    """SHA-256 of every weight's name, type, shape and bytes, for weights that no file holds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def few(names: list[str]) -> str:
    """The first three of names that a stranger chose."""
    return ", ".join(printable(name) for name in names[:3]) + (", …" if len(names) > 3 else "")


def printable(text: str, most: int = 80) -> str:
    """What a stranger wrote, such as a name, cut to so many characters and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def first_line(error: BaseException) -> str:
    """First line of a library's message, cut to a readable length."""
    lines = str(error).strip().splitlines()
    return printable(lines[0], 160) if lines else type(error).__name__
