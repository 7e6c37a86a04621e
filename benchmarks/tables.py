"""Fill the tables of benchmarks/README.md from benchmarks/results/*.json.

python benchmarks/tables.py            rewrites the text between the markers
python benchmarks/tables.py --check    says whether that would change anything (exit code 1)
"""

import json
import re
import sys

import aim
import augmentation
import clean
import clip
import common
import cost
import demo
import detectors
import false_alarms
import growth
import masks
import power
import pretrain_speed
import pretraining
import spectral_dct
import throughput
import zoo

README = common.ROOT / "benchmarks" / "README.md"
TABLES = {
    "demo": demo.table,
    "cifar5": common.victim_table,
    "cifar10": common.victim_table,
    "tiny": common.victim_table,
    "hard": common.victim_table,
    "clean": clean.table,
    "aim": aim.table,
    "cost": cost.table,
    "false_alarms": false_alarms.table,
    "power": power.table,
    "growth": growth.table,
    "masks": masks.table,
    "detectors": detectors.table,
    "spectral_dct": spectral_dct.table,
    "throughput": throughput.table,
    "augmentation": augmentation.table,
    "pretrain_speed": pretrain_speed.table,
    "pretraining": pretraining.table,
    "zoo": zoo.table,
    "clip": clip.table,
}


def filled(text, results):
    """The text with the table of every benchmark that has results between its markers.

    Args:
        text: holds `<!-- NAME -->` and `<!-- /NAME -->`, each on a line of its own.
        results: name to the content of results/NAME.json.
    """
    for name, value in results.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not between.search(text):
            raise ValueError(
                f"README.md has no markers for {name}: expected <!-- {name} --> and <!-- /{name} -->"
            )
        content = f"{TABLES[name](value)}\n\n{provenance(value)}\n"
        text = between.sub(lambda match, content=content: match[1] + content + match[2], text)
    return text


def provenance(results):
    """Where the numbers come from: command, seeds, machine, versions."""
    rows = results["rows"]
    commands = dict.fromkeys(row["command"] for row in rows)
    machines = dict.fromkeys(
        f"{row['machine']['gpu'] or row['machine']['cpu']}, {row['machine']['threads']} thread(s)"
        for row in rows
    )
    versions = dict.fromkeys(
        f"torch {row['versions']['torch']}, timm {row['versions']['timm']}" for row in rows
    )
    parts = [*(f"`{command}`" for command in commands), *machines, *versions]
    return f"Seeds {', '.join(map(str, results['seeds']))}; {'; '.join(parts)}."


def main(arguments):
    results = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in TABLES
        if (path := common.RESULTS / f"{name}.json").exists()
    }
    before = README.read_text(encoding="utf-8")
    after = filled(before, results)
    if "--check" in arguments:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
