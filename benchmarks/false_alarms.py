"""How often does a scan of clean data raise an alarm? A hundred and more of them, none of the same images and encoder.

Seed s of a case draws its own images from the whole data set and its own encoder: trained on just these images, or
never trained. 1 250 images suffice for the statement, since the alarm rate does not depend on their number, and cost
10 to 30 seconds on one core, training included. An alarm is the verdict `poisoned`; the bound is that of a binomial
number of alarms at the stated alpha of 0.01.

The cases whose names begin with `not clean` hold something that recurs and is no patch trigger: a logo on some images
of one class (1 % of it), one patch on images of all classes alike, CTRL's waves. They count apart.

    python benchmarks/false_alarms.py --threads 1 [--cases "CIFAR-10, ResNet of width 16" digits] [--seeds 0 1]
"""

import sys
import time
from dataclasses import asdict, dataclass, replace

import cifar5
import common
import torch
from scipy.stats import beta

from unpoison.attack.ctrl import CtrlConfig
from unpoison.attack.ssl_backdoor import PatchAttackConfig, make_triggers, poison
from unpoison.data.load import load_images
from unpoison.data.sources import open_source
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.functional.triggers import resize_pattern
from unpoison.functional.windows import paste_windows
from unpoison.records import Geometry
from unpoison.runtime import seeded, stage_generator
from unpoison.scan.config import ScanConfig
from unpoison.scan.confirm import binomial_tail

NAME = "false_alarms"
COUNT = 1250
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of images and of encoder.

    Attributes:
        folder, size: see `common.Data`.
        victim: how the encoder is trained on the images; None leaves it at its random start.
        network: of an encoder that is not trained.
        planted: `logo`, `uniform` or `ctrl`; empty for clean images.
        seeds: 0 up to this number.
    """

    name: str
    seeds: int
    folder: str = "cifar10"
    size: int = 32
    victim: common.PretrainConfig | None = None
    network: str = ""
    width: int = 32
    planted: str = ""


def moco(width, epochs=12):
    return common.PretrainConfig(method="moco-v2", width=width, epochs=epochs, batch_size=128, queue_size=512)


VIT = common.PretrainConfig(method="moco-v3", arch="vit_tiny", width=8, epochs=6, batch_size=128)
CASES = (
    Case(name="CIFAR-10, ResNet of width 16", seeds=20, victim=moco(16)),
    Case(name="CIFAR-10, ResNet of width 32", seeds=20, victim=moco(32)),
    Case(name="CIFAR-10, ViT", seeds=8, victim=VIT),
    Case(name="CIFAR-10, ResNet, never trained", seeds=16, network="resnet10", width=16),
    Case(name="Tiny-ImageNet, ResNet", seeds=13, folder="tinyimagenet100", size=64, victim=moco(16)),
    Case(
        name="Tiny-ImageNet, RegNet of ImageNet's shape, never trained",
        seeds=10,
        folder="tinyimagenet100",
        size=64,
        network="regnetx_002",
    ),
    Case(name="digits", seeds=10, folder="digits", victim=moco(16)),
    Case(name="photos", seeds=10, folder="photos", victim=moco(16)),
    Case(name="not clean: a logo on 1 % of one class", seeds=3, victim=cifar5.VICTIM, planted="logo"),
    Case(name="not clean: one patch on all classes alike", seeds=3, victim=cifar5.VICTIM, planted="uniform"),
    Case(name="not clean: CTRL, patch search alone", seeds=3, victim=cifar5.VICTIM, planted="ctrl"),
)


def settings(case, seed):
    return {"case": {**asdict(case), "seeds": None}, "count": COUNT, "scan": asdict(config_of(case))}


def config_of(case):
    """The default; against CTRL without the screen that is made for it, to see that the patch search keeps quiet."""
    return ScanConfig(method="poisoncam") if case.planted == "ctrl" else ScanConfig()


def run_case(case, seed, options):
    from unpoison.pipeline import scan

    images = planted(case, seed) if case.planted else drawn(case, seed)
    if case.victim is None:
        encoder, training = untrained(case, images, seed, options), 0.0
    else:
        encoder, training = common.trained(images, case.victim, seed, options)
    started = time.perf_counter()
    result = scan(images, encoder, config=config_of(case), seed=seed)
    row = {
        "n_images": len(images),
        "train_seconds": training,
        "scan_seconds": time.perf_counter() - started,
        "encoder_passes": result.summary["encoder_passes"],
        "verdict": result.verdict,
        "reason": result.summary.get("reason", ""),
        "p_value": result.summary["p_value"],
        "finalists": result.summary["finalists"],
        "n_flagged": len(result.flagged),
        "n_benign_patterns": len(result.summary.get("benign_patterns", ())),
    }
    common.say(f"{row['verdict']}, p {row['p_value']}, {row['scan_seconds']:.0f} s")
    return row


def drawn(case, seed):
    """`COUNT` images, drawn from all that the data set has; fewer where it has no more."""
    generator = stage_generator(seed, "benchmarks/false alarms")
    if case.folder in ("digits", "photos"):
        images = common.load_split(data_of(case), "train").images
        rows = torch.randperm(len(images), generator=generator)[:COUNT].sort().values
        chosen = images.select(rows.tolist())
        return replace(chosen, fingerprint=f"{images.fingerprint}, {COUNT} drawn by {seed}")
    folder = common.data_root() / case.folder
    if not folder.is_dir():
        raise common.MissingDataError(f"no real images at {folder}: set UNPOISON_DATA to their folder")
    source = open_source(folder)
    ids = [id_ for id_ in source.ids if id_.startswith("train-")]
    rows = torch.randperm(len(ids), generator=generator)[:COUNT].sort().values.tolist()
    return load_images(source.select([ids[row] for row in rows]), Geometry(case.size, case.size), workers=1)


def data_of(case):
    return common.Data(folder=case.folder, size=case.size, classes=10, train=0, test=0)


def untrained(case, images, seed, options):
    """The random start of a network; ImageNet's mean and deviation for a network of its shape."""
    architecture = Architecture(name=case.network, image_size=case.size, width=case.width)
    with seeded(seed, "benchmarks/untrained"):
        network = build_backbone(architecture)
    preprocessing = Preprocessing(geometry=Geometry(images.size, images.size))
    return Encoder(network, preprocessing, name=f"{case.network}, never trained", device=options.device)


