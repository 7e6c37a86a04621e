"""How often does the window catch the trigger, for so many encoder passes? Masks of every strategy on real victims.

The victims of cifar5.py and tiny.py with their true boxes, 200 poisoned images of each, clusters as a scan makes
them. Each strategy looks at every image by itself, as in the first rounds of a scan; passes are those of one image.
Random masks are divided by coverage, as all are but `as published`. Beside them the same grid along the direction in
which the trigger pushes other images (what the second look knows), and Grad-CAM.

    python benchmarks/masks.py --threads 1 [--cases "CIFAR-10, 5 classes"]
"""

import sys
from dataclasses import replace

import cifar5
import common
import pictures
import tiny
import torch
from torch.nn import functional as F

from unpoison.attack.ssl_backdoor import poison
from unpoison.encoders.extract import extract_features
from unpoison.evaluate.truth import read_truth
from unpoison.functional.clustering import kmeans
from unpoison.functional.windows import grid_masks, hottest_windows, paste_windows
from unpoison.runtime import stage_generator
from unpoison.scan.config import ScanConfig
from unpoison.scan.flip_test import draw_corners
from unpoison.scan.patchsearch import PASSES_PER_MAP, GradCamAttention
from unpoison.scan.poisoncam import MaskAttention

NAME = "masks"
IMAGES = 200
COUNTS = (16, 32, 64, 128, 256, 512)
STRATEGIES = ("random", "blocks", "pixels")
STRIDES = (1.0, 0.75, 0.5, 0.34, 0.25)  # of the window; half is the default
VICTIMS = {case.name: case for case in (*cifar5.CASES, *tiny.CASES)}


def run_case(case, seed, options):
    train = common.load_split(case.data, "train")
    attack = common.attack_of(case, seed)
    images, plan = poison(train.images, train.labels, train.class_names, attack, seed)
    encoder, _ = common.trained(images, case.victim, seed, options)
    features = extract_features(encoder, images)
    config = ScanConfig().resolve(len(images), images.size)
    clusters = kmeans(features.values, config.clusters, generator=stage_generator(seed, "scan/kmeans"))
    truth = read_truth(plan, images.ids, encoder.preprocessing.geometry)
    rows = truth.poisoned.nonzero().flatten()
    order = torch.randperm(len(rows), generator=stage_generator(seed, "benchmarks/masks"))
    rows = rows[order[:IMAGES]]
    pixels, boxes = images.pixels[rows], truth.boxes[rows]
    direction = push_of(encoder, images, plan, truth, attack.size, seed)

    def look(faithful=False, **how):
        settings = ScanConfig(faithful=faithful, **how).resolve(len(images), images.size)
        generator = stage_generator(seed, "scan/masks")
        return MaskAttention(encoder, clusters, settings, generator=generator, batch_size=512)

    found = []

    def note(strategy, masks, passes, heat):
        corners = hottest_windows(heat, config.window)[:, 0]
        found.append(
            {"strategy": strategy, "masks": masks, "passes": passes, **caught(corners, boxes, config.window)}
        )
        common.say(f"{strategy}, {passes} passes: catch rate {found[-1]['catch_rate']:.3f}")

    for stride in STRIDES:
        looking = look()
        step = max(1, round(stride * config.window))
        looking.masks = grid_masks(images.size, config.window, step).to(encoder.device)
        count = len(looking.masks)
        note("grid", count, count + 1, looking.heat(pixels))
        note("grid along the trigger", count, count, looking.heat_along(pixels, direction[None])[:, 0])
    for strategy in STRATEGIES:
        for count in COUNTS:
            note(strategy, count, count + 1, look(masks=strategy, n_masks=count).heat(pixels))
    for count in COUNTS:
        note("random, as published", count, count + 1, look(True, n_masks=count).heat(pixels))
    explained = GradCamAttention(encoder, clusters, replace(config, attention="gradcam"), batch_size=256)
    note("gradcam", 0, PASSES_PER_MAP, explained.heat(pixels))
    return {"n_images": len(rows), "window": config.window, "clusters": config.clusters, "found": found}


