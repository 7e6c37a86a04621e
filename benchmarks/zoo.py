"""A zoo of encoders, clean and backdoored, and what `unpoison audit` says of each.

One row is one encoder. Clean ones come from SimCLR, MoCo v2 and BYOL with several networks, on 2 500 images of CIFAR-10
(ten classes) or 64-pixel pictures of Tiny-ImageNet. Backdoored ones are clean ones of other seeds with BadEncoder or
DRUPE, or are trained on poisoned images (SSL-Backdoor). Each is audited with real images and with the generated images
that serve where there are none; those of the main family also as published (`--faithful`, real images). Audits that an
earlier row of the same encoder has are taken over, unless `--fresh`. No encoder is both attacked and a clean reference:
attacks start from seeds of 100 and up. Clean ones of those seeds are audited, too: held out of the reference, they show
how often it raises a false alarm.

Whether an encoder is called backdoored is the conformal rank of its mask share among the clean rows of its family, by
the function that the audit uses; a clean row is left out of its own reference.

    python benchmarks/zoo.py --threads 1 [--cases CASE ...] [--seeds 0 1 ...]
    python benchmarks/zoo.py --write-reference       the clean rows become src/unpoison/audit/reference.json

About 1.5 minutes of one idle core for a clean row at 32 pixels, 2 to 3 for a backdoored one; see the table.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image, ImageDraw

from unpoison.attack.bad_encoder import BadEncoderConfig
from unpoison.attack.drupe import DrupeConfig
from unpoison.attack.implanting import ImplantConfig, implant, stamp_in_corner
from unpoison.attack.plan import Plan, corner_box, read_plan, write_plan
from unpoison.attack.ssl_backdoor import PatchAttackConfig, poison
from unpoison.audit.decree import DecreeConfig, Inversion
from unpoison.audit.reference import Conditions, ReferenceTable, add_to_reference, judge
from unpoison.audit_pipeline import PAPER_THRESHOLD, SHIPPED_REFERENCE, audit, conditions_of
from unpoison.benchmark.images import digest
from unpoison.data.export import write_json_atomically
from unpoison.encoders.checkpoints import load_encoder, save_retouched
from unpoison.encoders.encoder import Encoder
from unpoison.evaluate.attack_success import evaluate_encoder
from unpoison.pretrain.loop import PretrainConfig
from unpoison.records import ImageSet
from unpoison.report.pictures import as_pixels, enlarge, outline

NAME = "zoo"
ALPHA = 0.05
CIFAR = common.Data(folder="cifar10", size=32, classes=10, train=250, test=100)
TINY = common.Data(folder="tinyimagenet100", size=64, classes=10, train=250, test=50, held_out="val")
METHODS = ("moco-v2", "simclr", "byol")
_ATTACKED = 100  # added to the seed of an encoder that is attacked, or held out
_HELD_OUT = "held-out"
_TILE = 64  # smallest side of a shown image, pixels


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of encoder.

    Attributes:
        name: unique.
        seeds: seeds below this have a row.
        attack: `clean`, `held-out` (clean, but no reference), `bad-encoder`, `drupe` or `ssl-backdoor`.
        triggers: of the attack; seed s takes number s, and s + 1 where there are two targets.
        targets: of the attack, at once.
        references: images of the target that BadEncoder leads a trigger to. Of encoders as weak as these a single one
            is taken for another class too often; on the ViT thirty did not help (seed 0: ASR 10 and 18 %).
        faithful: audit as published, too.
    """

    name: str
    data: common.Data
    arch: str
    width: int
    methods: tuple[str, ...]
    seeds: int
    attack: str = "clean"
    triggers: tuple[str, ...] = ("white", "seed:101", "seed:102", "seed:103")
    size: int | None = None
    targets: int = 1
    references: int = 30
    faithful: bool = True

    def victim(self, seed: int) -> PretrainConfig:
        """The methods take turns over the seeds."""
        method = self.methods[seed % len(self.methods)]
        return PretrainConfig(method=method, arch=self.arch, width=self.width, epochs=12)


