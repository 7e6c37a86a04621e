"""The demo over several seeds: does the attack take hold, is the poison found, does cleaning help?

python benchmarks/demo.py --seeds 0 1 2 3 4 --threads 1 [--cases digits photos]
"""

import shutil
import sys
import time
from dataclasses import asdict

import common

DATA = ("digits", "photos")


def measure(data, seed, options):
    from unpoison.demo import run_demo

    out = common.KEPT / f"demo-{data}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    result = run_demo(None, out, seed=seed, device=options.device, data=data, fresh=True)
    return {"demo_seconds": round(time.perf_counter() - started, 1), "result": asdict(result)}


def table(results):
    header = [
        "images",
        "seeds",
        "s",
        "encoder",
        "ACC %",
        "patched ACC %",
        "by kNN %",
        "ASR %",
        "untriggered %",
    ]
    header += ["top-20 %", "recall %", "precision %", "verdict"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]

        def of(path, rows=rows, **how):
            return common.spread((common.pick(row, path) for row in rows), **how)

        said = [row["result"]["verdict"] for row in rows]
        verdict = ", ".join(f"{said.count(v)} × {v}" for v in dict.fromkeys(said))
        found = [of(f"result.{k}", percent=True) for k in ("top20", "recall", "precision")]
        for number, name in enumerate(("control", "backdoored", "cleaned")):
            keys = (
                "accuracy",
                "patched_accuracy",
                "knn_patched_accuracy",
                "attack_success",
                "untriggered_rate",
            )
            lines.append(
                [
                    *([case, str(len(rows)), of("demo_seconds")] if number == 0 else [""] * 3),
                    {"control": "clean-trained control", "cleaned": "after cleaning"}.get(name, name),
                    *(of(f"result.{name}.{key}", digits=1) for key in keys),
                    *([*found, verdict] if number == 0 else [""] * 4),
                ]
            )
    return common.markdown(header, lines)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(5), cases=DATA)
    code = common.run_jobs(
        "demo",
        [
            common.Job(data, seed, {}, lambda d=data, s=seed: measure(d, s, options))
            for data in options.cases
            for seed in options.seeds
        ],
        options,
    )
    common.print_table("demo", table)
    sys.exit(code)
