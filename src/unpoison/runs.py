"""The folder of a run: what decides resuming, the stage cache, and the files that people and programs read.

A stage that is done is a file that exists. Files are written under another name and renamed, so that a kill at any
point leaves either the whole stage or nothing of it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unpoison.caches import RUN_MARK
from unpoison.data.export import write_json_atomically, write_lines_atomically
from unpoison.errors import ConfigError, DataError
from unpoison.records import BenignPattern, Box, Evidence, ScanResult, TriggerFinding

__all__ = ["MemoryRun", "RunFolder", "Stages", "clear_run", "load_result"]

_OURS = (
    "run.json",
    "verdict.json",
    "findings.parquet",
    "clean.txt",
    "flagged.txt",
    "evidence.safetensors",
    "trigger.png",
    "trigger.safetensors",
    "report.html",
)
_OUR_FOLDERS = ("cache", "triggers", "benign")
_OTHER_FILES = ("encoder.safetensors", "detector.safetensors", "report.sarif", "report.txt", "log.txt")


class Stages:
    """Named results of a run, and what each one cost. This one keeps nothing; `RunFolder` keeps them on disk."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.passes = 0
        self.stage_passes: dict[str, int] = {}

    def stage(
        self, name: str, compute: Callable[[], dict[str, Tensor]], *, passes: Callable[[], int] = lambda: 0
    ) -> dict[str, Tensor]:
        """The tensors of a stage: from the cache, or computed and then kept.

        Args:
            name: unique within the run.
            compute: gives the tensors.
            passes: counts encoder passes so far; the difference is what the stage cost.
        """
        tensors, seconds, spent = self._find(name) or self._timed(name, compute, passes)
        group = name.split("-")[0]
        self.seconds[group] = self.seconds.get(group, 0.0) + seconds
        self.passes += spent
        self.stage_passes[group] = self.stage_passes.get(group, 0) + spent
        return tensors

    def _timed(
        self, name: str, compute: Callable[[], dict[str, Tensor]], passes: Callable[[], int]
    ) -> tuple[dict[str, Tensor], float, int]:
        before, start = passes(), time.perf_counter()
        tensors = compute()
        seconds, spent = time.perf_counter() - start, passes() - before
        self._keep(name, tensors, seconds, spent)
        return tensors, seconds, spent

    def _find(self, name: str) -> tuple[dict[str, Tensor], float, int] | None:
        return None

    def _keep(self, name: str, tensors: dict[str, Tensor], seconds: float, spent: int) -> None:
        pass


class MemoryRun(Stages):
    """A run without a folder."""


def clear_run(folder: Path) -> None:
    """Remove the files that runs write, and nothing else; the log stays."""
    for name in (*_OURS, *_OTHER_FILES):
        if name != "log.txt":
            (folder / name).unlink(missing_ok=True)
    for name in _OUR_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


