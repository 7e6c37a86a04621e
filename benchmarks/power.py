"""How little poison is found? Scans that find it at rates of 0.05 to 5 %, beside what a scan says of itself.

planted   5 000 real images (five classes of CIFAR-10), one trigger on so many of one class, and the encoder of
          tests/toys.py: colours and contrasts of the picture, and one feature that the trigger fires and takes over.
          It stands for an attack that worked perfectly, so that what is lost here is lost by the search. Ten seeds,
          20 to 40 s each.
victim    the same images, and the encoder of cifar5.py trained on them; little poison teaches it little. Three seeds,
          about two minutes each. `patch moves` says what it learned: the power statement assumes 20 %.
victim, asked for
          the same victims, `--min-poison` of so many images, hence more clusters. 1 and 2 %, two seeds, four to six
          minutes each.

    python benchmarks/power.py --threads 1 [--cases planted] [--seeds 0 1]
"""

import sys
import time
from dataclasses import asdict

import cifar5
import common
import pictures
import torch
from masks import caught, pattern_of
from scipy.stats import beta

from unpoison.attack.ssl_backdoor import PatchAttackConfig, poison
from unpoison.encoders.extract import extract_features
from unpoison.evaluate.truth import read_truth
from unpoison.functional.clustering import assign, kmeans
from unpoison.functional.windows import paste_windows
from unpoison.runtime import stage_generator
from unpoison.scan.config import ScanConfig
from unpoison.scan.flip_test import draw_corners
from unpoison.scan.power import detection_probability, power_statement

sys.path.insert(0, str(common.ROOT / "tests"))
from toys import planted_encoder

NAME = "power"
RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
ASKED = "victim, asked for"
SEEDS = {"planted": 10, "victim": 3, ASKED: 2}
SIDE = 8


def attack_of(rate, seed):
    """As in all benchmarks, but the rate is one of all images."""
    return PatchAttackConfig(
        targets=(seed % cifar5.DATA.classes,),
        triggers=(f"seed:{100 + seed}",),
        size=SIDE,
        rate=rate,
        rate_of="dataset",
        margin=1 / cifar5.DATA.size,
    )


def config_of(kind, rate):
    return ScanConfig(min_poison=rate) if kind == ASKED else ScanConfig()


def rates_of(kind):
    """The trained encoder learns nothing from five images; its curve begins where there is something to find."""
    return {"planted": RATES, "victim": RATES[3:], ASKED: (0.01, 0.02)}[kind]


def run_case(kind, rate, seed, options):
    from unpoison.pipeline import scan

    train = common.load_split(cifar5.DATA, "train")
    images, plan = poison(train.images, train.labels, train.class_names, attack_of(rate, seed), seed)
    pattern = pattern_of(plan, SIDE)
    if kind == "planted":
        encoder = planted_encoder(pattern)
    else:
        encoder, _ = common.trained(images, cifar5.VICTIM, seed, options)
    started = time.perf_counter()
    result = scan(images, encoder, config=config_of(kind, rate), seed=seed)
    seconds = time.perf_counter() - started
    truth = read_truth(plan, [str(id_) for id_ in result.findings["id"]], encoder.preprocessing.geometry)
    config = config_of(kind, rate).resolve(len(images), images.size)
    row = {
        "kind": kind,
        "rate": rate,
        "n_images": len(images),
        "n_poisoned": len(plan.poisoned),
        "verdict": result.verdict,
        "detected": found_by(result, plan),
        "n_triggers": len(result.triggers),
        "n_flagged": len(result.flagged),
        "encoder_passes": result.summary["encoder_passes"],
        "seconds": seconds,
        "localised": localised(result, truth),
        "moved": moved(encoder, images, truth, pattern, config, seed),
        "stated": detection_probability(len(plan.poisoned), config, len(images)),
        "stated_smallest": power_statement(config, len(images), images.size).smallest_count,
        **common.quality(result, plan, images, encoder),
    }
    common.say(f"{kind} {rate:.2%}: {row['verdict']}, found {row['detected']}, stated {row['stated']:.2f}")
    return row


def found_by(result, plan):
    """Whether some confirmed trigger was cut from poisoned images, most of them at least."""
    planted = {image.id for image in plan.poisoned}
    return any(
        2 * sum(source in planted for source in trigger.source_ids) > len(trigger.source_ids)
        for trigger in result.triggers
    )


def localised(result, truth):
    """Share of the poisoned images among the scored ones whose window holds nine tenths of the trigger."""
    rows = torch.tensor(result.findings["scored"].to_numpy(dtype=bool)) & truth.poisoned
    if not bool(rows.any()):
        return None
    scored = result.findings[rows.numpy()]
    corners = torch.tensor(scored[["box_y", "box_x"]].to_numpy(dtype="int64"))
    return caught(corners, truth.boxes[rows], int(scored["box_w"].iloc[0]))["nearly_whole"]


