"""What keeping freed memory saves (src/unpoison/allocator.py): the same training and scan, with and without, in turns.

The images are those of cifar5.py, trained for a few epochs and then scanned; a new process for every measurement, since
the setting holds for a whole process. Peak memory is of the process.

    python benchmarks/allocator.py --seeds 0 1 2 --threads 1
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace

import cifar5
import common

EPOCHS = 4
_KEEPS = "UNPOISON_BENCHMARK_KEEPS_MEMORY"  # set in the measuring processes


def measure(seed, options):
    """Seconds and peak memory of both, and what keeping saves."""
    row = {}
    for keeps in ("no", "yes"):
        done = subprocess.run(
            [sys.executable, __file__, "--seeds", str(seed), "--threads", str(options.threads)],
            env={**os.environ, _KEEPS: keeps},
            check=True,
            capture_output=True,
            text=True,
        )
        row["kept" if keeps == "yes" else "returned"] = json.loads(done.stdout)
    return row


def work(seed, options):
    from unpoison.attack.ssl_backdoor import poison
    from unpoison.pipeline import scan
    from unpoison.pretrain.loop import pretrain

    train = common.load_split(cifar5.DATA, "train")
    attack = common.attack_of(cifar5.CASES[0], seed)
    images, _ = poison(train.images, train.labels, train.class_names, attack, seed)
    started = time.perf_counter()
    config = replace(cifar5.VICTIM, epochs=EPOCHS)
    encoder = pretrain(images, config, seed=seed, device=options.device).encoder
    trained = time.perf_counter()
    result = scan(images, encoder, seed=seed)
    return {
        "train_seconds": trained - started,
        "scan_seconds": time.perf_counter() - trained,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "verdict": result.verdict,
        "encoder_passes": result.summary["encoder_passes"],
    }


def table(results):
    rows, lines = results["rows"], []
    for name, key in (
        ("training, s", "train_seconds"),
        ("scan, s", "scan_seconds"),
        ("peak memory, MiB", "peak_memory_mib"),
    ):
        both = (common.spread(row[how][key] for row in rows) for how in ("returned", "kept"))
        ratio = common.spread((row["kept"][key] / row["returned"][key] for row in rows), digits=2)
        lines.append([name, str(len(rows)), *both, ratio])
    return common.markdown(["", "seeds", "memory returned", "memory kept", "ratio"], lines)


if __name__ == "__main__":
    keeps = os.environ.get(_KEEPS)
    if keeps == "no":
        common.keep_freed_memory = lambda: False
    options = common.parse(__doc__, seeds=range(3))
    if keeps:
        print(json.dumps(work(options.seeds[0], options)))
        sys.exit(0)
    settings = {"epochs": EPOCHS, "data": common.asdict(cifar5.DATA)}
    jobs = [
        common.Job("CIFAR-10, 5 classes", seed, settings, lambda s=seed: measure(s, options))
        for seed in options.seeds
    ]
    code = common.run_jobs("allocator", jobs, options)
    common.print_table("allocator", table)
    sys.exit(code)
