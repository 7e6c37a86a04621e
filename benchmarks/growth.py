"""How do encoder passes and time grow with the number of images?

scan      CIFAR-10's 50 000 training images with half of one class poisoned (5 %), one encoder, trained on 10 000 of
          them; scans of 2 000, 5 000, 10 000, 20 000 and all. About ten minutes on one core, training included.
features  k-means of simulated features (64 numbers each) for 100 000, 300 000 and 1 000 000 images: the only other
          step that every image takes part in. About five minutes and 5 GB.

Passes for up to a million images come from the model of scan/cost.py, which the measured ones check.

    python benchmarks/growth.py --threads 1 [--cases scan]
"""

import importlib.util
import sys
import time
from dataclasses import asdict

import cifar10
import common
import numpy as np
import pictures
import torch
from cost import first_images
from torch.nn import functional as F

from unpoison.attack.ssl_backdoor import poison
from unpoison.functional.clustering import kmeans, similarity
from unpoison.runtime import stage_generator
from unpoison.scan.config import ScanConfig
from unpoison.scan.cost import expected_cost

NAME = "growth"
SIZES = (2_000, 5_000, 10_000, 20_000, 50_000)
SIMULATED = (100_000, 300_000, 1_000_000)
TRAINED_ON = 10_000
FEATURES = 64
ITERATIONS = 25  # what a scan allows k-means
CASE = common.Case(
    name="scan",
    data=common.Data(folder="cifar10", size=32, classes=10, train=5000, test=1),
    victim=cifar10.VICTIM,
    side=8,
    rate=0.5,
)


def poisoned(seed):
    train = common.load_split(CASE.data, "train")
    images, plan = poison(train.images, train.labels, train.class_names, common.attack_of(CASE, seed), seed)
    return images, train.labels, plan


def scanned(size, seed, options):
    from unpoison.pipeline import scan

    everything, labels, plan = poisoned(seed)
    shown, _ = first_images(everything, labels, plan, TRAINED_ON)
    encoder, _ = common.trained(shown, CASE.victim, seed, options)
    images, plan = first_images(everything, labels, plan, size)
    wall, processor = time.perf_counter(), time.process_time()
    result = scan(images, encoder, seed=seed)
    row = {
        "n_images": len(images),
        "n_poisoned": len(plan.poisoned),
        "clusters": result.summary["config"]["clusters"],
        "passes": {name: stage["actual"] for name, stage in result.summary["passes"].items()},
        "encoder_passes": result.summary["encoder_passes"],
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
        "stage_seconds": result.summary["stages"],
        "verdict": result.verdict,
        **common.quality(result, plan, images, encoder),
    }
    common.say(f"{size}: {row['encoder_passes']} passes, {row['cpu_seconds']:.0f} s, {common.brief(row)}")
    return row


def clustered(size, seed):
    """k-means of a mixture of a thousand directions, as many clusters as a scan of so many images takes."""
    generator = stage_generator(seed, "benchmarks/growth")
    centres = F.normalize(torch.randn(1000, FEATURES, generator=generator), dim=1)
    own = torch.randint(0, len(centres), (size,), generator=generator)
    values = F.normalize(centres[own] + 0.1 * torch.randn(size, FEATURES, generator=generator), dim=1)
    clusters = ScanConfig().resolve(size, CASE.data.size).clusters
    wall, processor = time.perf_counter(), time.process_time()
    found = kmeans(values, clusters, generator=generator)
    row = {
        "n_images": size,
        "clusters": clusters,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
        "mean_cosine": float(similarity(values, found.centroids).amax(dim=1).mean()),
    }
    return {**row, **clustered_by_faiss(values, clusters, seed)}


def clustered_by_faiss(values, clusters, seed):
    """The same by faiss, all points and as many iterations; nothing where it is not installed."""
    if importlib.util.find_spec("faiss") is None:
        return {}
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    settings = {"niter": ITERATIONS, "spherical": True, "max_points_per_centroid": len(values), "seed": seed}
    wall, processor = time.perf_counter(), time.process_time()
    other = faiss.Kmeans(FEATURES, clusters, **settings)
    other.train(values.numpy())
    return {
        "faiss_wall_seconds": time.perf_counter() - wall,
        "faiss_cpu_seconds": time.process_time() - processor,
        "faiss_mean_cosine": float(similarity(values, torch.from_numpy(other.centroids)).amax(dim=1).mean()),
    }


