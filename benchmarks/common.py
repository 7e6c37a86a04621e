"""What every benchmark shares: real images, a victim and its clean-trained control, scans of both, one file of results.

A benchmark is a list of cases, and a case with a seed is one row. A row depends on the case and the seed alone: seed s
attacks class s mod n with the trigger `seed:100+s`; nothing is picked after looking. Finished rows are kept in
runs/benchmarks/NAME.jsonl, one JSON line each, and in results/NAME.json, which is committed; not computed again.
Trained encoders are kept beside the former, so that another scan does not train them again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

from unpoison.attack.plan import Plan, Trigger  # noqa: E402
from unpoison.attack.ssl_backdoor import PatchAttackConfig, make_triggers, poison  # noqa: E402
from unpoison.benchmark.cells import machine as this_machine  # noqa: E402
from unpoison.benchmark.images import Split, digest, first_of_each_class  # noqa: E402
from unpoison.data.export import write_json_atomically  # noqa: E402
from unpoison.data.labels import read_labels  # noqa: E402
from unpoison.data.load import load_images  # noqa: E402
from unpoison.data.sources import open_source  # noqa: E402
from unpoison.encoders.checkpoints import load_encoder, save_encoder  # noqa: E402
from unpoison.encoders.encoder import Encoder  # noqa: E402
from unpoison.evaluate.attack_success import evaluate_encoder  # noqa: E402
from unpoison.evaluate.scan_quality import score_scan  # noqa: E402
from unpoison.evaluate.truth import read_truth  # noqa: E402
from unpoison.pretrain.loop import PretrainConfig, pretrain  # noqa: E402
from unpoison.records import Geometry, ImageSet, ScanResult  # noqa: E402
from unpoison.runtime import choose_device, library_versions  # noqa: E402
from unpoison.scan.config import ScanConfig  # noqa: E402

SCHEMA = 1
KS = (10, 20, 50)
RESULTS = ROOT / "benchmarks" / "results"
KEPT = ROOT / "runs" / "benchmarks"
Row = dict[str, Any]


class MissingDataError(Exception):
    """The real images are not where UNPOISON_DATA says."""


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Data:
    """The first `classes` classes of a data set, `train` and `test` images of each.

    Attributes:
        folder: below UNPOISON_DATA, with `train-*` and `held_out-*` shards; or `digits` or `photos`, which need no
            folder.
        size: side of the images, pixels.
    """

    folder: str
    size: int
    classes: int
    train: int
    test: int
    held_out: str = "test"


def data_root() -> Path:
    return Path(os.environ.get("UNPOISON_DATA", ROOT / ".." / "shared" / "data")).resolve()


def load_split(data: Data, split: str) -> Split:
    """`train` or `test` images, class balanced, in the order of the shards."""
    if data.folder in ("digits", "photos"):
        return _embedded(data.folder, split)
    folder = data_root() / data.folder
    if not folder.is_dir():
        raise MissingDataError(f"no real images at {folder}: set UNPOISON_DATA to their folder")
    source = open_source(folder)
    shards = "train-" if split == "train" else f"{data.held_out}-"
    source = source.select([id_ for id_ in source.ids if id_.startswith(shards)])
    labels = read_labels(source)
    most = data.train if split == "train" else data.test
    chosen, lacking = first_of_each_class(source.ids, labels.by_id, range(data.classes), most)
    if any(lacking.values()):
        raise MissingDataError(f"{folder} has fewer than {most} {split} images of some class")
    images = load_images(source.select(chosen), Geometry(data.size, data.size), workers=1)
    return Split(images, labels.of(images.ids), labels.class_names[: data.classes])


def _embedded(name: str, split: str) -> Split:
    from unpoison.demo import embedded_digits, embedded_photos, split_rows

    images, labels, names = embedded_digits() if name == "digits" else embedded_photos()
    train, test = split_rows(images.ids, labels)
    rows = train if split == "train" else test
    return Split(images.select(rows), labels[rows], names)


# ── one victim ───────────────────────────────────────────────────────────────────────────────────────────────────────


SCANS = {
    "mask": ScanConfig(),
    "gradcam": ScanConfig(attention="gradcam"),
    # The published scores, without the vote and the second look: what either attention finds by itself.
    "mask, any": ScanConfig(score="any"),
    "gradcam, source": ScanConfig(method="patchsearch", score="source"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a benchmark's table: data, attack, victim, scans.

    Attributes:
        name: unique in its benchmark.
        side: width of the trigger, pixels.
        scans: name to settings; each scans the same victim.
        poisoned: False trains on clean images alone and expects that nothing is found.
    """

    name: str
    data: Data
    victim: PretrainConfig
    side: int
    rate: float = 1.0
    resample: str = "nearest"
    scans: Mapping[str, ScanConfig] = field(default_factory=lambda: SCANS)
    poisoned: bool = True


