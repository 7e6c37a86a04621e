"""One cell of a study: plant, train, scan, remove, train again, measure; everything costly is kept and shared.

A cell is one file, written in one step, whose name is a digest of everything that its numbers depend on: the bytes of
the images, the attack with its patterns, recipe, settings of the scan, evaluation, seed, version. So are encoders and
scans, which is how cells share them. Device, threads and library versions are noted, not part of the name, as for runs:
they change cost and rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

import unpoison
from unpoison.attack.blended import BlendedConfig
from unpoison.attack.plan import Plan, Trigger
from unpoison.attack.ssl_backdoor import AttackConfig as PlannedAttack
from unpoison.attack.ssl_backdoor import PatchAttackConfig, poison
from unpoison.benchmark.images import Chosen, Split, choose, data_root, digest, first_of_each_class, load
from unpoison.benchmark.measures import FALSE_POSITIVE_RATES, MEASURES, TOP
from unpoison.benchmark.task import AttackConfig, Cell, DataConfig, DefenceConfig, Task
from unpoison.data.export import write_json_atomically
from unpoison.encoders.checkpoints import load_encoder, save_encoder
from unpoison.encoders.encoder import Encoder
from unpoison.errors import ConfigError
from unpoison.evaluate.attack_success import evaluate_encoder
from unpoison.evaluate.scan_quality import score_scan
from unpoison.evaluate.truth import Truth, read_truth
from unpoison.pipeline import scan
from unpoison.pretrain.loop import PretrainConfig, TrainedEncoder, pretrain
from unpoison.records import ImageSet, ScanResult
from unpoison.repair.distillation import DistillConfig, distill
from unpoison.runtime import Progress, library_versions, silent

__all__ = ["Bench", "Row", "machine", "measure_scan", "probe_rows", "source_digest"]

CELL_SCHEMA = 1
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Planted:
    """A training set after the attack."""

    key: str
    images: ImageSet
    plan: Plan


class Bench:
    """Computes cells of one task, and keeps what they share.

    Args:
        task: what to compute.
        store: folder of `cells/`, `encoders/`, `scans/` and `data/`; several tasks may share one.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.
        fresh: forget finished cells and scans, each once; trained encoders are kept.
    """

    def __init__(
        self, task: Task, store: Path, *, device: str = "auto", precision: str = "auto", fresh: bool = False
    ) -> None:
        self.task = task
        self.store = store
        self.device = device
        self.precision = precision
        self.fresh = fresh
        self._renewed: set[str] = set()
        self._chosen: dict[str, Chosen] = {}
        self._loaded: tuple[str, tuple[Split, Split]] | None = None
        self._planted: tuple[str, _Planted] | None = None

    # ── what a cell depends on ──

    def chosen(self, cell: Cell) -> Chosen:
        """The images of a cell, by id; nothing is decoded."""
        if cell.data not in self._chosen:
            self._chosen[cell.data] = choose(self._data(cell), self.task.root)
        return self._chosen[cell.data]

    def key(self, cell: Cell, *, may_decode: bool = True) -> str | None:
        """The digest of everything that a cell depends on; None where that would mean decoding the images first."""
        content = self._content(cell, may_decode)
        if content is None:
            return None
        return digest(
            {
                "schema": CELL_SCHEMA,
                "version": unpoison.__version__,
                "images": content,
                "attack": self._attack_key(cell),
                "victim": asdict(self._victim(cell).resolve()),
                "defence": asdict(self._defence(cell)),
                "evaluate": asdict(self.task.evaluate),
                "seed": cell.seed,
            }
        )

    def find(self, key: str | None) -> Row | None:
        """A finished cell; None when it is not there, damaged, or to be computed afresh."""
        if key is None or (self.fresh and key not in self._renewed):
            return None
        try:
            row = json.loads((self.store / "cells" / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return row if isinstance(row, dict) and row.get("schema") == CELL_SCHEMA else None

    def attack(self, cell: Cell) -> PlannedAttack:
        """The attack of a cell, with the files of its triggers found."""
        config: AttackConfig = self.task.axes["attack"][cell.attack].config
        planned = config.planned(cell.seed, len(self.chosen(cell).class_names), self._data(cell).size)
        if isinstance(planned, PatchAttackConfig):
            return replace(planned, triggers=tuple(self._trigger_file(name) for name in planned.triggers))
        if isinstance(planned, BlendedConfig):
            return replace(planned, trigger=self._trigger_file(planned.trigger))
        return planned

    def _trigger_file(self, name: str) -> str:
        if name.startswith("seed:"):
            return name
        for folder in (self.task.root, data_root()):
            if (folder / name).is_file():
                return str(folder / name)
        raise ConfigError(
            f"trigger {name!r}: expected seed:N, or an image file beside the task file or below UNPOISON_DATA"
        )

    def _attack_key(self, cell: Cell) -> Row:
        return self._described(
            cell, lambda n: n if n.startswith("seed:") else hashlib.sha256(Path(n).read_bytes()).hexdigest()
        )

    def _described(self, cell: Cell, of_trigger: Callable[[str], str]) -> Row:
        """The settings of a cell's attack, with something in place of the files of its triggers."""
        attack = self.attack(cell)
        if isinstance(attack, PatchAttackConfig):
            return {**asdict(attack), "triggers": [of_trigger(name) for name in attack.triggers]}
        pictures = {"trigger": of_trigger(attack.trigger)} if isinstance(attack, BlendedConfig) else {}
        return {"method": attack.method, **asdict(attack), **pictures}

    def _content(self, cell: Cell, may_decode: bool) -> list[str] | None:
        """What the bytes of training and test images are; noted, so that they are decoded once per change of files."""
        note = self.store / "data" / f"{self.chosen(cell).signature}.json"
        try:
            return [str(part) for part in json.loads(note.read_text(encoding="utf-8"))]
        except (OSError, ValueError):
            if not may_decode:
                return None
        content = [_content_key(split, self._data(cell).resize) for split in self._splits(cell, silent)]
        write_json_atomically(note, content)
        return content

    def _data(self, cell: Cell) -> DataConfig:
        config: DataConfig = self.task.axes["data"][cell.data].config
        return config

    def _victim(self, cell: Cell) -> PretrainConfig:
        config: PretrainConfig = self.task.axes["victim"][cell.victim].config
        return config

    def _defence(self, cell: Cell) -> DefenceConfig:
        config: DefenceConfig = self.task.axes["defence"][cell.defence].config
        return config

    # ── computing one ──

    def compute(self, cell: Cell, *, progress: Progress = silent) -> Row:
        """Measure a cell and keep it.

        Raises:
            UnpoisonError: as the stages do: a trigger that does not fit, training that collapses, and so on.
        """
        started = time.perf_counter()
        key = self.key(cell)
        assert key is not None, "the images may be decoded"
        seconds: dict[str, float] = {}
        measurements = self._measure(cell, seconds, progress)
        row = {
            "schema": CELL_SCHEMA,
            "key": key,
            "settings": {
                "data": asdict(self._data(cell)),
                "attack": self._described(cell, lambda name: Path(name).name),
                "victim": asdict(self._victim(cell).resolve()),
                "defence": asdict(self._defence(cell)),
                "seed": cell.seed,
            },
            "measurements": measurements,
            "seconds": {**seconds, "cell": round(time.perf_counter() - started, 1)},
            "machine": machine(self.device),
            "versions": library_versions(),
            "source": source_digest(),
        }
        write_json_atomically(self.store / "cells" / f"{key}.json", row)
        self._renewed.add(key)
        return row

    def _measure(self, cell: Cell, seconds: dict[str, float], progress: Progress) -> list[Row]:
        defence, recipe = self._defence(cell), self._victim(cell)
        measured = replace(recipe, i_cutmix=True) if defence.i_cutmix else recipe
        train, test = self._splits(cell, progress)
        triggers = self.attack(cell).make_triggers(train.class_names)
        if defence.kind == "clean-trained":
            control = self._train(
                self._train_key(cell, train), train.images, measured, cell.seed, seconds, progress
            )
            return self._probe(control, train, test, triggers, cell, seconds, progress)
        planted = self._plant(cell, train)
        if defence.kind == "none":
            encoder = self._train(planted.key, planted.images, measured, cell.seed, seconds, progress)
            return self._probe(encoder, train, test, triggers, cell, seconds, progress)
        victim = self._train(planted.key, planted.images, recipe, cell.seed, seconds, progress)
        if defence.kind == "distill":
            content = self._train_key(cell, train)
            config = defence.student(recipe)
            encoder = self._train(content, train.images, config, cell.seed, seconds, progress, teacher=victim)
            return self._probe(encoder, train, test, triggers, cell, seconds, progress)
        result = self._scan(planted.images, victim, defence, cell.seed, progress)
        seconds["scan"] = float(result.summary["seconds"])
        rows = measure_scan(result, planted.plan, victim)
        if defence.retrain:
            flagged = set(result.flagged)
            kept = [row for row, id_ in enumerate(planted.images.ids) if id_ not in flagged]
            left = digest([planted.key, "without", sorted(flagged)]) if flagged else planted.key
            cleaned = replace(planted.images.select(kept), fingerprint=left)
            encoder = self._train(left, cleaned, measured, cell.seed, seconds, progress)
            rows += self._probe(encoder, train, test, triggers, cell, seconds, progress)
        return rows

    def _splits(self, cell: Cell, progress: Progress) -> tuple[Split, Split]:
        if self._loaded is None or self._loaded[0] != cell.data:
            self._planted = None
            self._loaded = (cell.data, load(self._data(cell), self.task.root, progress=progress))
        return self._loaded[1]

    def _train_key(self, cell: Cell, train: Split) -> str:
        return _content_key(train, self._data(cell).resize)

    def _plant(self, cell: Cell, train: Split) -> _Planted:
        key = digest([self._train_key(cell, train), self._attack_key(cell), cell.seed])
        if self._planted is None or self._planted[0] != key:
            self._planted = None  # before the next one is made: two copies of a large set need not fit
            images, plan = poison(train.images, train.labels, train.class_names, self.attack(cell), cell.seed)
            self._planted = (key, _Planted(key, replace(images, fingerprint=key), plan))
        return self._planted[1]

    def _train(
        self,
        content: str,
        images: ImageSet,
        recipe: PretrainConfig,
        seed: int,
        seconds: dict[str, float],
        progress: Progress,
        *,
        teacher: Encoder | None = None,
    ) -> Encoder:
        """An encoder, from the store when it is there; its training resumes after a kill."""
        of = content if teacher is None else digest([content, "distilled from", teacher.fingerprint])
        key = self.encoder_key(of, recipe, seed)
        path = self.store / "encoders" / f"{key}.safetensors"
        note = path.with_suffix(".json")
        if not (path.exists() and note.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            shown, state = replace(images, fingerprint=content), path.with_suffix(".training")

            def train() -> TrainedEncoder:
                if teacher is None:
                    return pretrain(
                        shown,
                        recipe,
                        seed=seed,
                        device=self.device,
                        precision=self.precision,
                        checkpoint=state,
                        progress=progress,
                    )
                assert isinstance(recipe, DistillConfig), "a student has settings of its own"
                return distill(teacher, shown, recipe, seed=seed, checkpoint=state, progress=progress)

            try:
                trained = train()
            except ConfigError:
                if not state.exists():
                    raise
                state.unlink()  # The key names the whole training: another version of unpoison left this.
                trained = train()
            origin = None if teacher is None else {"weights": teacher.fingerprint}
            save_encoder(trained, path, distilled=origin)
            write_json_atomically(
                note,
                {"seconds": round(time.perf_counter() - started, 1), "losses": list(trained.losses)},
            )
        seconds["train"] = seconds.get("train", 0.0) + json.loads(note.read_text(encoding="utf-8"))["seconds"]
        return load_encoder(path, device=self.device, precision=self.precision)

    @staticmethod
    def encoder_key(content: str, recipe: PretrainConfig, seed: int) -> str:
        """What an encoder depends on."""
        return digest(
            {"schema": CELL_SCHEMA, "images": content, "config": asdict(recipe.resolve()), "seed": seed}
        )

    def _scan(
        self, images: ImageSet, encoder: Encoder, defence: DefenceConfig, seed: int, progress: Progress
    ) -> ScanResult:
        """A scan in a run folder of its own: it resumes after a kill, and its report can be read."""
        key = digest(
            {
                "version": unpoison.__version__,
                "images": images.fingerprint,
                "encoder": encoder.fingerprint,
                "config": asdict(defence.scan),
                "seed": seed,
            }
        )
        fresh = self.fresh and key not in self._renewed
        result = scan(
            images,
            encoder,
            config=defence.scan,
            out=self.store / "scans" / key,
            seed=seed,
            device=self.device,
            precision=self.precision,
            fresh=fresh,
            progress=progress,
        )
        self._renewed.add(key)
        return result

    def _probe(
        self,
        encoder: Encoder,
        train: Split,
        test: Split,
        triggers: tuple[Trigger, ...],
        cell: Cell,
        seconds: dict[str, float],
        progress: Progress,
    ) -> list[Row]:
        if not self.task.evaluate.encoders:
            return []
        started = time.perf_counter()
        known = _labelled_part(train, self.task.evaluate.labelled)
        rows = probe_rows(encoder, known, test, triggers, seed=cell.seed, progress=progress)
        seconds["evaluate"] = round(time.perf_counter() - started, 1)
        return rows


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def probe_rows(
    encoder: Encoder,
    train: Split,
    test: Split,
    triggers: tuple[Trigger, ...],
    *,
    seed: int,
    progress: Progress = silent,
) -> list[Row]:
    """An encoder under both probes, one row per measure, probe and trigger.

    Args:
        encoder: to be measured.
        train: clean labelled images that the probes learn from.
        test: other images.
        triggers: each with its target.
        seed: of the linear probe and of where the triggers lie.
        progress: called after every batch.
    """
    report = evaluate_encoder(
        encoder,
        train.images,
        train.labels,
        test.images,
        test.labels,
        triggers=triggers,
        n_classes=len(train.class_names),
        seed=seed,
        progress=progress,
    )
    rows = []
    for probe in report.probes:
        for number, attack in enumerate(probe.attacks):
            values = {
                "accuracy": attack.clean.accuracy,
                "patched_accuracy": attack.patched.accuracy,
                "attack_success": attack.patched.attack_success,
                "untriggered_rate": attack.untriggered_rate,
                "false_positives": attack.patched.false_positives,
                "untriggered_false_positives": attack.clean.false_positives,
            }
            rows += [_row(name, value, probe=probe.probe, trigger=number) for name, value in values.items()]
    return rows


def measure_scan(result: ScanResult, plan: Plan, encoder: Encoder) -> list[Row]:
    """A scan beside the answer key, one row per measure; the truth comes in only here."""
    ids = [str(id_) for id_ in result.findings["id"]]
    truth = read_truth(plan, ids, encoder.preprocessing.geometry)
    quality = score_scan(result.findings, truth, ks=TOP)
    values: Row = {
        "removed": quality.removed,
        "planted": quality.n_poisoned,
        "recall": _percent(quality.recall),
        "precision": _percent(quality.precision),
        "f1": _percent(quality.f1),
        "said_poisoned": 100.0 * (result.verdict == "poisoned"),
        "triggers_found": len(result.triggers),
        "scored": quality.n_scored,
        "scored_poisoned": quality.n_scored_poisoned,
        "encoder_passes": result.summary["encoder_passes"],
        "score_auc": _area(result.findings, "poison_score", truth),
        "filter_auc": _area(result.findings, "poison_probability", truth),
    }
    rows = [_row(name, value) for name, value in values.items()]
    for top in quality.top:
        if top.n >= top.k:  # the share among fewer would be another measure under the same name
            rows += [
                _row("top_accuracy", _percent(top.accuracy), at=top.k),
                _row("window_accuracy", _percent(top.window_accuracy), at=top.k),
                _row("iou", top.iou, at=top.k),
                _row("catch_rate", top.catch_rate, at=top.k),
            ]
    rows += _by_trigger(result, truth, len(plan.triggers))
    for rate, found in _operating_points(result.findings, truth):
        rows.append(_row("true_positive_rate", 100 * found, at=rate))
    return rows


def _by_trigger(result: ScanResult, truth: Truth, n_triggers: int) -> list[Row]:
    """Each planted trigger laid beside the findings whose sources carry it."""
    carries = dict(zip(map(str, result.findings["id"]), truth.trigger.tolist(), strict=True))
    shows = [
        Counter(carries[source] for source in finding.source_ids).most_common(1)[0][0]
        for finding in result.triggers
    ]
    flagged = torch.tensor(result.findings["flagged"].to_numpy(dtype="bool", na_value=False).tolist())
    listed = result.findings["trigger"]
    rows = []
    for number in range(n_triggers):
        mine = truth.trigger == number
        own = [place for place, shown in enumerate(shows, start=1) if shown == number]
        caught = mine & flagged
        on_list = torch.tensor(listed.isin(own).to_numpy(dtype="bool").tolist())
        values = {
            "trigger_recall": _percent(_share(flagged, mine)),
            "trigger_findings": len(own),
            "trigger_listed": _percent(_share(on_list, caught)),
        }
        rows += [_row(name, value, trigger=number) for name, value in values.items()]
    return rows


def _share(found: Tensor, among: Tensor) -> float | None:
    return float(found[among].float().mean()) if bool(among.any()) else None


def _row(
    measure: str,
    value: float | None,
    *,
    probe: str | None = None,
    trigger: int | None = None,
    at: float | None = None,
) -> Row:
    return {
        "measure": measure,
        "probe": probe,
        "trigger": trigger,
        "at": None if at is None else float(at),
        "value": None if value is None else float(value),
        "unit": MEASURES[measure].unit,
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _known(findings: pd.DataFrame, column: str, truth: Truth) -> tuple[Any, Any] | None:
    """Truth and score of the images that have one; None unless both kinds are among them."""
    values = findings[column].to_numpy(dtype="float64", na_value=float("nan"))
    there = ~np.isnan(values)
    bad = truth.poisoned.numpy()[there]
    return (bad, values[there]) if 0 < bad.sum() < len(bad) else None


def _area(findings: pd.DataFrame, column: str, truth: Truth) -> float | None:
    known = _known(findings, column, truth)
    return None if known is None else float(roc_auc_score(*known))


def _operating_points(findings: pd.DataFrame, truth: Truth) -> list[tuple[float, float]]:
    """True-positive rate of the filter at fixed false-positive rates; nothing where no filter was trained."""
    known = _known(findings, "poison_probability", truth)
    if known is None:
        return []
    false_rates, true_rates, _ = roc_curve(*known)
    # The highest true rate that a false rate of at most so much buys: no interpolation, which flatters small sets.
    return [(rate, float(true_rates[false_rates <= rate].max())) for rate in FALSE_POSITIVE_RATES]


def _labelled_part(split: Split, share: float) -> Split:
    """The same share of every class, chosen by a hash of the id alone."""
    if share == 1:
        return split
    order = sorted(
        range(len(split.images)),
        key=lambda row: hashlib.sha256(f"labelled/{split.images.ids[row]}".encode()).digest(),
    )
    labels = dict(zip(split.images.ids, split.labels.tolist(), strict=True))
    wanted: set[str] = set()
    for label in sorted(set(labels.values())):
        members = [id_ for id_ in (split.images.ids[row] for row in order) if labels[id_] == label]
        most = max(1, int(share * len(members)))
        wanted.update(first_of_each_class(members, labels, {label}, most)[0])
    rows = [row for row, id_ in enumerate(split.images.ids) if id_ in wanted]
    return Split(split.images.select(rows), split.labels[rows], split.class_names)


def _content_key(split: Split, resize: int | None) -> str:
    """What the pixels and classes of a split are; a fingerprint of bytes alone knows neither size nor selection."""
    images = split.images
    pixels = hashlib.sha256("\n".join(images.ids).encode())
    return digest(
        [
            images.fingerprint,
            images.size,
            resize,
            pixels.hexdigest(),
            split.labels.tolist(),
            split.class_names,
        ]
    )


# ── where and with what ──────────────────────────────────────────────────────────────────────────────────────────────


def machine(device: str) -> Row:
    """What the numbers' cost refers to."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not a Linux machine
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "device": device,
    }


@cache
def source_digest() -> str:
    """Digest of this package's source: cells that other code computed can be told apart, within one version too."""
    root = Path(unpoison.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("benchmark", "cli", "report"):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]
