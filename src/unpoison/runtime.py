"""Device, precision and randomness, each chosen once and in one place."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

import unpoison
from unpoison.errors import ConfigError

__all__ = [
    "Progress",
    "autocast",
    "choose_device",
    "choose_precision",
    "library_versions",
    "seeded",
    "silent",
    "stage_generator",
]

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total) by every long loop; `stage` is a short phrase for people."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that says nothing."""


def stage_generator(seed: int, stage: str) -> torch.Generator:
    """CPU generator that depends on (seed, stage) alone, so that adding a stage never shifts another's numbers.

    >>> a, b = stage_generator(0, "kmeans"), stage_generator(0, "kmeans")
    >>> bool(torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b)))
    True
    """
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def seeded(seed: int, stage: str) -> Iterator[None]:
    """Seed torch's global generator for code that offers no other (layer initialisation); restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_generator(seed, stage).initial_seed())
        yield


def choose_device(name: str = "auto") -> torch.device:
    """The device that `--device` names.

    Args:
        name: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: the name is unknown, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not (name == "cuda" or (name.startswith("cuda:") and name[5:].isdigit())):
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this machine has no usable GPU; use --device cpu")
    return torch.device(name)


@cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them autocast is emulated and slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype in which networks run; assignments are always float32.

    Args:
        name: `auto` (bfloat16 where the hardware multiplies it), `fp32` or `bf16`.
        device: where the network runs.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision {name!r}: expected auto, fp32 or bf16")
    if name == "auto":
        native = _cpu_multiplies_bf16() if device.type == "cpu" else torch.cuda.is_bf16_supported()
        name = "bf16" if native else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The autocast context for `precision`; does nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def library_versions() -> dict[str, str]:
    """Versions of Python, unpoison and its libraries, for what a run leaves behind; needs no installed package."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")}
    return {"python": platform.python_version(), "unpoison": unpoison.__version__, **libraries}