def attack_of(case: Case, seed: int) -> PatchAttackConfig:
    """The rule: seed s has target s mod n and trigger seed:100+s, one pixel of margin at least."""
    return PatchAttackConfig(
        targets=(seed % case.data.classes,),
        triggers=(f"seed:{100 + seed}",),
        size=case.side,
        rate=case.rate,
        margin=1 / case.data.size,
        resample=case.resample,
    )


def run_case(case: Case, seed: int, options: argparse.Namespace, known: Mapping[str, Row]) -> Row:
    """Train, evaluate and scan, but for the scans that are known; everything that the tables need, as JSON values."""
    train, test = load_split(case.data, "train"), load_split(case.data, "test")
    attack = attack_of(case, seed)
    trigger = make_triggers(attack, train.class_names)[0]
    control, seconds = trained(train.images, case.victim, seed, options)
    row: Row = {"n_images": len(train.images), "trigger": trigger.name, "target": trigger.target_name}
    row["control"] = {"seconds": seconds, **probes(control, train, test, trigger, seed)}
    say(f"clean-trained control: {brief(row['control'])}")
    images, encoder, plan = train.images, control, None
    if case.poisoned:
        images, plan = poison(train.images, train.labels, train.class_names, attack, seed)
        encoder, seconds = trained(images, case.victim, seed, options)
        row["n_poisoned"] = len(plan.poisoned)
        row["victim"] = {"seconds": seconds, **probes(encoder, train, test, trigger, seed)}
        say(f"victim: {brief(row['victim'])}")
    row["scans"] = {}
    for name, config in case.scans.items():
        if name in known:
            row["scans"][name] = known[name]
            continue
        row["scans"][name] = scan_once(images, encoder, config, plan, seed)
        say(f"scan by {name}: {brief(row['scans'][name])}")
    return row


def kept_encoder(images: ImageSet, config: PretrainConfig, seed: int) -> Path:
    """Where `trained` keeps an encoder."""
    key = digest({"images": images.fingerprint, "config": asdict(config), "seed": seed})
    return KEPT / "encoders" / f"{key}.safetensors"


def trained(
    images: ImageSet, config: PretrainConfig, seed: int, options: argparse.Namespace
) -> tuple[Encoder, float]:
    """An encoder and the seconds that its training took, from the folder of kept encoders when it is there."""
    path = kept_encoder(images, config, seed)
    note = path.with_suffix(".json")
    if options.retrain or not (path.exists() and note.exists()):
        started = time.perf_counter()
        result = pretrain(images, config, seed=seed, device=options.device)
        seconds = time.perf_counter() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        save_encoder(result, path)
        write_json_atomically(note, {"seconds": seconds})
    # Read back even when it was just made: only an encoder from a file has the fingerprint that rows name it by.
    return load_encoder(path, device=options.device), round(json.loads(note.read_text())["seconds"], 1)


def probes(encoder: Encoder, train: Split, test: Split, trigger: Trigger, seed: int) -> Row:
    report = evaluate_encoder(
        encoder, train.images, train.labels, test.images, test.labels, triggers=[trigger], seed=seed
    )
    row = {}
    for name in ("linear", "knn"):
        attack = report.probe(name).attacks[0]
        row[name] = {
            "accuracy": attack.clean.accuracy,
            "patched_accuracy": attack.patched.accuracy,
            "attack_success": attack.patched.attack_success,
            "untriggered_rate": attack.untriggered_rate,
        }
    return row


def scan_once(images: ImageSet, encoder: Encoder, config: ScanConfig, plan: Plan | None, seed: int) -> Row:
    """One scan in memory; the truth comes in only afterwards."""
    from unpoison.pipeline import scan

    shown, started = encoder.images_shown, time.perf_counter()
    result = scan(images, encoder, config=config, seed=seed)
    seconds = time.perf_counter() - started
    row: Row = {
        "verdict": result.verdict,
        "p_value": result.summary.get("p_value"),
        "seconds": round(seconds, 1),
        "encoder_passes": encoder.images_shown - shown or result.summary.get("encoder_passes"),
        "n_scored": int(result.findings["scored"].astype(bool).sum()),
        "n_flagged": len(result.flagged),
        "n_triggers": len(result.triggers),
        "config": result.summary.get("config"),
    }
    return row if plan is None else {**row, **quality(result, plan, images, encoder)}


