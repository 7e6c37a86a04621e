"""How fast are pre-training and a scan, beside the bare encoder on the same machine, and where does a scan's time go?

The images are scikit-learn's digits with the demo's poison; what they show hardly matters for the speed. No data set is
needed. With the real images at hand, the victims of the other benchmarks are trained and scanned, too: how long does it
take where nothing else runs? Goal: at least 85 % of a scan's time inside the encoder.

    python benchmarks/throughput.py --threads 2
"""

import resource
import sys
import time
from dataclasses import replace

import cifar5
import cifar10
import common
import tiny
import torch

from unpoison.attack.ssl_backdoor import poison
from unpoison.demo import DIGITS, embedded_digits
from unpoison.encoders.encoder import Encoder
from unpoison.pretrain.loop import pretrain

NETWORKS = {
    "resnet10, width 32": DIGITS.victim,
    "resnet18, width 64": replace(DIGITS.victim, arch="resnet18", width=64),
    "vit_tiny, width 32": replace(DIGITS.victim, method="moco-v3", arch="vit_tiny"),
}
VICTIMS = {"cifar5": cifar5, "cifar10": cifar10, "tiny": tiny}
EPOCHS = 3  # enough for features that cluster; the rate is that of any length


class TimedEncoder(Encoder):
    """An encoder that knows how long it worked."""

    seconds = 0.0

    @classmethod
    def of(cls, encoder):
        timed = object.__new__(cls)
        timed.__dict__.update(encoder.__dict__)
        return timed

    def features(self, images):
        started = time.perf_counter()
        values = super().features(images)
        if values.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        return values


def bare_rate(encoder, pixels, *, batch_size=512, least=3.0):
    """Images per second of the encoder alone, full batches, for at least so many seconds."""
    batch = pixels[:batch_size].to(encoder.device)
    encoder.features(batch)
    shown, started = 0, time.perf_counter()
    while time.perf_counter() - started < least:
        encoder.features(batch).cpu()
        shown += len(batch)
    return shown / (time.perf_counter() - started)


def compiled_rate(encoder, pixels):
    """Images per second of the compiled encoder, and the seconds that compiling takes."""
    compiled = Encoder(
        encoder.network,
        encoder.preprocessing,
        device=encoder.device,
        precision="bf16" if encoder.precision == torch.bfloat16 else "fp32",
    ).compile()
    started = time.perf_counter()
    compiled.features(pixels[:512])
    seconds = time.perf_counter() - started
    return bare_rate(compiled, pixels), seconds


def measure(config, seed, options):
    images, labels, names = embedded_digits()
    poisoned, _ = poison(images, labels, names, DIGITS.attack, seed)
    config = replace(config, epochs=EPOCHS)
    started = time.perf_counter()
    encoder = pretrain(poisoned, config, seed=seed, device=options.device).encoder
    training = time.perf_counter() - started
    steps = EPOCHS * (len(poisoned) // min(config.batch_size, len(poisoned)))
    return {
        "n_images": len(poisoned),
        "pretrain_per_second": steps * config.batch_size / training,
        **measure_scan(poisoned, encoder, seed),
    }


def measure_scan(images, encoder, seed):
    """The scan's rate beside the encoder's, and how its time divides."""
    from unpoison.pipeline import scan

    before = bare_rate(encoder, images.pixels)
    timed = TimedEncoder.of(encoder)
    timed.images_shown = 0
    started = time.perf_counter()
    result = scan(images, timed, seed=seed)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    after = bare_rate(encoder, images.pixels)  # a shared machine changes its mind; both are reported
    compiled, compiling = compiled_rate(encoder, images.pixels)
    return {
        "compiled_per_second": compiled,
        "compile_seconds": compiling,
        "bare_per_second": [before, after],
        "scan_seconds": seconds,
        "images_shown": timed.images_shown,
        "scan_per_second": timed.images_shown / seconds,
        "share_inside_encoder": timed.seconds / seconds,
        "classifier_seconds": result.summary["stages"].get("classifier", 0.0),
        "verdict": result.verdict,
        # Of the whole process, training included: exact for the first row of a run, an upper bound for the others.
        "peak_memory_mib": peak,
    }


def measure_victim(benchmark, seed, options):
    """The same for a victim of another benchmark, and the seconds that its whole training takes."""
    train = common.load_split(benchmark.DATA, "train")
    attack = common.attack_of(benchmark.CASES[0], seed)
    images, _ = poison(train.images, train.labels, train.class_names, attack, seed)
    started = time.perf_counter()
    encoder = pretrain(images, benchmark.VICTIM, seed=seed, device=options.device).encoder
    training = time.perf_counter() - started
    shown = benchmark.VICTIM.epochs * len(images)
    return {
        "n_images": len(images),
        "train_seconds": training,
        "pretrain_per_second": shown / training,
        **measure_scan(images, encoder, seed),
    }


def table(results):
    header = [
        "encoder",
        "training, s",
        "pre-training, images/s",
        "bare encoder, images/s",
        "compiled (in s)",
        "scan, images shown/s",
    ]
    header += ["scan s", "of these the classifier", "share inside the encoder %", "peak memory, MiB"]
    rows = [
        [
            row["case"],
            f"{row['train_seconds']:.0f}" if "train_seconds" in row else "–",
            f"{row['pretrain_per_second']:.0f}",
            " … ".join(f"{rate:.0f}" for rate in sorted(row["bare_per_second"])),
            f"{row['compiled_per_second']:.0f} ({row['compile_seconds']:.0f})"
            if "compiled_per_second" in row
            else "–",
            f"{row['scan_per_second']:.0f}",
            f"{row['scan_seconds']:.1f}",
            f"{row['classifier_seconds']:.1f}",
            f"{100 * row['share_inside_encoder']:.0f}",
            f"{row['peak_memory_mib']:.0f}" if "peak_memory_mib" in row else "–",
        ]
        for row in results["rows"]
    ]
    return common.markdown(header, rows)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=[0], cases=[*NETWORKS, *VICTIMS])
    options.fresh = True  # a speed is measured now or not at all
    code = common.run_jobs(
        "throughput",
        [
            common.Job(
                f"{name}{common.device_suffix(options)}",
                seed,
                common.asdict(config),
                lambda c=config, s=seed: measure(c, s, options),
            )
            for seed in options.seeds
            for name, config in NETWORKS.items()
            if name in options.cases
        ]
        + [
            common.Job(
                f"{name}{common.device_suffix(options)}",
                seed,
                common.asdict(b.VICTIM),
                lambda b=b, s=seed: measure_victim(b, s, options),
            )
            for seed in options.seeds
            for name, b in VICTIMS.items()
            if name in options.cases
        ],
        options,
    )
    common.print_table("throughput", table)
    sys.exit(code)
