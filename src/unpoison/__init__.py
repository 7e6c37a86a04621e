"""Find backdoors in self-supervised vision models and in the unlabelled images that train them.

    images    open_source("images/")       a folder, parquet or tar shards, or a list of paths
    → pixels  load_images(source, ...)     decoded once; what cannot be read is listed with its reason
    → encoder load_encoder("timm:resnet18"), or pretrain(pixels, ...) on the images themselves
    → features, clusters                   images that the encoder takes for alike
    → trigger candidates                   where hiding a window changes the encoder's mind
    → poison scores                        pasted elsewhere, does the window move other images too?
    → verdict                              confirmed on images the search never saw, against shuffled controls
    → flagged, clean.txt, report.html      only when the verdict is "poisoned"
    → clean("images/", "run", "cleaned")   the images that are left, copied and compared

In short: ``unpoison.scan("images/", encoder="timm:resnet18", out="run").verdict``; and of an encoder that somebody else
trained, ``unpoison.audit("encoder.safetensors", out="run").verdict``. Importing this module does no work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unpoison.audit.decree import DecreeConfig
    from unpoison.audit.result import AuditResult
    from unpoison.audit_pipeline import audit, load_audit
    from unpoison.data.load import load_images
    from unpoison.data.sources import open_source
    from unpoison.encoders.checkpoints import load_encoder, save_encoder
    from unpoison.encoders.encoder import Encoder, Preprocessing
    from unpoison.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        NothingToScanError,
        NoVerdictError,
        ShapeError,
        UnpoisonError,
    )
    from unpoison.pipeline import scan
    from unpoison.pretrain.loop import PretrainConfig, TrainedEncoder, pretrain
    from unpoison.records import Box, Geometry, ImageSet, ScanResult, Skipped, TriggerFinding
    from unpoison.repair.distillation import DistillConfig, distill
    from unpoison.repair.filtering import Cleaned, clean
    from unpoison.runs import load_result as load
    from unpoison.scan.config import ScanConfig

__version__ = "0.1.0"

__all__ = [
    "AuditResult",
    "Box",
    "CheckpointError",
    "Cleaned",
    "ConfigError",
    "DataError",
    "DecreeConfig",
    "DistillConfig",
    "Encoder",
    "Geometry",
    "ImageSet",
    "NoVerdictError",
    "NothingToScanError",
    "Preprocessing",
    "PretrainConfig",
    "ScanConfig",
    "ScanResult",
    "ShapeError",
    "Skipped",
    "TrainedEncoder",
    "TriggerFinding",
    "UnpoisonError",
    "__version__",
    "audit",
    "clean",
    "distill",
    "load",
    "load_audit",
    "load_encoder",
    "load_images",
    "open_source",
    "pretrain",
    "save_encoder",
    "scan",
]

_HOMES = {
    "audit.decree": ("DecreeConfig",),
    "audit.result": ("AuditResult",),
    "audit_pipeline": ("audit", "load_audit"),
    "data.load": ("load_images",),
    "data.sources": ("open_source",),
    "encoders.checkpoints": ("load_encoder", "save_encoder"),
    "encoders.encoder": ("Encoder", "Preprocessing"),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "NoVerdictError",
        "NothingToScanError",
        "ShapeError",
        "UnpoisonError",
    ),
    "pipeline": ("scan",),
    "pretrain.loop": ("PretrainConfig", "TrainedEncoder", "pretrain"),
    "records": ("Box", "Geometry", "ImageSet", "ScanResult", "Skipped", "TriggerFinding"),
    "repair.distillation": ("DistillConfig", "distill"),
    "repair.filtering": ("Cleaned", "clean"),
    "runs": ("load_result",),
    "scan.config": ("ScanConfig",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_SHORTER = {"load": "load_result"}  # public name to the name at home


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import unpoison` does not import torch."""
    inner = _SHORTER.get(name, name)
    if name not in __all__ or inner not in _HOME_OF:
        raise AttributeError(f"module 'unpoison' has no attribute {name!r}")
    value = getattr(import_module(f"unpoison.{_HOME_OF[inner]}"), inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
