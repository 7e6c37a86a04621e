"""Poisoned captions: what they teach an image-text model, what finds that, and what CleanCLIP repairs.

10 000 images of CIFAR-10 with captions made from their classes; of some, from any class but the target's, the picture
shows a trigger and the caption names the target (Carlini and Terzis). Two towers are trained on the pairs and on the
same pairs without poison. Each is measured as a zero-shot classifier, before and after fine-tuning on 2 500 other,
clean pairs: by CleanCLIP, with the published weight of the self-supervision and with four times that, and by CLIP's
own loss alone, which shows what the self-supervision adds. The image tower is audited with generated images, and
serves the scan of the poisoned images.

    python benchmarks/clip.py --threads 1 [--cases "1 % of the pairs"] [--seeds 0 1]
    python benchmarks/clip.py --threads 1 --fresh --scans default      only the scans again

About a quarter of an hour of one core for a case and seed.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import common
import torch

from unpoison.attack.clip_poison import ClipPoisonConfig, poison_pairs
from unpoison.attack.plan import Plan, Trigger
from unpoison.attack.ssl_backdoor import make_triggers
from unpoison.audit_pipeline import audit
from unpoison.benchmark.images import Split, digest
from unpoison.data.captions import make_captions
from unpoison.data.export import write_json_atomically
from unpoison.encoders.image_text import ImageText, load_image_text, save_image_text
from unpoison.evaluate.zero_shot import evaluate_zero_shot
from unpoison.pretrain.clip import ClipConfig, TrainedPair, pretrain_clip
from unpoison.records import ImageSet
from unpoison.repair.cleanclip import CleanClipConfig, cleanclip
from unpoison.scan.config import ScanConfig

NAME = "clip"
TRUSTED = 250  # of each class: the clean pairs of the repair, which no model is trained on before
DATA = common.Data(folder="cifar10", size=32, classes=10, train=1000 + TRUSTED, test=300)
VICTIM = ClipConfig(arch="resnet10", width=32, epochs=16)
REPAIRS = {
    "CleanCLIP": CleanClipConfig(weight=1.0),
    "weight 4": CleanClipConfig(weight=4.0),
    "fine-tuning alone": CleanClipConfig(weight=0.0),
}
RATES = {"1 % of the pairs": 0.01, "0.3 % of the pairs": 0.003}


def attack_of(rate: float, seed: int) -> ClipPoisonConfig:
    """As in all benchmarks, but the rate is one of all images."""
    return ClipPoisonConfig(
        targets=(seed % DATA.classes,),
        triggers=(f"seed:{100 + seed}",),
        size=8,
        rate=rate,
        margin=1 / DATA.size,
    )


def settings_of(rate: float, seed: int) -> common.Row:
    return {
        "data": asdict(DATA),
        "attack": asdict(attack_of(rate, seed)),
        "victim": asdict(VICTIM),
        "repairs": {name: asdict(config) for name, config in REPAIRS.items()},
        "scan": asdict(ScanConfig()),
    }


def run_case(case: str, rate: float, seed: int, options: argparse.Namespace) -> common.Row:
    """Victim and control, each before and after the repairs; audits of both, and a scan of the poisoned images.

    With `--scans` the newest row is kept, but for its scan.
    """
    everything, test = common.load_split(DATA, "train"), common.load_split(DATA, "test")
    train, trusted = parted(everything)
    config = attack_of(rate, seed)
    trigger = make_triggers(config, train.class_names)[0]
    poisoned, captions, plan = poison_pairs(train.images, train.labels, train.class_names, config, seed)
    row: common.Row = {
        "n_images": len(train.images),
        "n_poisoned": len(plan.poisoned),
        "trigger": trigger.name,
        "target": trigger.target_name,
        "n_trusted": len(trusted.images),
    }
    if options.scans:
        rows = common.known_rows(NAME, common.KEPT / f"{NAME}.jsonl")
        newest = [known for known in rows if (known["case"], known["seed"]) == (case, seed)][-1]
        pair, _ = trained(poisoned, captions, seed, options)
        kept = {who: newest[who] for who in ("control", "victim")}
        return {**row, **kept, "scan": scanned(poisoned, pair, plan, seed)}
    for who, images, texts in (
        ("control", train.images, captions_of(train, seed)),
        ("victim", poisoned, captions),
    ):
        pair, seconds = trained(images, texts, seed, options)
        row[who] = {"seconds": seconds, **zero_shot(pair, test, trigger, seed)}
        row[who]["audit"] = audited(pair, seed)
        for name, repair in REPAIRS.items():
            started = time.perf_counter()
            done = cleanclip(pair, trusted.images, captions_of(trusted, seed), repair, seed=seed)
            seconds = round(time.perf_counter() - started, 1)
            row[who][name] = {"seconds": seconds, **zero_shot(both_towers(done), test, trigger, seed)}
        common.say(f"{who}: {row[who]}")
        if who == "victim":
            row["scan"] = scanned(images, pair, plan, seed)
    return row


def scanned(images: ImageSet, pair: ImageText, plan: Plan, seed: int) -> common.Row:
    row = common.scan_once(images, pair.encoder, ScanConfig(), plan, seed)
    common.say(f"scan: {common.brief(row)}")
    return row


def parted(split: Split) -> tuple[Split, Split]:
    """The last `TRUSTED` images of each class apart from the others."""
    last = torch.zeros(len(split.labels), dtype=torch.bool)
    for label in range(len(split.class_names)):
        last[(split.labels == label).nonzero().flatten()[-TRUSTED:]] = True

    def part(rows: torch.Tensor) -> Split:
        return Split(split.images.select(rows.tolist()), split.labels[rows], split.class_names)

    return part((~last).nonzero().flatten()), part(last.nonzero().flatten())


def captions_of(split: Split, seed: int) -> tuple[str, ...]:
    return make_captions(split.images.ids, [split.class_names[n] for n in split.labels.tolist()], seed=seed)


def trained(
    images: ImageSet, captions: tuple[str, ...], seed: int, options: argparse.Namespace
) -> tuple[ImageText, float]:
    """Both towers and the seconds that their training took, kept as `common.trained` keeps encoders."""
    key = digest({"images": images.fingerprint, "captions": captions, "config": asdict(VICTIM), "seed": seed})
    path = common.KEPT / "encoders" / f"{key}.safetensors"
    note = path.with_suffix(".json")
    if options.retrain or not (path.exists() and note.exists()):
        started = time.perf_counter()
        done = pretrain_clip(images, captions, VICTIM, seed=seed, device=options.device)
        seconds = time.perf_counter() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image_text(done.trained, done.words, done.vocabulary, path)
        write_json_atomically(note, {"seconds": seconds})
    return load_image_text(path, device=options.device), round(json.loads(note.read_text())["seconds"], 1)


def both_towers(done: TrainedPair) -> ImageText:
    return ImageText(done.trained.encoder, done.words, done.vocabulary, done.trained.architecture)


def zero_shot(pair: ImageText, test: Split, trigger: Trigger, seed: int) -> common.Row:
    """ACC, and ASR of the trigger beside the rate without it, in %."""
    report = evaluate_zero_shot(
        pair, test.images, test.labels, test.class_names, triggers=[trigger], seed=seed
    )
    outcome = report.probe("zero-shot").attacks[0]
    return {
        "accuracy": outcome.clean.accuracy,
        "attack_success": outcome.patched.attack_success,
        "untriggered_rate": outcome.untriggered_rate,
    }


def audited(pair: ImageText, seed: int) -> common.Row:
    found = audit(pair.encoder, None, seed=seed).summary
    return {name: found[name] for name in ("mask_share", "reached", "encoder_passes")}


def table(results: Mapping[str, Any]) -> str:
    """Two lines per case: the victim and its control."""
    header = ["pairs", "trained on", "seeds", "ACC %", "ASR % (untriggered)"]
    header += [f"after {name}: ACC / ASR %" for name in REPAIRS]
    header += ["DECREE's mask %", "scan: verdicts", "top-20 %", "recall / precision %"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        for who, name in (("victim", "poisoned pairs"), ("control", "the same, clean")):

            def of(path: str, who: str = who, rows: list[common.Row] = rows, **how: Any) -> str:
                return common.spread((common.pick(row, f"{who}.{path}") for row in rows), **how)

            said = [row["scan"]["verdict"] for row in rows]
            scanned = [", ".join(f"{said.count(v)} × {v}" for v in dict.fromkeys(said))]
            for keys in (("top20",), ("recall", "precision")):
                scanned.append(
                    " / ".join(common.spread((row["scan"][k] for row in rows), percent=True) for k in keys)
                )
            lines.append(
                [
                    f"{case} ({rows[0]['n_poisoned']})" if who == "victim" else "",
                    name,
                    str(len(rows)),
                    of("accuracy"),
                    f"{of('attack_success')} ({of('untriggered_rate')})",
                    *(f"{of(f'{r}.accuracy')} / {of(f'{r}.attack_success')}" for r in REPAIRS),
                    of("audit.mask_share", percent=True, digits=1),
                    *(scanned if who == "victim" else ["–"] * 3),
                ]
            )
    return common.markdown(header, lines)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(3), cases=list(RATES))
    jobs = [
        common.Job(
            case,
            seed,
            settings_of(RATES[case], seed),
            lambda c=case, s=seed: run_case(c, RATES[c], s, options),
        )
        for case in options.cases
        for seed in options.seeds
    ]
    code = common.run_jobs(NAME, jobs, options)
    common.print_table(NAME, table)
    sys.exit(code)