def moved(encoder, images, truth, pattern, config, seed):
    """Share of 500 innocent images that the true trigger moves to the clusters which it fills most."""
    features = extract_features(encoder, images)
    clusters = kmeans(features.values, config.clusters, generator=stage_generator(seed, "scan/kmeans"))
    innocent = (~truth.poisoned).nonzero().flatten()
    generator = stage_generator(seed, "benchmarks/power")
    rows = innocent[torch.randperm(len(innocent), generator=generator)[:500]]
    corners = draw_corners(len(rows), images.size, SIDE, generator=generator)
    pasted = paste_windows(images.pixels[rows], pattern.expand(len(rows), -1, -1, -1), corners)
    after = assign(encoder.features(pasted).cpu(), clusters.centroids)
    gain = after.bincount(minlength=config.clusters) - clusters.assignment[rows].bincount(
        minlength=config.clusters
    )
    attractors = (gain >= 0.25 * gain.max()).nonzero().flatten()
    elsewhere = ~torch.isin(clusters.assignment[rows], attractors)
    return float(torch.isin(after[elsewhere], attractors).double().mean()) if bool(elsewhere.any()) else None


def groups(results):
    """(kind, rate) to rows, rates ascending."""
    keys = sorted({(row["kind"], row["rate"]) for row in results["rows"]})
    return {key: [row for row in results["rows"] if (row["kind"], row["rate"]) == key] for key in keys}


def table(results):
    header = [
        "encoder",
        "poisoned images (rate)",
        "scans",
        "found % (90 % interval)",
        "stated for such an attack %",
    ]
    header += [
        "thousand passes",
        "patch moves %",
        "of those scored, windows that frame it %",
        "recall / precision %",
        "other alarms",
    ]
    lines = []
    for (kind, rate), rows in groups(results).items():
        hits = sum(row["detected"] for row in rows)
        lines.append(
            [
                kind,
                f"{rows[0]['n_poisoned']} ({100 * rate:g} %)",
                str(len(rows)),
                f"{100 * hits / len(rows):.0f} ({interval(hits, len(rows))})",
                f"{100 * rows[0]['stated']:.0f}",
                common.spread(row["encoder_passes"] / 1000 for row in rows if "encoder_passes" in row),
                common.spread((row["moved"] for row in rows), percent=True),
                common.spread((row["localised"] for row in rows), percent=True),
                f"{common.spread((row['recall'] for row in rows), percent=True)} / "
                f"{common.spread((row['precision'] for row in rows), percent=True)}",
                str(sum(row["verdict"] == "poisoned" and not row["detected"] for row in rows)),
            ]
        )
    smallest = next(row["stated_smallest"] for row in results["rows"] if row["kind"] != ASKED)
    said = (
        f"The scan's own statement for these {results['rows'][0]['n_images']} images: {smallest} poisoned ones or more "
        "are found with a probability of at least 95 %, if the patch moves 20 % of other images and half of the "
        "windows frame it."
    )
    picture = pictures.linked(NAME, "Share of scans that find the poison against its rate")
    return f"{common.markdown(header, lines)}\n\n{said}\n\n{picture}"


def interval(hits, n, level=0.9):
    """Clopper and Pearson's, in whole percent.

    >>> interval(10, 10)
    '74–100'
    """
    tail = (1 - level) / 2
    low = beta.ppf(tail, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(1 - tail, hits + 1, n - hits) if hits < n else 1.0
    return f"{100 * low:.0f}–{100 * high:.0f}"


def plot(results):
    rows = [row for row in results["rows"] if row["kind"] != ASKED]
    names = {"planted": "found, planted detector", "victim": "found, trained victim"}
    lines = []
    for kind, name in names.items():
        found = groups({"rows": [row for row in rows if row["kind"] == kind]})
        shares = {rate: sum(r["detected"] for r in own) / len(own) for (_, rate), own in found.items()}
        lines.append(pictures.series(name, ((100 * rate, 100 * share) for rate, share in shares.items())))
    stated = {100 * row["rate"]: 100 * row["stated"] for row in rows}
    lines.append(pictures.series("stated: patch moves 20 %, half the windows frame it", stated.items()))
    return pictures.panel(
        f"Found, of {rows[0]['n_images']} images", "poisoned images, % of all", "% of scans", lines, top=100.0
    )


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(10), cases=list(SEEDS))
    todo = [
        common.Job(
            f"{kind}, {100 * rate:g} %",
            seed,
            {
                "data": asdict(cifar5.DATA),
                "attack": asdict(attack_of(rate, seed)),
                "victim": kind if kind == "planted" else asdict(cifar5.VICTIM),
                "scan": asdict(config_of(kind, rate)),
            },
            lambda k=kind, r=rate, s=seed: run_case(k, r, s, options),
        )
        for seed in options.seeds
        for kind in options.cases
        for rate in rates_of(kind)
        if seed < SEEDS[kind]
    ]
    code = common.run_jobs(NAME, todo, options)
    pictures.draw(NAME, plot)
    common.print_table(NAME, table)
    sys.exit(code)