_MAIN: dict[str, Any] = {"data": CIFAR, "arch": "resnet10", "width": 32, "methods": METHODS}
_OTHERS: dict[str, dict[str, Any]] = {
    "ResNet-18, width 16": {"data": CIFAR, "arch": "resnet18", "width": 16, "methods": METHODS},
    "ViT-tiny": {"data": CIFAR, "arch": "vit_tiny", "width": 32, "methods": METHODS, "references": 1},
    "ResNet-10, 64 px": {"data": TINY, "arch": "resnet10", "width": 32, "methods": METHODS},
}
CASES = (
    Case(name="clean", seeds=21, **_MAIN),
    Case(name="clean, held out", seeds=20, attack=_HELD_OUT, faithful=False, **_MAIN),
    Case(name="BadEncoder", seeds=8, attack="bad-encoder", **_MAIN),
    Case(name="BadEncoder, 6 px", seeds=3, attack="bad-encoder", size=6, **_MAIN),
    Case(name="BadEncoder, 2 targets", seeds=3, attack="bad-encoder", targets=2, **_MAIN),
    Case(name="DRUPE", seeds=4, attack="drupe", **_MAIN),
    Case(
        name="SSL-Backdoor",
        seeds=4,
        attack="ssl-backdoor",
        triggers=tuple(f"seed:{100 + seed}" for seed in range(4)),
        size=8,
        **{**_MAIN, "methods": ("moco-v2",)},
    ),
    # A network of common size, for what an audit takes: run it alone.
    Case(
        name="clean, ResNet-18, width 64",
        seeds=1,
        faithful=False,
        data=CIFAR,
        arch="resnet18",
        width=64,
        methods=METHODS,
    ),
    *(Case(name=f"clean, {name}", seeds=21, faithful=False, **what) for name, what in _OTHERS.items()),
    *(
        Case(name=f"BadEncoder, {name}", seeds=4, attack="bad-encoder", faithful=False, **what)
        for name, what in _OTHERS.items()
    ),
)
AUDITS = {
    "default": DecreeConfig(),
    "generated images": DecreeConfig(),
    "faithful": DecreeConfig(faithful=True),
}


def attack_of(case: Case, seed: int) -> ImplantConfig | PatchAttackConfig | None:
    """The rule: seed s has target s mod 10, and the next of the case's triggers; a second pair follows likewise."""
    if case.attack in ("clean", _HELD_OUT):
        return None
    pairs = range(case.targets)
    shared: dict[str, Any] = {
        "targets": tuple((seed + pair) % case.data.classes for pair in pairs),
        "triggers": tuple(case.triggers[(seed + pair) % len(case.triggers)] for pair in pairs),
        "size": case.size,
    }
    if case.attack == "ssl-backdoor":
        return PatchAttackConfig(**shared, rate=1.0, margin=1 / case.data.size)
    if case.attack == "bad-encoder":
        shared["references"] = case.references
        return BadEncoderConfig(**shared, epochs=12, batch_size=128, learning_rate=0.04)
    return DrupeConfig(**shared, epochs=15, batch_size=128, learning_rate=0.04)


def audits_of(case: Case) -> dict[str, DecreeConfig]:
    """Which audits a row has."""
    return {name: config for name, config in AUDITS.items() if name != "faithful" or case.faithful}


def settings_of(case: Case, seed: int) -> common.Row:
    attack = attack_of(case, seed)
    return {
        "data": asdict(case.data),
        "victim": asdict(case.victim(seed)),
        "attack": None if attack is None else {"method": attack.method, **asdict(attack)},
        "audits": {name: asdict(config) for name, config in audits_of(case).items()},
    }


def audits_done(case: Case, seed: int, encoder: Encoder) -> Mapping[str, common.Row]:
    """Audits of this very encoder in earlier rows, by name, as far as they had the settings of today."""
    found: dict[str, common.Row] = {}
    wanted = settings_of(case, seed)["audits"]
    for row in common.known_rows(NAME, common.KEPT / f"{NAME}.jsonl"):
        for name, said in row["audits"].items():
            same = row["settings"]["audits"].get(name) == wanted.get(name)
            if (
                same
                and (row["case"], row["seed"]) == (case.name, seed)
                and said["fingerprint"] == encoder.fingerprint
            ):
                found[name] = said
    return found