class RunFolder(Stages):
    """A run that survives a kill.

    Args:
        path: the folder; made if it is missing.
        settings: everything that changes the result; a folder with other settings is refused.
        fresh: start over. Only files that runs write are removed, and only from a folder that holds a run.

    Raises:
        ConfigError: the folder holds something else, or a run with other settings; nothing is changed then.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, fresh: bool = False) -> None:
        super().__init__()
        self.path = path
        self.cache = path / "cache"
        settings = json.loads(json.dumps({RUN_MARK: 1, **settings}))  # as it will be read back
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{path}: is a file; --out names a folder")
            # A log may be there already: the command line opens it before it knows whether the run is a new one.
            held = [p for p in path.iterdir() if p.name != "log.txt"] if path.exists() else []
            if held:
                earlier = self._earlier()
                if fresh:
                    self._clear()
                else:
                    self._refuse_difference(earlier, settings)
            self._begun_here = not held or fresh
            self._made_here = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            write_json_atomically(path / "run.json", settings)
            self.cache.mkdir(exist_ok=True)
            for left in self.cache.glob("*.tmp"):  # of a killed run
                left.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}; choose another --out") from error

    @property
    def complete(self) -> bool:
        """Whether the run has come to its verdict."""
        return (self.path / "verdict.json").exists()

    def forget(self) -> None:
        """Remove a run that was refused before its first stage, so that it does not stand in the way of the next."""
        if self._begun_here:
            self._clear()
            if self._made_here and not any(self.path.iterdir()):
                self.path.rmdir()

    def _earlier(self) -> dict[str, Any]:
        try:
            earlier = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.path}: exists and holds no unpoison run; choose another --out, nothing was changed"
            ) from error
        if not isinstance(earlier, dict) or RUN_MARK not in earlier:
            raise ConfigError(
                f"{self.path}: its run.json is not of an unpoison run; choose another --out, nothing was changed"
            )
        return earlier

    def _refuse_difference(self, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
        was, now = _flat(earlier), _flat(settings)
        differing = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
        if differing:
            shown = "; ".join(f"{key} was {was.get(key)!r}, now {now.get(key)!r}" for key in differing[:3])
            more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
            raise ConfigError(
                f"{self.path}: holds a run with other settings: {shown}{more}; choose another --out, "
                "or --fresh to start over"
            )

    def _clear(self) -> None:
        clear_run(self.path)

    def _find(self, name: str) -> tuple[dict[str, Tensor], float, int] | None:
        path = self.cache / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, float(meta["seconds"]), int(meta["passes"])
        except (SafetensorError, OSError, KeyError, ValueError):
            path.unlink(missing_ok=True)  # damaged by something other than a kill: compute it again
            return None

    def _keep(self, name: str, tensors: dict[str, Tensor], seconds: float, spent: int) -> None:
        path = self.cache / f"{name}.safetensors"
        _save_atomically(tensors, path, {"seconds": repr(seconds), "passes": str(spent)})

    def save(self, result: ScanResult) -> None:
        """Write the run's files; verdict.json last, since it says that the run is complete."""
        findings = result.findings
        partial = self.path / f"findings.parquet.{os.getpid()}.tmp"
        findings.to_parquet(partial, index=False)
        os.replace(partial, self.path / "findings.parquet")
        kept = findings.loc[~findings["flagged"] & findings["skip_reason"].isna(), "id"]
        write_lines_atomically(self.path / "clean.txt", kept)
        write_lines_atomically(self.path / "flagged.txt", result.flagged)
        for number in range(1, len(result.triggers) + 1):
            carriers = findings.loc[findings["trigger"] == number, "id"]
            write_lines_atomically(self.path / "triggers" / f"trigger-{number}.txt", carriers)
        tensors = {"pixels": result.evidence.pixels, "attention": result.evidence.attention}
        for number, trigger in enumerate(result.triggers):
            tensors[f"patches-{number}"] = trigger.patches
        for number, pattern in enumerate(result.benign_patterns):
            tensors[f"benign-{number}"] = pattern.patches
        words = {
            "ids": list(result.evidence.ids),
            "triggers": [
                {
                    "p_value": t.p_value,
                    "source_ids": list(t.source_ids),
                    "boxes": [[b.x, b.y, b.w, b.h] for b in t.boxes],
                }
                for t in result.triggers
            ],
            "benign_patterns": [
                {"source_ids": list(p.source_ids), "boxes": [[b.x, b.y, b.w, b.h] for b in p.boxes]}
                for p in result.benign_patterns
            ],
        }
        _save_atomically(tensors, self.path / "evidence.safetensors", {"words": json.dumps(words)})
        write_json_atomically(self.path / "verdict.json", result.summary)


def load_result(folder: str | Path) -> ScanResult:
    """The result of a finished run.

    Args:
        folder: RUN.

    Raises:
        ConfigError: no such folder, or no finished run in it.
        DataError: its files are damaged.
    """
    folder = Path(folder)
    if not (folder / "verdict.json").is_file():
        raise ConfigError(
            f"{folder}: holds no finished run (no verdict.json); the scan's own command resumes it"
        )
    try:
        summary = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
        findings = pandas.read_parquet(folder / "findings.parquet")
        with safe_open(folder / "evidence.safetensors", "pt") as file:
            words = json.loads((file.metadata() or {})["words"])
            evidence = Evidence(tuple(words["ids"]), file.get_tensor("pixels"), file.get_tensor("attention"))
            triggers = tuple(
                TriggerFinding(
                    target_cluster=said["target_cluster"],
                    target_clusters=tuple(said["target_clusters"]),
                    flip_rate=said["flip_rate"],
                    control_rate=said["control_rate"],
                    p_value=more["p_value"],
                    n_sources=said["n_sources"],
                    source_ids=tuple(more["source_ids"]),
                    boxes=tuple(Box(*box) for box in more["boxes"]),
                    patches=file.get_tensor(f"patches-{number}"),
                    image=said["image"],
                )
                for number, (said, more) in enumerate(
                    zip(summary["triggers"], words["triggers"], strict=True)
                )
            )
            # Runs of earlier versions have none.
            benign = zip(summary.get("benign_patterns", ()), words.get("benign_patterns", ()), strict=True)
            patterns = tuple(
                BenignPattern(
                    flip_rate=said["flip_rate"],
                    control_rate=said["control_rate"],
                    steers=said["steers"],
                    concentration=said["concentration"],
                    n_sources=said["n_sources"],
                    source_ids=tuple(more["source_ids"]),
                    boxes=tuple(Box(*box) for box in more["boxes"]),
                    patches=file.get_tensor(f"benign-{number}"),
                    image=said["image"],
                )
                for number, (said, more) in enumerate(benign)
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if (folder / "trigger.safetensors").exists():
            raise ConfigError(
                f"{folder}: holds an audit and no scan; load it with unpoison.load_audit"
            ) from error
        raise DataError(
            f"{folder}: a file of the run is missing or damaged; scan again with --fresh"
        ) from error
    return ScanResult(summary["verdict"], findings, triggers, evidence, summary, patterns)


def _save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.touch()
    usual = stat.S_IMODE(partial.stat().st_mode)
    save_file(
        {
            k: v.contiguous() if v.is_contiguous() else v.clone(memory_format=torch.contiguous_format)
            for k, v in tensors.items()
        },
        partial,
        metadata,
    )
    partial.chmod(usual)  # not the owner's alone, as safetensors has it
    os.replace(partial, path)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