def exponent(points):
    """b of the best y = a · N^b through (N, y), and None for fewer than two points.

    >>> round(exponent([(10, 5.0), (100, 50.0), (1000, 500.0)]), 6)
    1.0
    """
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def parts(results):
    scans = sorted((r for r in results["rows"] if r["case"].startswith("scan")), key=lambda r: r["n_images"])
    features = sorted(
        (r for r in results["rows"] if r["case"].startswith("features")), key=lambda r: r["n_images"]
    )
    return scans, features


def expected(size):
    return expected_cost(ScanConfig().resolve(size, 32), size, 32).expected


def searched(row):
    """Passes beyond the one that every image needs."""
    return row["encoder_passes"] - row["n_images"]


def table(results):
    scans, features = parts(results)
    header = ["images", "poisoned", "clusters", "passes (expected)", "per image", "CPU s", "k-means s"]
    header += ["classifier s", "top-50 %", "recall / precision %", "verdict"]
    lines = [
        [
            str(row["n_images"]),
            str(row["n_poisoned"]),
            str(row["clusters"]),
            f"{row['encoder_passes']} ({expected(row['n_images'])})",
            f"{row['encoder_passes'] / row['n_images']:.1f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['stage_seconds'].get('clusters', 0):.1f}",
            f"{row['stage_seconds'].get('classifier', 0):.0f}",
            common.spread([row["top50"]], percent=True),
            f"{common.spread([row['recall']], percent=True)} / {common.spread([row['precision']], percent=True)}",
            row["verdict"],
        ]
        for row in scans
    ]
    for size in SIMULATED:
        timed = [row for row in features if row["n_images"] == size]
        faiss = [row["faiss_cpu_seconds"] for row in timed if "faiss_cpu_seconds" in row]
        lines.append(
            [
                f"{size}, expected",
                "",
                str(ScanConfig().resolve(size, 32).clusters),
                f"({expected(size)})",
                f"{expected(size) / size:.1f}",
                "",
                common.spread((row["cpu_seconds"] for row in timed), digits=1)
                + (f" (faiss {common.spread(faiss, digits=1)})" if faiss else ""),
                *[""] * 4,
            ]
        )
    return (
        f"{common.markdown(header, lines)}\n\n{fitted(scans)}\n\n{pictures.linked(NAME, 'Passes per image')}"
    )


def fitted(scans):
    if len(scans) < 2:
        return "Too few scans to fit an exponent."
    by = {
        "all passes": [(row["n_images"], row["encoder_passes"]) for row in scans],
        "the search's passes": [(row["n_images"], searched(row)) for row in scans],
    }
    for machine, name in ((False, "CPU seconds on a processor alone"), (True, "beside a GPU")):
        points = [(r["n_images"], r["cpu_seconds"]) for r in scans if bool(r["machine"]["gpu"]) == machine]
        if len({n for n, _ in points}) > 1:
            by[name] = points
    words = ", ".join(f"{name} as N^{exponent(points):.2f}" for name, points in by.items())
    largest = [row for row in scans if row["clusters"] > min(r["clusters"] for r in scans)]
    per = "; ".join(f"{searched(row) / row['clusters']:.0f} for {row['clusters']}" for row in largest)
    more = (
        f" Where N asks for more clusters, the search takes about as many passes for each: {per}."
        if per
        else ""
    )
    return (
        f"Fitted over the measured scans: {words}.{more} Beyond 80 000 images their number stays the same, "
        "and so does the search."
    )


def plot(results):
    scans, _ = parts(results)
    measured = pictures.series(
        "measured", ((row["n_images"], row["encoder_passes"] / row["n_images"]) for row in scans)
    )
    sizes = [*SIZES, *SIMULATED]
    ours = pictures.series("expected, default", ((size, expected(size) / size) for size in sizes))
    title = "Encoder passes per image"
    if len(scans) > 1:
        passes = exponent([(row["n_images"], row["encoder_passes"]) for row in scans])
        title += f" (all passes grow as N^{passes:.2f})"
    return pictures.panel(title, "images", "passes per image", [measured, ours])


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=[0], cases=["scan", "features"])
    base = {"case": asdict(CASE) | {"scans": None}, "scan": asdict(ScanConfig())}
    todo = [
        common.Job(f"scan {n}", s, {**base, "size": n}, lambda n=n, s=s: scanned(n, s, options))
        for s in options.seeds
        for n in SIZES
        if "scan" in options.cases
    ] + [
        common.Job(f"features {n}", s, {"size": n, "features": FEATURES}, lambda n=n, s=s: clustered(n, s))
        for s in options.seeds
        for n in SIMULATED
        if "features" in options.cases
    ]
    code = common.run_jobs(NAME, todo, options)
    pictures.draw(NAME, plot)
    common.print_table(NAME, table)
    sys.exit(code)
