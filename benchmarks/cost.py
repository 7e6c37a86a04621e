"""What does the default search save, and lose? The same victims scanned by default, with racing, and as published.

Every victim is trained once and scanned by all settings with the same seed, so that differences are paired.
`--faithful` is dear: about 700 (at 32 px) encoder passes per image that is scanned, and its published classifier
would take 25 minutes of a core on top: it has 400 of its 2 000 steps here, so that its time is understated. Its scan of
5 000 images takes about ten minutes of one idle core with a ResNet, half an hour with a ViT; the others about one and
three.

The fewer the images, the smaller the saving: the published search has a tenth as many clusters as images, ours as
many as the smallest poison worth catching needs. The second table says what the counts become for other sizes.

    python benchmarks/cost.py --threads 1 [--cases "CIFAR-10, ResNet"] [--seeds 0 1]
"""

import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace

import cifar5
import common
import pictures
import tiny

from unpoison.attack.ssl_backdoor import poison
from unpoison.scan.config import ScanConfig
from unpoison.scan.cost import expected_cost

NAME = "cost"
SCANS = {
    "default": ScanConfig(),
    "race": ScanConfig(race=True),
    "faithful": ScanConfig(faithful=True, filter_steps=400),
}
QUALITY = ("top20", "top50", "catch_rate", "recall", "precision")
SIZES = (1_000, 2_500, 5_000, 10_000, 50_000)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One data set and kind of victim.

    Attributes:
        images: of the victim's training images, the first ones of each class, as many as are scanned.
        seeds: 0 up to this number.
        scans: of SCANS.
    """

    name: str
    data: common.Data
    victim: common.PretrainConfig
    side: int
    images: int
    seeds: int
    scans: tuple[str, ...] = ("default", "race", "faithful")

    @property
    def case(self):
        return common.Case(name=self.name, data=self.data, victim=self.victim, side=self.side)


CELLS = (
    Cell(name="CIFAR-10, ResNet", data=cifar5.DATA, victim=cifar5.VICTIM, side=8, images=5000, seeds=5),
    Cell(
        name="CIFAR-10, ViT",
        data=cifar5.DATA,
        # A quarter of `vit_tiny`'s usual width costs an eighth of its time. Of MoCo v2, v3 and SimCLR only the last
        # taught so small a ViT the trigger.
        victim=common.PretrainConfig(method="simclr", arch="vit_tiny", width=8, epochs=24, batch_size=128),
        side=8,
        images=5000,
        seeds=5,
        scans=("default", "faithful"),
    ),
    Cell(
        name="Tiny-ImageNet, ResNet",
        data=replace(tiny.DATA, size=32),
        victim=tiny.VICTIM,
        side=8,
        images=5000,
        seeds=5,
        scans=("default", "faithful"),
    ),
)


def jobs(options):
    for cell in CELLS:
        for seed in options.seeds:
            if cell.name in options.cases and seed < cell.seeds:
                # A half-finished cell has its victim's success and its default scan first.
                yield job(cell, seed, "victim", lambda c=cell, s=seed: attack_success(c, s, options))
                for name in cell.scans:
                    yield job(cell, seed, name, lambda c=cell, s=seed, n=name: scanned(c, s, n, options))


def job(cell, seed, what, compute):
    settings = {
        "cell": {**asdict(cell), "scans": [], "seeds": None},
        "attack": asdict(common.attack_of(cell.case, seed)),
        "scan": asdict(SCANS[what]) if what in SCANS else what,
    }
    return common.Job(f"{cell.name} / {what}", seed, settings, lambda: {"cell": cell.name, **compute()})


def victim_of(cell, seed, options):
    """The poisoned training images, their answer key, and the encoder trained on them."""
    train = common.load_split(cell.data, "train")
    attack = common.attack_of(cell.case, seed)
    images, plan = poison(train.images, train.labels, train.class_names, attack, seed)
    encoder, seconds = common.trained(images, cell.victim, seed, options)
    return train, images, plan, encoder, seconds


def attack_success(cell, seed, options):
    train, _, plan, encoder, seconds = victim_of(cell, seed, options)
    test = common.load_split(cell.data, "test")
    trigger = plan.triggers[0]
    said = {"seconds": seconds, **common.probes(encoder, train, test, trigger, seed)}
    common.say(f"{cell.name} victim: {common.brief(said)}")
    return {"victim": said}


def scanned(cell, seed, name, options):
    """One scan of a part of the images, beside the truth."""
    from unpoison.pipeline import scan

    train, images, plan, encoder, _ = victim_of(cell, seed, options)
    images, plan = first_images(images, train.labels, plan, cell.images)
    expected = expected_cost(SCANS[name].resolve(len(images), images.size), len(images), images.size)
    wall, processor = time.perf_counter(), time.process_time()
    result = scan(images, encoder, config=SCANS[name], seed=seed)
    row = {
        "scan": name,
        "n_images": len(images),
        "n_poisoned": len(plan.poisoned),
        "verdict": result.verdict,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
        "encoder_passes": result.summary["encoder_passes"],
        "expected_passes": expected.expected,
        "stage_seconds": result.summary["stages"],
        "n_flagged": len(result.flagged),
        **common.quality(result, plan, images, encoder),
    }
    common.say(f"{cell.name} {name}: {row['encoder_passes']} passes, {common.brief(row)}")
    return row


def first_images(images, labels, plan, count):
    """The first images of each class, `count` in all, and the part of the answer key that is about them."""
    classes = sorted(set(labels.tolist()))
    most = count // len(classes)
    rows = sorted(row for label in classes for row in (labels == label).nonzero().flatten()[:most].tolist())
    chosen = images.select(rows)
    kept = set(chosen.ids)
    plan = replace(plan, poisoned=tuple(image for image in plan.poisoned if image.id in kept))
    return replace(chosen, fingerprint=f"{images.fingerprint}, first {count}"), plan


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_cell(results):
    """Cell to scan to seed to row."""
    cells = {}
    for row in results["rows"]:
        name = row.get("scan", "victim")
        cells.setdefault(row["cell"], {}).setdefault(name, {})[row["seed"]] = row
    return cells


def table(results):
    picture = pictures.linked(NAME, "Seconds of each stage, as published and by default")
    return f"{measured(results)}\n\n{picture}\n\n{counted(results)}"


def measured(results):
    header = ["victim (ASR %)", "scan", "seeds", "encoder passes (fewer by)"]
    header += ["s of one CPU core (fewer by)", "s on a busy GPU (fewer by)"]
    header += ["top-20 / 50 %", "catch rate", "recall / precision %", "verdict"]
    header += ["less than faithful, mean points: top-20 / 50, catch rate, recall, precision"]
    lines = []
    for cell, scans in by_cell(results).items():
        success = common.spread(
            common.pick(row, "victim.linear.attack_success") for row in scans.get("victim", {}).values()
        )
        for name in (name for name in SCANS if name in scans):
            rows = scans[name]
            said = [row["verdict"] for row in rows.values()]

            def of(key, rows=rows, **how):
                return common.spread((row[key] for row in rows.values()), **how)

            lines.append(
                [
                    f"{cell} ({success})",
                    name,
                    str(len(rows)),
                    f"{of('encoder_passes')}{saving(scans, name, 'encoder_passes')}",
                    seconds(scans, name, gpu=False),
                    seconds(scans, name, gpu=True),
                    f"{of('top20', percent=True)} / {of('top50', percent=True)}",
                    of("catch_rate", digits=2),
                    f"{of('recall', percent=True)} / {of('precision', percent=True)}",
                    ", ".join(f"{said.count(v)} × {v}" for v in dict.fromkeys(said)),
                    paired(scans, name),
                ]
            )
    return common.markdown(header, lines)


def pairs(scans, name):
    """(row of this scan, row of the faithful one) of every seed that has both."""
    others = scans.get("faithful", {})
    return [(row, others[seed]) for seed, row in scans[name].items() if seed in others]


def seconds(scans, name, *, gpu):
    """What the scans took on that kind of device, and how many times less than the faithful ones there."""
    there = {
        other: {seed: row for seed, row in rows.items() if bool(row["machine"]["gpu"]) == gpu}
        for other, rows in scans.items()
        if other in (name, "faithful")
    }
    took = common.spread(row["cpu_seconds"] for row in there[name].values())
    return f"{took}{saving(there, name, 'cpu_seconds')}"


def saving(scans, name, key):
    """How many times less than the faithful scan of the same victim, the median over seeds."""
    both = pairs(scans, name)
    if name == "faithful" or not both:
        return ""
    return f" ({statistics.median(faithful[key] / row[key] for row, faithful in both):.1f}×)"


def paired(scans, name):
    """Mean over the seeds of the faithful value less this one, in points; positive = the default loses."""
    both = pairs(scans, name)
    if name == "faithful" or not both:
        return ""
    words = []
    for key in QUALITY:
        known = [f[key] - r[key] for r, f in both if r[key] is not None and f[key] is not None]
        words.append(f"{100 * statistics.fmean(known):+.1f}" if known else "–")
    return f"{words[0]} / {words[1]}, {words[2]}, {words[3]}, {words[4]}"


def counted(results):
    """What the model of scan/cost.py expects for as many images as a scan really sees, and how well it did here."""
    header = ["images", *(f"{name}: expected passes" for name in SCANS), "default fewer by", "race fewer by"]
    lines = []
    for size in SIZES:
        passes = {
            name: expected_cost(config.resolve(size, 32), size, 32).expected for name, config in SCANS.items()
        }
        lines.append(
            [
                f"{size} of 32 px",
                *(f"{count}" for count in passes.values()),
                f"{passes['faithful'] / passes['default']:.1f}×",
                f"{passes['faithful'] / passes['race']:.1f}×",
            ]
        )
    ratios = [row["encoder_passes"] / row["expected_passes"] for row in results["rows"] if "scan" in row]
    checked = f"Measured passes of the scans above, as a share of those expected: {common.spread(ratios, digits=2)}."
    return f"{common.markdown(header, lines)}\n\n{checked}"


def profile(results):
    """The mean seconds of each stage, before (as published) and after, of the first kind of victim."""
    slow = [row for row in results["rows"] if not row["machine"]["gpu"]]
    cell, scans = next(iter(by_cell({"rows": slow}).items()))
    seeds = set.intersection(*(set(rows) for rows in scans.values()))
    shown = {}
    for name in (name for name in ("faithful", "default", "race") if name in scans):
        rows = [scans[name][seed] for seed in sorted(seeds)]
        stages = dict.fromkeys(stage for row in rows for stage in row["stage_seconds"])
        shown[name] = {
            stage: statistics.fmean(row["stage_seconds"].get(stage, 0.0) for row in rows) for stage in stages
        }
    return pictures.bars(f"{cell}: seconds of each stage, mean over {len(seeds)} victims", shown)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(5), cases=[cell.name for cell in CELLS])
    code = common.run_jobs(NAME, jobs(options), options)
    pictures.draw(NAME, profile)
    common.print_table(NAME, table)
    sys.exit(code)
