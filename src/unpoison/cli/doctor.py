"""`unpoison doctor`: what is installed, what the machine has, and whether references resolve."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

import unpoison
from unpoison.cli.options import Device, FollowLinks, Json, Quiet, Seed
from unpoison.cli.screen import Screen
from unpoison.errors import UnpoisonError

__all__ = ["app"]

_NEEDED = (
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "numpy",
    "pillow",
    "scikit-image",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "typer",
    "rich",
    "pydantic",
    "jinja2",
    "picklescan",
)
_OPTIONAL = {"transformers": "hf", "open_clip_torch": "open-clip"}  # to the extra that brings it

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Exit codes: 0 all is well · 3 something needed is missing or a reference does not resolve.\n\n"
    "Example: unpoison doctor\n\nExample: unpoison doctor --images images/ --encoder encoder.safetensors"
)
def doctor(
    images: Annotated[
        Path | None, typer.Option(metavar="IMAGES", help="Count what it names; decodes nothing.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(metavar="ENC", help="Load it; shows it no image.")] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a file that does not name its own.")
    ] = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show versions and devices, and check references without running anything."""
    screen = Screen(as_json=as_json, quiet=quiet)
    problems: list[str] = []
    packages = {name: _version(name) for name in _NEEDED}
    problems += [f"{name} is not installed" for name, version in packages.items() if version is None]
    summary: dict[str, Any] = {
        "schema": 1,
        "unpoison": unpoison.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": packages,
        "optional": {name: _version(name) for name in _OPTIONAL},
    }
    checks: dict[str, Callable[[], dict[str, Any] | None]] = {
        "device": lambda: _device(device),
        "images": lambda: _images(images, follow_links),
        "encoder": lambda: _encoder(encoder, arch, device),
    }
    for name, check in checks.items():
        try:
            if (found := check()) is not None:
                summary[name] = found
        except (UnpoisonError, ImportError) as error:
            problems.append(f"{name}: {error}")
    summary["problems"] = problems
    screen.finish(summary, lambda: _text(summary))
    raise typer.Exit(3 if problems else 0)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown" if find_spec(name.replace("-", "_")) else None


def _device(name: str) -> dict[str, Any]:
    import torch

    from unpoison.runtime import choose_device, choose_precision

    chosen = choose_device(name)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    precision = str(choose_precision("auto", chosen)).removeprefix("torch.")
    return {"chosen": str(chosen), "precision": precision, "threads": torch.get_num_threads(), "gpus": gpus}


def _images(images: Path | None, follow_links: bool) -> dict[str, Any] | None:
    if images is None:
        return None
    from unpoison.data.sources import open_source

    source = open_source(images, follow_links=follow_links)
    return {
        "location": str(images),
        "named": len(source.ids),
        "refused": len(source.refused),
        "first": source.ids[0],
    }


def _encoder(encoder: str | None, arch: str | None, device: str) -> dict[str, Any] | None:
    if encoder is None:
        return None
    from unpoison.encoders.checkpoints import load_encoder

    loaded = load_encoder(encoder, arch=arch, device=device)
    preprocessing = loaded.preprocessing
    return {
        "name": loaded.name,
        "image_size": preprocessing.geometry.size,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "preprocessing_assumed": preprocessing.assumed,
    }


def _text(summary: dict[str, Any]) -> str:
    lines = [
        f"unpoison {summary['unpoison']} on Python {summary['python']}, {summary['system']}, {summary['cores']} cores"
    ]
    lines += ["", *(f"  {name:<14} {version or 'missing'}" for name, version in summary["packages"].items())]
    lines += [
        f"  {name:<14} {version or f'not installed, optional: unpoison[{_OPTIONAL[name]}]'}"
        for name, version in summary["optional"].items()
    ]
    for name in ("device", "images", "encoder"):
        if isinstance(found := summary.get(name), dict):
            lines += ["", f"{name}:", *(f"  {key:<22} {value}" for key, value in found.items())]
    lines += ["", *(summary["problems"] or ["All is well."])]
    return "\n".join(lines)
