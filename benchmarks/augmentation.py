"""Random views per second: ours beside kornia's, the same kinds at the same strengths, on the same batch, in turns.

A view is a random crop, resized, mirrored half of the time, with jitter of its colours, now and then grey, and (the
second row of each size) now and then blurred. kornia draws per image, too (`same_on_batch=False`). The pictures are
noise: no step looks at what they show.

    pip install 'unpoison[bench]'
    python benchmarks/augmentation.py --threads 1
"""

import statistics
import sys
import time

import common
import torch

from unpoison.data.views import ViewConfig, random_views
from unpoison.runtime import stage_generator

NAME = "augmentation"
ROUNDS, LEAST = 7, 1.0  # turns, and seconds of each
SIZES = {32: 256, 64: 128, 224: 32}  # side to batch


def config_of(blur):
    return ViewConfig(
        crop=0.2,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_probability=0.8,
        grey_probability=0.2,
        blur_probability=0.5 if blur else 0.0,
    )


def theirs_of(config, size):
    from kornia import augmentation as k

    brightness, contrast, saturation, hue = config.jitter
    steps = [
        k.RandomResizedCrop((size, size), scale=(config.crop, 1.0)),
        k.RandomHorizontalFlip(p=0.5),
        k.ColorJitter(brightness, contrast, saturation, hue, p=config.jitter_probability),
        k.RandomGrayscale(p=config.grey_probability),
    ]
    if config.blur_probability:
        side = max(3, round(size / 10) | 1)
        steps.append(k.RandomGaussianBlur((side, side), (0.1, 2.0), p=config.blur_probability))
    return k.AugmentationSequential(*steps, data_keys=["input"])


def measure(size, blur, seed, options):
    """Views per second of either, in turns: a shared machine slows whoever is running."""
    config, batch = config_of(blur), SIZES[size]
    pixels = torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    ).to("cuda" if options.device == "cuda" else "cpu")
    generator, theirs = stage_generator(seed, "benchmarks/augmentation"), theirs_of(config, size)
    work = {
        "ours": lambda: random_views(pixels, config, generator=generator),
        "kornia": lambda: theirs(pixels.float() / 255),
    }
    rates = {name: [] for name in work}
    for turn in range(1 + ROUNDS):
        for name, step in work.items():
            done, started = 0, time.perf_counter()
            while time.perf_counter() - started < LEAST:
                step()
                done += batch
            if turn:  # the first one warms up
                rates[name].append(done / (time.perf_counter() - started))
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["kornia"], strict=True))
    common.say(f"{size} px, blur {blur}: ratio {ratio:.2f}")
    return {"size": size, "blur": blur, "batch": batch, "rates": rates, "ratio": ratio}


def table(results):
    header = ["size", "views", "ours, views/s", "kornia, views/s", "ratio (median of turns)"]
    lines = [
        [
            f"{row['size']} px",
            "crop, mirror, colours" + (", blur" if row["blur"] else ""),
            common.spread(row["rates"]["ours"]),
            common.spread(row["rates"]["kornia"]),
            f"{row['ratio']:.1f}",
        ]
        for row in results["rows"]
    ]
    return common.markdown(header, lines)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=[0], cases=[f"{size} px" for size in SIZES])
    options.fresh = True  # a speed is measured now or not at all
    jobs = [
        common.Job(
            f"{size} px{', blur' if blur else ''}{common.device_suffix(options)}",
            seed,
            {"views": common.asdict(config_of(blur)), "batch": SIZES[size]},
            lambda s=size, b=blur, n=seed: measure(s, b, n, options),
        )
        for size in SIZES
        if f"{size} px" in options.cases
        for blur in (False, True)
        for seed in options.seeds
    ]
    code = common.run_jobs(NAME, jobs, options)
    common.print_table(NAME, table)
    sys.exit(code)