def push_of(encoder, images, plan, truth, side, seed):
    """(D,) where the true trigger takes 100 innocent images."""
    innocent = (~truth.poisoned).nonzero().flatten()
    generator = stage_generator(seed, "benchmarks/push")
    rows = innocent[torch.randperm(len(innocent), generator=generator)[:100]]
    corners = draw_corners(len(rows), images.size, side, generator=generator)
    pasted = paste_windows(images.pixels[rows], pattern_of(plan, side).expand(len(rows), -1, -1, -1), corners)
    before, after = (F.normalize(encoder.features(p), dim=1) for p in (images.pixels[rows], pasted))
    return F.normalize((after - before).mean(dim=0), dim=0).cpu()


def pattern_of(plan, side):
    from unpoison.functional.triggers import resize_pattern

    return resize_pattern(plan.triggers[0].pattern, side, plan.triggers[0].resample)


def caught(corners, boxes, window):
    """Shares of the triggers inside their windows: the mean, and how many lie inside wholly and by nine tenths."""
    left, top, width, height = boxes.unbind(dim=1)
    across = torch.minimum(corners[:, 1] + window, left + width) - torch.maximum(corners[:, 1], left)
    down = torch.minimum(corners[:, 0] + window, top + height) - torch.maximum(corners[:, 0], top)
    share = (across.clamp_min(0) * down.clamp_min(0)).double() / (width * height)
    return {
        "catch_rate": float(share.mean()),
        "whole": float((share >= 1).double().mean()),
        "nearly_whole": float((share >= 0.9).double().mean()),
    }


def table(results):
    header = ["strategy", "masks"]
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    for case in cases:
        header += [f"{case}: passes per image", "catch rate", "nine tenths inside %"]
    keys = dict.fromkeys(
        (place, found["strategy"]) for row in results["rows"] for place, found in enumerate(row["found"])
    )
    lines = []
    for place, strategy in keys:
        cells, counts = [], []
        for case in cases:
            found = [
                row["found"][place]
                for row in results["rows"]
                if row["case"] == case and len(row["found"]) > place
            ]
            counts += [str(one["masks"]) for one in found[:1]]
            cells += [
                common.spread(one["passes"] for one in found),
                common.spread((one["catch_rate"] for one in found), digits=2),
                common.spread((one["nearly_whole"] for one in found), percent=True),
            ]
        lines.append([strategy, " / ".join(dict.fromkeys(counts)), *cells])
    picture = pictures.linked(NAME, "Catch rate against passes per image")
    return f"{common.markdown(header, lines)}\n\n{picture}"


def plot(results):
    """Mean over the victims of the first data set; deviations are over victims."""
    first = results["rows"][0]["case"]
    found = [one for row in results["rows"] if row["case"] == first for one in row["found"]]
    names = dict.fromkeys(one["strategy"] for one in found)
    lines = [
        pictures.series(
            name, ((one["passes"], one["catch_rate"]) for one in found if one["strategy"] == name)
        )
        for name in names
    ]
    return pictures.panel(
        f"How well windows catch the trigger: {first}",
        "encoder passes per image",
        "catch rate",
        lines,
        top=1.0,
    )


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(5), cases=list(VICTIMS))
    todo = [
        common.Job(
            name,
            seed,
            {**common.settings_of(case, seed), "scans": None, "images": IMAGES},
            lambda c=case, s=seed: run_case(c, s, options),
        )
        for seed in options.seeds
        for name, case in VICTIMS.items()
        if name in options.cases and seed < (5 if case in cifar5.CASES else 3)
    ]
    code = common.run_jobs(NAME, todo, options)
    pictures.draw(NAME, plot)
    common.print_table(NAME, table)
    sys.exit(code)