def quality(result: ScanResult, plan: Plan, images: ImageSet, encoder: Encoder) -> Row:
    ids = [str(id_) for id_ in result.findings["id"]]
    truth = read_truth(plan, ids, encoder.preprocessing.geometry)
    measured = score_scan(result.findings, truth, ks=KS)
    row: Row = {f"top{k}": measured.at(k).accuracy for k in KS}
    row["iou"], row["catch_rate"] = measured.at(20).iou, measured.at(20).catch_rate
    row["n_scored_poisoned"] = measured.n_scored_poisoned
    row["recall"], row["precision"], row["f1"] = measured.recall, measured.precision, measured.f1
    return row


def brief(values: Mapping[str, Any]) -> str:
    """One line of the numbers that a person waits for."""
    if "linear" in values:
        linear = values["linear"]
        return (
            f"{values['seconds']:.0f} s, ACC {linear['accuracy']:.1f}, patched {linear['patched_accuracy']:.1f}, "
            f"ASR {linear['attack_success']:.1f}, untriggered {linear['untriggered_rate']:.1f}"
        )
    keys = ("verdict", "seconds", "top10", "top20", "top50", "catch_rate", "recall", "precision", "n_flagged")
    return ", ".join(f"{key} {_short(values[key])}" for key in keys if key in values)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ── many seeds, one file ─────────────────────────────────────────────────────────────────────────────────────────────


def parse(
    description: str | None, seeds: Sequence[int], cases: Sequence[str] = (), methods: Sequence[str] = ()
) -> argparse.Namespace:
    """The options that every benchmark has; also sets the number of threads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="one row each")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; two or more collapse on a busy machine"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--fresh", action="store_true", help="compute these rows again; kept encoders are used"
    )
    parser.add_argument(
        "--scans", nargs="+", metavar="NAME", help="with --fresh: only these; the row keeps its others"
    )
    parser.add_argument("--retrain", action="store_true", help="train the encoders again, too")
    if cases:
        parser.add_argument(
            "--cases", nargs="+", default=list(cases), choices=list(cases), help="default: all"
        )
    if methods:
        parser.add_argument(
            "--methods",
            nargs="+",
            choices=list(methods),
            help="with --fresh: only these; the row keeps its others",
        )
    options = parser.parse_args()
    if methods and options.methods and not options.fresh:
        parser.error("--methods names what --fresh computes again; add --fresh")
    if options.scans and not options.fresh:
        parser.error("--scans names what --fresh computes again; add --fresh")
    torch.set_num_threads(options.threads)
    return options


def run(name: str, cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Every seed of every case: 0 if all rows are there, 1 if one failed; a failure does not cost the others."""
    chosen = [case for case in cases if case.name in getattr(options, "cases", [case.name])]
    known = {scan for case in chosen for scan in case.scans}
    if unknown := set(options.scans or ()) - known:
        say(f"--scans {' '.join(sorted(unknown))}: expected {', '.join(sorted(known))}")
        return 2
    jobs = [
        Job(
            case.name,
            seed,
            settings_of(case, seed),
            lambda case=case, seed=seed: run_case(
                case, seed, options, other_scans(name, case, seed, options)
            ),
        )
        for seed in options.seeds
        for case in chosen
    ]
    return run_jobs(name, jobs, options)


def other_scans(name: str, case: Case, seed: int, options: argparse.Namespace) -> Mapping[str, Row]:
    """What the newest row has of scans that `--scans` does not name."""
    rows = known_rows(name, KEPT / f"{name}.jsonl") if options.scans else []
    newest = [row["scans"] for row in rows if (row["case"], row["seed"]) == (case.name, seed)][-1:]
    return {scan: said for scans in newest for scan, said in scans.items() if scan not in options.scans}


@dataclass(frozen=True)
class Job:
    """One row to compute; `settings` decide whether a kept row still answers the question."""

    case: str
    seed: int
    settings: Row
    compute: Callable[[], Row]

    @property
    def key(self) -> str:
        return digest({"case": self.case, "seed": self.seed, "settings": self.settings})


def settings_of(case: Case, seed: int) -> Row:
    return {**asdict(replace(case, scans={})), "scans": {n: asdict(c) for n, c in case.scans.items()}} | {
        "attack": asdict(attack_of(case, seed))
    }