def run_case(case: Case, seed: int, options: argparse.Namespace) -> common.Row:
    """Build one encoder, measure it, audit it; everything that the tables need, as plain JSON values."""
    train, test = common.load_split(case.data, "train"), common.load_split(case.data, "test")
    row: common.Row = {"kind": case.attack, "method": case.victim(seed).method}
    encoder, plan, row["train_seconds"], row["attack_seconds"] = built(case, seed, train, options)
    row["probes"] = probes(encoder, plan, train, test, seed)
    if case.attack in ("bad-encoder", "drupe"):
        before, _ = common.trained(train.images, case.victim(seed), seed + _ATTACKED, options)
        row["control"] = probes(before, plan, train, test, seed)
    common.say(f"probes: {row['probes']}")
    row["audits"] = {}
    done = {} if options.fresh else audits_done(case, seed, encoder)
    for name, config in audits_of(case).items():
        row["audits"][name] = done.get(name) or audited(
            encoder, None if name == "generated images" else test.images, config, plan, seed
        )
        said = row["audits"][name]
        common.say(
            f"{name}: mask {said['mask_share']:.3f}, second opinion {said['anomaly_index']}, "
            f"{said['seconds']:.0f} s"
        )
    return row


def built(
    case: Case, seed: int, train: common.Split, options: argparse.Namespace
) -> tuple[Encoder, Plan | None, float, float]:
    """The encoder of a row, the answer key, and the seconds that training and attack took; kept once made."""
    attack, victim = attack_of(case, seed), case.victim(seed)
    if attack is None:
        own = seed + _ATTACKED if case.attack == _HELD_OUT else seed
        encoder, seconds = common.trained(train.images, victim, own, options)
        return encoder, None, seconds, 0.0
    if isinstance(attack, PatchAttackConfig):
        images, plan = poison(train.images, train.labels, train.class_names, attack, seed)
        encoder, seconds = common.trained(images, victim, seed, options)
        return encoder, plan, seconds, 0.0
    clean, seconds = common.trained(train.images, victim, seed + _ATTACKED, options)
    key = digest(
        {"clean": clean.fingerprint, "method": attack.method, "config": asdict(attack), "seed": seed}
    )
    path = common.KEPT / "encoders" / f"{key}.safetensors"
    plan_path, note = path.with_suffix(".plan.json"), path.with_suffix(".json")
    if options.retrain or not (path.exists() and plan_path.exists() and note.exists()):
        started = time.perf_counter()
        done = implant(clean, train.images, train.labels, train.class_names, attack, seed=seed)
        common.say(f"{attack.method}: effect {done.effect}, kept {done.kept:.3f}")
        original = common.kept_encoder(train.images, victim, seed + _ATTACKED)
        assert isinstance(done.encoder.network, torch.nn.Module)
        save_retouched(original, done.encoder.network, path)
        write_plan(done.plan, plan_path)
        write_json_atomically(note, {"seconds": time.perf_counter() - started})
    took = round(json.loads(note.read_text(encoding="utf-8"))["seconds"], 1)
    return load_encoder(path, device=options.device), read_plan(plan_path), seconds, took


def probes(
    encoder: Encoder, plan: Plan | None, train: common.Split, test: common.Split, seed: int
) -> common.Row:
    """ACC and, per trigger, ASR; linear probe and kNN, learned on clean images."""
    triggers = () if plan is None else plan.triggers
    report = evaluate_encoder(
        encoder, train.images, train.labels, test.images, test.labels, triggers=triggers, seed=seed
    )
    return {
        name: {
            "accuracy": report.probe(name).accuracy,
            "attack_success": [attack.patched.attack_success for attack in report.probe(name).attacks],
            "untriggered_rate": [attack.untriggered_rate for attack in report.probe(name).attacks],
        }
        for name in ("linear", "knn")
    }