def planted(case, seed):
    """The five classes of cifar5.py with something on them that is no patch trigger."""
    split = common.load_split(cifar5.DATA, "train")
    if case.planted == "ctrl":
        config = CtrlConfig(target=seed % 5, rate=0.5, rate_of="class")
        return poison(split.images, split.labels, split.class_names, config, seed)[0]
    generator = stage_generator(seed, f"benchmarks/{case.planted}")
    attack = PatchAttackConfig(targets=(0,), triggers=(f"seed:{100 + seed}",), size=8)
    pattern = make_triggers(attack, split.class_names)[0].pattern
    patch = resize_pattern(pattern, 8, "nearest")
    if case.planted == "logo":  # always in the same corner, as watermarks are
        members = (split.labels == seed % 5).nonzero().flatten()
        rows = members[torch.randperm(len(members), generator=generator)[: len(members) // 100]]
        corners = torch.full((len(rows), 2), 23)
    else:
        rows = torch.randperm(len(split.images), generator=generator)[: len(split.images) // 10]
        corners = torch.randint(1, 32 - 8, (len(rows), 2), generator=generator)
    pixels = split.images.pixels.clone(memory_format=torch.channels_last)
    pixels[rows] = paste_windows(pixels[rows], patch.expand(len(rows), -1, -1, -1), corners)
    name = f"{split.images.fingerprint}, {case.planted} by {seed}"
    return replace(split.images, pixels=pixels, fingerprint=name)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(results):
    rows = [row for row in results["rows"] if not row["case"].startswith("not clean")]
    parts = [listed(results["rows"])]
    if rows:
        parts += [bound(rows), p_values(rows)]
    return "\n\n".join(parts)


def listed(rows):
    header = ["images and encoder", "scans", "said", "smallest p-value", "flagged", "recurring, harmless"]
    header += ["train s", "scan s"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        said = [row["verdict"] for row in own]
        known = [row["p_value"] for row in own if row["p_value"] is not None]
        lines.append(
            [
                case,
                str(len(own)),
                ", ".join(f"{said.count(verdict)} × {verdict}" for verdict in dict.fromkeys(said)),
                f"{min(known):.2g}" if known else "–",
                str(sum(row["n_flagged"] for row in own)),
                common.spread(row["n_benign_patterns"] for row in own),
                common.spread(row["train_seconds"] for row in own),
                common.spread(row["scan_seconds"] for row in own),
            ]
        )
    return common.markdown(header, lines)


def bound(rows, alpha=0.01):
    """Alarms beside what alpha allows."""
    n, alarms = len(rows), sum(row["verdict"] == "poisoned" for row in rows)
    unlikely = next(k for k in range(n + 2) if binomial_tail(k, n, alpha) <= 0.05)
    highest = float(beta.ppf(0.95, alarms + 1, n - alarms)) if alarms < n else 1.0
    return (
        f"**{alarms} alarms in {n} scans of clean images**; {sum(row['n_flagged'] > 0 for row in rows)} of them "
        f"flagged an image. At the stated rate of {alpha:g} there would be {unlikely} alarms or more with a "
        f"probability of at most 5 %, and {alarms} or more with one of {binomial_tail(alarms, n, alpha):.2f}. With "
        f"95 % confidence the rate is below {100 * highest:.1f} %."
    )


def p_values(rows):
    """How often the patch search's p-value is so small; at the edge of its null hypothesis as often as the level.

    Rows from before verdict.json held the finalists are left out.
    """
    recorded = [row["finalists"] for row in rows if "finalists" in row]
    tested = [finalists for finalists in recorded if finalists]
    smallest = [min(finalist["p_value"] for finalist in finalists) for finalists in tested]
    header = ["scans with a recurring patch to test", "patches", *(f"p ≤ {level:g}" for level in LEVELS)]
    counts = [f"{sum(p <= level for p in smallest)}" for level in LEVELS]
    cells = [f"{len(tested)} of {len(recorded)}", str(sum(map(len, tested))), *counts]
    return common.markdown(header, [cells])


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(20), cases=[case.name for case in CASES])
    # Seed by seed, so that a run that is stopped early has scans of every kind.
    todo = [
        common.Job(case.name, seed, settings(case, seed), lambda c=case, s=seed: run_case(c, s, options))
        for seed in options.seeds
        for case in CASES
        if case.name in options.cases and seed < case.seeds
    ]
    code = common.run_jobs(NAME, todo, options)
    common.print_table(NAME, table)
    sys.exit(code)