def run_jobs(name: str, jobs: Iterable[Job], options: argparse.Namespace) -> int:
    """Compute what is missing, a line at a time, and write results/NAME.json after every row."""
    path = KEPT / f"{name}.jsonl"
    failed = []
    for job in jobs:
        if not options.fresh and job.key in {row.get("key") for row in known_rows(name, path)}:
            say(f"{name} {job.case} seed {job.seed}: kept from an earlier run (--fresh computes it again)")
            write_results(name, path)
            continue
        say(f"{name} {job.case} seed {job.seed}")
        started = time.perf_counter()
        try:
            row = job.compute()
        except MissingDataError as error:
            say(str(error))
            return 2
        except Exception:  # one seed must not cost the others
            traceback.print_exc()
            failed.append(f"{job.case} seed {job.seed}")
            continue
        about = {
            "key": job.key,
            "case": job.case,
            "seed": job.seed,
            "command": " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
            "seconds": round(time.perf_counter() - started, 1),
            "machine": machine(options),
            "versions": library_versions(),
            "settings": job.settings,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**about, **row}, default=str) + "\n")
        write_results(name, path)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def read_rows(path: Path) -> list[Row]:
    """Kept rows, the newest of each key; a last line that a kill cut off is ignored."""
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.pop(row["key"], None)
        rows[row["key"]] = row
    return list(rows.values())


def known_rows(name: str, path: Path) -> list[Row]:
    """Kept rows, and before them what another machine measured and committed."""
    committed = RESULTS / f"{name}.json"
    rows = json.loads(committed.read_text(encoding="utf-8"))["rows"] if committed.exists() else []
    return rows + read_rows(path)


def write_results(name: str, path: Path) -> None:
    """results/NAME.json: of each case and seed the newest row."""
    newest = {(row["case"], row["seed"]): row for row in known_rows(name, path)}
    cases = list(dict.fromkeys(row["case"] for row in newest.values()))
    rows = sorted(newest.values(), key=lambda row: (cases.index(row["case"]), row["seed"]))
    value = {
        "schema": SCHEMA,
        "benchmark": name,
        "seeds": sorted({row["seed"] for row in rows}),
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json_atomically(RESULTS / f"{name}.json", value)


def machine(options: argparse.Namespace) -> Row:
    about = this_machine(options.device)
    return {**about, "threads": options.threads, "load": round(os.getloadavg()[0], 1)}


def device_suffix(options: argparse.Namespace) -> str:
    """What a speed's case is named beside its own name: speeds of different devices are different rows."""
    return "" if choose_device(options.device).type == "cpu" else ", GPU"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def spread(values: Iterable[float | None], *, percent: bool = False, digits: int = 0) -> str:
    """Median and range of the values that are defined.

    >>> spread([1.0, 0.9, 1.0], percent=True), spread([3.2]), spread([None])
    ('100 (90–100)', '3', '–')
    """
    known = [value * (100 if percent else 1) for value in values if value is not None]
    if not known:
        return "–"

    def show(value: float) -> str:
        return f"{value:.{digits}f}"

    middle, low, high = show(statistics.median(known)), show(min(known)), show(max(known))
    return middle if low == high else f"{middle} ({low}–{high})"


def pick(row: Mapping[str, Any], path: str) -> Any:
    """row["a"]["b"] for "a.b"; None where it ends."""
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def victim_table(results: Mapping[str, Any]) -> str:
    """Per case: the attack beside its clean-trained control, and every scan of the victim."""
    header = ["case", "seeds", "train s", "ACC clean / patched %", "ASR % (control; untriggered)"]
    header += [
        "scan",
        "top-10 / 20 / 50 %",
        "IoU",
        "catch rate",
        "flagged: recall / precision %",
        "verdict",
        "scan s",
    ]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]

        def of(path: str, rows: list[Row] = rows, **how: Any) -> str:
            return spread((pick(row, path) for row in rows), **how)

        who = "victim" if "victim" in rows[0] else "control"
        first = [
            case,
            str(len(rows)),
            of(f"{who}.seconds"),
            f"{of(f'{who}.linear.accuracy')} / {of(f'{who}.linear.patched_accuracy')}",
            f"{of(f'{who}.linear.attack_success')} ({of('control.linear.attack_success')}; "
            f"{of(f'{who}.linear.untriggered_rate')})",
        ]
        for number, name in enumerate(rows[0]["scans"]):
            where = f"scans.{name}"
            tops = " / ".join(of(f"{where}.top{k}", percent=True) for k in KS)
            found = f"{of(f'{where}.recall', percent=True)} / {of(f'{where}.precision', percent=True)}"
            said = [pick(row, f"{where}.verdict") for row in rows]
            verdict = ", ".join(f"{said.count(v)} × {v}" for v in dict.fromkeys(said))
            cells = [tops, of(f"{where}.iou", digits=2), of(f"{where}.catch_rate", digits=2), found]
            lines.append(
                [*(first if number == 0 else [""] * 5), name, *cells, verdict, of(f"{where}.seconds")]
            )
    return markdown(header, lines)


def print_table(name: str, table: Callable[[Mapping[str, Any]], str] = victim_table) -> None:
    path = RESULTS / f"{name}.json"
    if path.exists():
        print(table(json.loads(path.read_text(encoding="utf-8"))))
