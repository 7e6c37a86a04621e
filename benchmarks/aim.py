"""Is a pattern that steers an attack? How images lie that carry it, once it is hidden: of attacks, and of an overlay.

The victims of cifar5.py, cifar10.py and tiny.py, and of false_alarms.py an encoder trained on images of which a
tenth carries one patch, of all classes alike. The concentration is that of docs/methods.md: 1 is like any images.

    python benchmarks/aim.py --threads 1 [--cases "CIFAR-10, 5 classes"] [--seeds 0 1 2]
"""

import sys
from dataclasses import asdict

import cifar5
import cifar10
import common
import false_alarms
import tiny

from unpoison.attack.ssl_backdoor import poison
from unpoison.scan.config import ScanConfig

NAME = "aim"
ATTACKED = {case.name: case for module in (cifar5, cifar10, tiny) for case in module.CASES}
OVERLAY = next(case for case in false_alarms.CASES if case.planted == "uniform")
SCAN = ScanConfig(method="poisoncam", filter_steps=0)


def measure(name, seed, options):
    from unpoison.pipeline import scan

    if name in ATTACKED:
        case = ATTACKED[name]
        train = common.load_split(case.data, "train")
        attack = common.attack_of(case, seed)
        images, _ = poison(train.images, train.labels, train.class_names, attack, seed)
        encoder, _ = common.trained(images, case.victim, seed, options)
    else:
        images = false_alarms.planted(OVERLAY, seed)
        encoder, _ = common.trained(images, OVERLAY.victim, seed, options)
    summary = scan(images, encoder, config=SCAN, seed=seed).summary
    row = {
        "verdict": summary["verdict"],
        "p_value": summary["p_value"],
        "triggers": [[one["concentration"], one["n_sources"]] for one in summary["triggers"]],
        "overlays": [[o["concentration"], o["n_sources"]] for o in summary["benign_patterns"] if o["steers"]],
    }
    common.say(str(row))
    return row


def table(results):
    header = ["images", "seeds", "patterns that steer", "images with one", "concentration", "verdict"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        found = [one for row in rows for one in row["triggers"] + row["overlays"]]
        said = [row["verdict"] for row in rows]
        lines.append(
            [
                case,
                str(len(rows)),
                str(len(found)),
                common.spread(n for _, n in found),
                common.spread((value for value, _ in found), digits=2),
                ", ".join(f"{said.count(verdict)} × {verdict}" for verdict in dict.fromkeys(said)),
            ]
        )
    return common.markdown(header, lines)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(3), cases=[*ATTACKED, OVERLAY.name])
    code = common.run_jobs(
        NAME,
        [
            common.Job(name, seed, {"scan": asdict(SCAN)}, lambda n=name, s=seed: measure(n, s, options))
            for seed in options.seeds
            for name in options.cases
        ],
        options,
    )
    common.print_table(NAME, table)
    sys.exit(code)
