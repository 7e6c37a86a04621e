"""Weights files: read as tensors only, never as code, and fitted to a network one by one.

Whoever wrote a weights file may be the attacker. Files are read through safetensors or torch's restricted unpickler,
every weight must have a place in the network and every place a weight. Objects of unknown classes lose their class;
what they hold is looked through for tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import logging
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import picklescan.scanner
import safetensors
import torch
from torch import Tensor, nn

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
        *("prototypes", "queue", "queue_ptr", "mask_token", "masked_embed"),
        *("decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"),
    }
)
"""First part of the names of everything that training puts on a backbone and that is no part of it."""


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
    """What torch wrote, by its restricted unpickler: nothing that the file names is imported or run.

    Training scripts store objects of their own classes beside the weights, or a network whole. Such an object is read
    as an `OrderedDict` of its items that has its attributes as attributes.

    Raises:
        CheckpointError: the file would call something else than what makes tensors or plain values, or is damaged.
    """
    try:
        return _load(path, [argparse.Namespace])
    except Exception as error:  # the file's author decides what goes wrong in there, so nothing may escape
        dangerous, unknown = _imports(path)
        why = _why_refused(error, dangerous, unknown)
        if unknown and not dangerous:
            try:
                return _load(path, _placeholders(path))
            except _CallRefusedError as refused:
                why = f"refused, it would call {refused} when loaded; ask for its weights as .safetensors"
            except Exception:
                pass  # said by the first error
        raise CheckpointError(f"{path}: {why}") from error


def _load(path: Path, known: list[Any]) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(known):
        warnings.simplefilter("ignore")  # torch comments on old formats, which is nothing a user can act on
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


class _CallRefusedError(Exception):
    """Its message is the name of what a file would call."""


class _Placeholder(type):
    """What stands for a class or function that a file names: it makes empty objects, and does nothing when called."""

    def __call__(cls, *_arguments: Any) -> Any:
        name = cls.__name__
        if name == "collections.defaultdict":
            return OrderedDict()
        if name.startswith(_VALUES):
            return object.__new__(cls)  # type: ignore[arg-type]  # a class, as all metaclasses' instances
        raise _CallRefusedError(printable(name))


_VALUES = ("numpy.", "pathlib.", "datetime.", "_codecs.encode")
"""How the names begin that files call to make a number, a path or a date: dropped, since no weight is among them."""


def _placeholders(path: Path) -> list[tuple[type, str]]:
    """One for every name that the unpickler would not look up. An object is made by a class without a call."""
    members: dict[str, Any] = {"__new__": lambda *_: OrderedDict(), "__setstate__": lambda *_: None}
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(_Placeholder(name, (), members), name) for name in names]


def _imports(path: Path) -> tuple[list[str], list[str]]:
    """What a pickle would import that can run code, and what is just unknown; found by reading it, not running it."""
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
    dangerous, unknown = (
        sorted({f"{item.module}.{item.name}" for item in found if item.safety == kind})
        for kind in (level.Dangerous, level.Suspicious)
    )
    return dangerous, unknown


def _why_refused(error: Exception, dangerous: list[str], unknown: list[str]) -> str:
    if names := dangerous or unknown:
        meaning = "it would run code when loaded" if dangerous else "it needs more than tensors"
        if any(name.startswith("__torch__.") for name in names):
            meaning = "it is a TorchScript program"
        return f"refused, {meaning} (imports {few(names)}); ask for its weights as .safetensors"
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
    tensors = dict(_flattened(content))
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no named tensors; expected a state dictionary, alone or under {', '.join(_WRAPPERS[:3])}"
        )
    return tensors


def _flattened(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in dictionaries within dictionaries under its dotted name; of a whole pickled module, too."""
    seen: set[int] = set()  # the file's author may nest a dictionary in itself

    def walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor) and name:
            yield name, value
        if not isinstance(value, Mapping) or id(value) in seen or depth > _DEEPEST:
            return
        seen.add(id(value))
        inside = f"{name}." if name else ""
        for key, item in value.items():
            if isinstance(key, str):
                yield from walk(item, inside + key, depth + 1)
        for key, item in getattr(value, "__dict__", {}).items():
            structural = key in ("_modules", "_parameters", "_buffers")
            yield from walk(item, name if structural else f"{inside}{key}", depth + 1)

    return walk(content, "", 0)


_DEEPEST = 40
"""Levels of dictionaries that are looked into; a module within modules takes two of them."""


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
    below = _by_prefix(unwrapped)
    layouts = [(prefix, layout) for prefix, layout in _LAYOUTS if prefix in below]
    known = {prefix for prefix, _ in layouts}
    layouts += [(prefix, printable(prefix.removesuffix("."))) for prefix in below if prefix not in known]
    best: tuple[int, dict[str, Tensor], str] = (-1, {}, "")
    for prefix, layout in layouts:
        if len(below[prefix]) <= best[0]:
            continue
        for numbers in _NUMBERED:
            renamed = {_renamed(name, numbers, expected): tensor for name, tensor in below[prefix].items()}
            fits = sum(name in expected for name in renamed)
            if fits > best[0]:
                best = (fits, renamed, layout)
    return best[1], best[2]


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What lies below every prefix, the empty one first; in one pass, whatever names a stranger chose."""
    below: dict[str, dict[str, Tensor]] = {"": tensors}
    for name, tensor in tensors.items():
        start = 0
        for _ in range(_DEEPEST_PREFIX):
            start = name.find(".", start) + 1
            if start == 0:
                break
            below.setdefault(name[:start], {})[name[start:]] = tensor
    return below


_DEEPEST_PREFIX = 12
"""Parts of a name that may come before the network's own."""


def _without_wrappers(name: str) -> str:
    """A weight's name without what DataParallel and torch.compile put in front, at any of the first levels.

    >>> _without_wrappers("module.encoder_q.conv1.weight"), _without_wrappers("student.module.backbone.norm.bias")
    ('encoder_q.conv1.weight', 'student.backbone.norm.bias')
    """
    parts = name.split(".")
    return ".".join([p for p in parts[:3] if p not in ("module", "_orig_mod")] + parts[3:])


def _renamed(name: str, numbers: dict[str, str], expected: Mapping[str, Tensor]) -> str:
    first, dot, rest = name.partition(".")
    name = numbers.get(first, first) + dot + rest
    # The ResNets that are written for CIFAR call it so.
    return name if name in expected else name.replace(".shortcut.", ".downsample.")


def _explain_shapes(name: str, got: Tensor, expected: Tensor, arch: str) -> str:
    shapes = f"{name} is {tuple(got.shape)}, but {arch} takes {tuple(expected.shape)}"
    if got.ndim == expected.ndim == 4 and got.shape[1] == expected.shape[1] == 3:  # the layer that reads RGB
        ours, theirs = expected.shape[-1], got.shape[-1]
        if ours != theirs:
            return (
                f"{shapes}: its first layer reads {theirs}×{theirs} pixels at once, the network's {ours}×{ours}; give "
                "the --image-size that the file was trained for, or another --arch"
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
