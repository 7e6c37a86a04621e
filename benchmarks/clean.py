"""The same scans where there is nothing to find: clean images, clean-trained encoder; never `poisoned`?

python benchmarks/clean.py --seeds 0 1 2 3 4 --threads 1 [--cases cifar5 digits photos]
"""

import sys

import cifar5
import common

from unpoison.demo import DIGITS, PHOTOS

SCANS = {name: common.SCANS[name] for name in ("mask", "gradcam")}
CASES = (
    common.Case(name="cifar5", data=cifar5.DATA, victim=cifar5.VICTIM, side=8, poisoned=False, scans=SCANS),
    *(
        common.Case(
            name=name,
            data=common.Data(folder=name, size=32, classes=10, train=0, test=0),
            victim=demo.victim,
            side=8,
            poisoned=False,
            scans={"mask": common.ScanConfig()},
        )
        for name, demo in (("digits", DIGITS), ("photos", PHOTOS))
    ),
)


def table(results):
    header = ["images", "scan", "seeds", "said", "smallest p-value", "flagged", "scan s"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        for name in rows[0]["scans"]:
            scans = [row["scans"][name] for row in rows]
            said = [scan["verdict"] for scan in scans]
            p_values = [scan["p_value"] for scan in scans if scan["p_value"] is not None]
            lines.append(
                [
                    case,
                    name,
                    str(len(rows)),
                    ", ".join(f"{said.count(verdict)} × {verdict}" for verdict in dict.fromkeys(said)),
                    f"{min(p_values):.2g}" if p_values else "–",
                    str(sum(scan["n_flagged"] for scan in scans)),
                    common.spread(scan["seconds"] for scan in scans),
                ]
            )
    return common.markdown(header, lines)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(5), cases=[case.name for case in CASES])
    code = common.run("clean", CASES, options)
    common.print_table("clean", table)
    sys.exit(code)
