"""Two and three triggers with as many targets in one data set: is each one found, apart from the others?

Every case is CIFAR-10's first five classes, half or all of each target class poisoned, each with a trigger of its own.
Measured are the attack success of every (trigger, target) pair, and per planted trigger whether one finding of the scan
is it, how many of its images were flagged, and how many of those are listed under that finding.

    python benchmarks/multi_target.py --seeds 0 1 2 --threads 1 [--cases two three]
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cifar5
import common

from unpoison.attack.plan import Plan
from unpoison.attack.ssl_backdoor import PatchAttackConfig, make_triggers, poison
from unpoison.encoders.encoder import Encoder
from unpoison.evaluate.attack_success import evaluate_encoder
from unpoison.evaluate.truth import read_truth
from unpoison.records import ImageSet, ScanResult

NAME = "multi_target"


@dataclass(frozen=True, kw_only=True)
class Case:
    """So many triggers, each on this share of its own target class."""

    name: str
    triggers: int
    rate: float


CASES = (
    Case(name="two", triggers=2, rate=1.0),
    Case(name="three", triggers=3, rate=1.0),
    Case(name="two, half", triggers=2, rate=0.5),
)


def attack_of(case: Case, seed: int) -> PatchAttackConfig:
    """The rule: pair i of seed s has target s + 2i mod n and trigger seed:100+s+10i."""
    pairs = range(case.triggers)
    return PatchAttackConfig(
        targets=tuple((seed + 2 * pair) % cifar5.DATA.classes for pair in pairs),
        triggers=tuple(f"seed:{100 + seed + 10 * pair}" for pair in pairs),
        size=8,
        rate=case.rate,
        margin=1 / cifar5.DATA.size,
    )


def run_case(case: Case, seed: int, options: argparse.Namespace) -> common.Row:
    """Train, evaluate and scan; everything that the table needs, as plain JSON values."""
    train, test = common.load_split(cifar5.DATA, "train"), common.load_split(cifar5.DATA, "test")
    attack = attack_of(case, seed)
    images, plan = poison(train.images, train.labels, train.class_names, attack, seed)
    row: common.Row = {"n_images": len(images), "n_poisoned": len(plan.poisoned)}
    for who, shown in (("control", train.images), ("victim", images)):
        encoder, seconds = common.trained(shown, cifar5.VICTIM, seed, options)
        row[who] = {"seconds": seconds, "pairs": success(encoder, train, test, attack, seed)}
        rates = ", ".join(f"{pair['attack_success']:.1f}" for pair in row[who]["pairs"])
        common.say(f"{who}: ASR {rates}")
    row["scan"] = scan_once(images, encoder, plan, seed)
    common.say(f"scan: {row['scan']}")
    return row


def success(
    encoder: Encoder, train: common.Split, test: common.Split, attack: PatchAttackConfig, seed: int
) -> list[common.Row]:
    """Under the linear probe, for each pair."""
    report = evaluate_encoder(
        encoder,
        train.images,
        train.labels,
        test.images,
        test.labels,
        triggers=make_triggers(attack, train.class_names),
        seed=seed,
    )
    return [
        {
            "trigger": pair.trigger,
            "target": pair.target_name,
            "accuracy": pair.clean.accuracy,
            "patched_accuracy": pair.patched.accuracy,
            "attack_success": pair.patched.attack_success,
            "untriggered_rate": pair.untriggered_rate,
        }
        for pair in report.probe("linear").attacks
    ]


def scan_once(images: ImageSet, encoder: Encoder, plan: Plan, seed: int) -> common.Row:
    from unpoison.pipeline import scan

    result = scan(images, encoder, seed=seed)
    row = {
        "verdict": result.verdict,
        "seconds": result.summary["seconds"],
        "encoder_passes": result.summary["encoder_passes"],
        "n_findings": len(result.triggers),
        "n_flagged": len(result.flagged),
        **common.quality(result, plan, images, encoder),
    }
    return {**row, "triggers": by_trigger(result, plan, encoder)}


def by_trigger(result: ScanResult, plan: Plan, encoder: Encoder) -> list[common.Row]:
    """Each planted trigger laid beside the finding whose sources carry it; the truth comes in here only."""
    ids = [str(id_) for id_ in result.findings["id"]]
    truth = read_truth(plan, ids, encoder.preprocessing.geometry)
    planted = dict(zip(ids, truth.trigger.tolist(), strict=True))
    shows = [
        Counter(planted[source] for source in finding.source_ids).most_common(1)[0][0]
        for finding in result.triggers
    ]
    rows = []
    for number, trigger in enumerate(plan.triggers):
        mine = [id_ for id_ in ids if planted[id_] == number]
        found = result.findings.set_index("id").loc[mine]
        flagged = found["flagged"].astype(bool)
        findings = [place for place, shown in enumerate(shows, start=1) if shown == number]
        rows.append(
            {
                "trigger": trigger.name,
                "target": trigger.target_name,
                "n_poisoned": len(mine),
                "n_scored": int(found["scored"].sum()),
                "n_findings": len(findings),
                "recall": float(flagged.mean()),
                "listed_rightly": float(found.loc[flagged, "trigger"].isin(findings).mean())
                if flagged.any()
                else None,
            }
        )
    return rows


def table(results: Mapping[str, Any]) -> str:
    """A line per case: what each planted trigger does, and what the scan says of it."""
    header = [
        "case",
        "seeds",
        "ASR % per pair (control)",
        "planted triggers with one finding",
        "other findings",
    ]
    header += ["recall per trigger %", "listed under it %", "precision %", "verdict", "scan s"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        said = [trigger for row in rows for trigger in row["scan"]["triggers"]]
        matched = sum(trigger["n_findings"] for trigger in said)
        verdicts = Counter(row["scan"]["verdict"] for row in rows)

        def pairs(who: str, rows: Sequence[common.Row] = rows) -> str:
            return common.spread(pair["attack_success"] for row in rows for pair in row[who]["pairs"])

        lines.append(
            [
                case,
                str(len(rows)),
                f"{pairs('victim')} ({pairs('control')})",
                f"{sum(trigger['n_findings'] == 1 for trigger in said)} of {len(said)}",
                str(sum(row["scan"]["n_findings"] for row in rows) - matched),
                common.spread((trigger["recall"] for trigger in said), percent=True),
                common.spread((trigger["listed_rightly"] for trigger in said), percent=True),
                common.spread((row["scan"]["precision"] for row in rows), percent=True),
                ", ".join(f"{times} × {verdict}" for verdict, times in verdicts.items()),
                common.spread(row["scan"]["seconds"] for row in rows),
            ]
        )
    return common.markdown(header, lines)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(3), cases=[case.name for case in CASES])
    jobs = [
        common.Job(
            case.name,
            seed,
            {
                "case": asdict(case),
                "data": asdict(cifar5.DATA),
                "victim": asdict(cifar5.VICTIM),
                "attack": asdict(attack_of(case, seed)),
            },
            lambda case=case, seed=seed: run_case(case, seed, options),
        )
        for seed in options.seeds
        for case in CASES
        if case.name in options.cases
    ]
    code = common.run_jobs(NAME, jobs, options)
    common.print_table(NAME, table)
    sys.exit(code)