def audited(
    encoder: Encoder, images: ImageSet | None, config: DecreeConfig, plan: Plan | None, seed: int
) -> common.Row:
    """One audit in memory, without a reference; the truth comes in only afterwards."""
    started = time.perf_counter()
    result = audit(
        encoder,
        images,
        config=config,
        second_opinion=seed == 0 and images is not None and not config.faithful,  # dear
        seed=seed,
    )
    said = result.summary
    kept = ("mask_share", "reached", "relaxed", "collapse_before", "collapse_after", "box", "starts")
    row = {name: said[name] for name in kept} | {
        "passes": said["encoder_passes"],
        "seconds": round(time.perf_counter() - started, 1),
        "stages": said["stages"],
        "conditions": asdict(conditions_of(said)),
        "fingerprint": said["encoder_fingerprint"],
        "anomaly_index": (said["second_opinion"] or {}).get("anomaly_index"),
        # Of the whole process, training included: exact for the first row of a run, an upper bound for the others.
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if plan is not None and plan.triggers[0].kind == "corner":
        row["iou"] = max(overlaps(result.found.mask > 0.5, plan))
        if images is not None and not config.faithful:
            draw_truth(result.found, images.pixels[:1], plan, picture_of(encoder.fingerprint))
    return row


def picture_of(fingerprint: str) -> Path:
    """Where the picture of an audited encoder is kept."""
    return common.KEPT / "pictures" / f"{fingerprint[:20]}.png"


def draw_truth(found: Inversion, image: torch.Tensor, plan: Plan, path: Path) -> None:
    """An image with the first trigger, the mask, and what it shows of the pattern; a frame where each trigger lies."""
    size = image.shape[-1]
    shown = [
        stamp_in_corner(image, plan.triggers[0])[0],
        (255 * found.mask.expand(3, size, size)).round().to(torch.uint8),
        (255 * found.mask * found.pattern).round().to(torch.uint8),
    ]
    height, width = plan.triggers[0].pasted(size).shape[1:]
    box = corner_box((size, size), (width, height))
    tiles = [outline(enlarge(as_pixels(one.cpu()), _TILE), box).pixels for one in shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(tiles, axis=1)).save(path)


def write_sheet(rows: list[common.Row]) -> None:
    """results/zoo.png: the pictures of all encoders with BadEncoder that are kept here, with name and overlap."""
    parts = []
    for row in rows:
        path = picture_of(row["audits"]["default"]["fingerprint"])
        if row["kind"] == "bad-encoder" and path.exists():
            tile = Image.new("RGB", (3 * _TILE, _TILE + 14), "white")
            with Image.open(path) as picture:
                tile.paste(picture, (0, 14))
            text = f"{row['case'].removeprefix('BadEncoder, ')} {row['seed']}: {row['audits']['default']['iou']:.2f}"
            ImageDraw.Draw(tile).text((2, 1), text, fill="black")
            parts.append(tile)
    if not parts:
        return
    columns = 4
    step, high = 3 * _TILE + 8, _TILE + 20
    sheet = Image.new("RGB", (columns * step, math.ceil(len(parts) / columns) * high), "white")
    for number, tile in enumerate(parts):
        sheet.paste(tile, (number % columns * step, number // columns * high))
    sheet.save(common.RESULTS / f"{NAME}.png", optimize=True)


def overlaps(hidden: torch.Tensor, plan: Plan) -> Iterator[float]:
    """Intersection over union of a (S, S) bool mask with the place of each trigger."""
    size = hidden.shape[-1]
    for trigger in plan.triggers:
        height, width = trigger.pasted(size).shape[1:]
        box = corner_box((size, size), (width, height))
        truth = torch.zeros_like(hidden)
        truth[box.y : box.y + box.h, box.x : box.x + box.w] = True
        yield float((hidden & truth).sum() / (hidden | truth).sum())


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def references(rows: list[common.Row], name: str) -> tuple[ReferenceTable, ...]:
    """The clean rows as the tables that an audit is judged by."""
    found: dict[str, ReferenceTable] = {}
    for row in rows:
        said = row["audits"].get(name)
        if row["kind"] != "clean" or said is None:
            continue
        conditions = Conditions(**said["conditions"])
        key = json.dumps(said["conditions"], sort_keys=True)
        shares = found[key].mask_shares if key in found else {}
        found[key] = ReferenceTable(conditions, {**shares, said["fingerprint"]: said["mask_share"]})
    return tuple(found.values())


def judged(row: common.Row, name: str, tables: tuple[ReferenceTable, ...]) -> str | None:
    """The verdict on a row; None where it has no such audit."""
    said = row["audits"].get(name)
    if said is None:
        return None
    conditions = Conditions(**said["conditions"])
    return judge(said["mask_share"], conditions, tables, alpha=ALPHA, fingerprint=said["fingerprint"]).verdict


def auroc(rows: list[common.Row], clean: list[common.Row], name: str) -> float | None:
    """Chance that a backdoored encoder has a smaller mask than a clean one of its own family; ties count half."""
    wins = [
        (bad < good) + 0.5 * (bad == good)
        for one in rows
        for other in clean
        if _family(one, name) == _family(other, name) is not None
        for bad, good in [(_share(one, name), _share(other, name))]
    ]
    return sum(wins) / len(wins) if wins else None


def table(results: Mapping[str, Any]) -> str:
    """A line per case and kind of audit."""
    rows = results["rows"]
    clean = [row for row in rows if row["kind"] == "clean"]
    header = ["case", "encoders", "ACC before / after %", "ASR % (control)", "audit", "mask %"]
    header += [
        "called backdoored",
        f"below {100 * PAPER_THRESHOLD:.0f} %",
        "AUROC",
        "mask IoU",
        "anomaly index",
        "s",
        "passes",
        "memory, MiB",
    ]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        first = [case, str(len(mine)), _accuracies(mine), _success(mine)]
        for name in AUDITS:
            seen = [row for row in mine if name in row["audits"]]
            if not seen:
                continue
            tables = references(rows, name)
            verdicts = [judged(row, name, tables) for row in seen]
            known = [verdict for verdict in verdicts if verdict != "inconclusive"]
            area = auroc(seen, clean, name) if mine[0]["kind"] not in ("clean", _HELD_OUT) else None

            def of(path: str, seen: list[common.Row] = seen, name: str = name, **how: Any) -> str:
                return common.spread((common.pick(row["audits"][name], path) for row in seen), **how)

            lines.append(
                [
                    *(first if name == "default" else [""] * 4),
                    name,
                    of("mask_share", percent=True, digits=1),
                    f"{known.count('poisoned')} of {len(known)}" if known else "no reference",
                    f"{sum(_share(row, name) < PAPER_THRESHOLD for row in seen)} of {len(seen)}",
                    "–" if area is None else f"{area:.2f}",
                    of("iou", digits=2),
                    of("anomaly_index", digits=1),
                    of("seconds"),
                    of("passes"),
                    of("peak_memory_mib"),
                ]
            )
    parts = [common.markdown(header, lines), _in_all(rows)]
    if (common.RESULTS / f"{NAME}.png").exists():
        text = "An image with the trigger, the mask, and the pattern that it shows; a frame where the trigger lies"
        parts.append(f"![{text}](results/{NAME}.png)")
    return "\n\n".join([*parts, attack_table(rows)])


def _in_all(rows: list[common.Row]) -> str:
    """One line per kind of audit: of backdoored encoders and of clean ones that no table holds, how many it tells."""
    said = []
    for name in AUDITS:
        tables = references(rows, name)
        told = {
            kind: [v for row in rows if row["kind"] == kind if (v := judged(row, name, tables)) is not None]
            for kind in ("bad-encoder", _HELD_OUT)
        }
        bad, clean = told["bad-encoder"], told[_HELD_OUT]
        if not (bad and clean):
            continue
        hits, alarms = bad.count("poisoned"), clean.count("poisoned")
        right = hits + len(clean) - alarms
        said.append(
            f"{name}: {hits} of {len(bad)} encoders with BadEncoder and {alarms} of {len(clean)} clean ones held "
            f"out of the reference, {100 * right / (len(bad) + len(clean)):.0f} % told rightly"
        )
    return f"Called backdoored at alpha {ALPHA:g}. {'; '.join(said)}." if said else ""


def attack_table(rows: list[common.Row]) -> str:
    """What the attacks on encoders do to a linear probe, and how many keep the papers' promise."""
    header = ["attack", "encoders", "ACC: change in points", "loses at most 2", "ASR % (before the attack)"]
    header += ["every target at 90 % or more"]
    lines = []
    attacked = [row for row in rows if "control" in row]
    for case in dict.fromkeys(row["case"] for row in attacked):
        mine = [row for row in attacked if row["case"] == case]
        after, before = ([row[who]["linear"] for row in mine] for who in ("probes", "control"))
        changes = [a["accuracy"] - b["accuracy"] for a, b in zip(after, before, strict=True)]
        strong = sum(min(a["attack_success"]) >= 90 for a in after)
        lines.append(
            [
                case,
                str(len(mine)),
                common.spread(changes, digits=1),
                f"{sum(change >= -2 for change in changes)} of {len(mine)}",
                _success(mine),
                f"{strong} of {len(mine)}",
            ]
        )
    return common.markdown(header, lines)


def write_reference(results: Mapping[str, Any]) -> None:
    """The clean rows' figures on generated images, which everybody has, become the table that is shipped."""
    rows = [row for row in results["rows"] if row["kind"] == "clean"]
    if not rows:
        raise SystemExit("results/zoo.json holds no clean encoder: run this script first")
    SHIPPED_REFERENCE.unlink(missing_ok=True)
    for row in rows:
        said = row["audits"]["generated images"]
        add_to_reference(
            SHIPPED_REFERENCE, Conditions(**said["conditions"]), said["fingerprint"], said["mask_share"]
        )
    common.say(f"written: {SHIPPED_REFERENCE}, {len(rows)} encoders")


def _accuracies(rows: list[common.Row]) -> str:
    after = common.spread(row["probes"]["linear"]["accuracy"] for row in rows)
    if all("control" not in row for row in rows):
        return after
    return f"{common.spread(row['control']['linear']['accuracy'] for row in rows)} / {after}"


def _success(rows: list[common.Row]) -> str:
    def rates(who: str) -> list[float]:
        found = [row[who]["linear"]["attack_success"] for row in rows if who in row]
        return [rate for row in found for rate in row]

    control = rates("control")
    return common.spread(rates("probes")) + (f" ({common.spread(control)})" if control else "")


def _share(row: common.Row, name: str) -> float:
    return float(row["audits"][name]["mask_share"])


def _family(row: common.Row, name: str) -> str | None:
    return (
        json.dumps(common.pick(row, f"audits.{name}.conditions"), sort_keys=True)
        if name in row["audits"]
        else None
    )


def parse() -> argparse.Namespace:
    """The options of every benchmark, and one."""
    writes = "--write-reference" in sys.argv
    if writes:
        sys.argv.remove("--write-reference")
    options = common.parse(__doc__, seeds=range(21), cases=[case.name for case in CASES])
    return argparse.Namespace(**vars(options), write_reference=writes)


if __name__ == "__main__":
    options = parse()
    if options.write_reference:
        write_reference(json.loads((common.RESULTS / f"{NAME}.json").read_text(encoding="utf-8")))
        sys.exit(0)
    jobs = [
        common.Job(
            case.name,
            seed,
            settings_of(case, seed),
            lambda case=case, seed=seed: run_case(case, seed, options),
        )
        for case in CASES
        if case.name in options.cases
        for seed in options.seeds
        if seed < case.seeds
    ]
    code = common.run_jobs(NAME, jobs, options)
    write_sheet(json.loads((common.RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))["rows"])
    common.print_table(NAME, table)
    sys.exit(code)
