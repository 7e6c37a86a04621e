"""How good do the encoders become, and how soon? kNN accuracy on CIFAR-10 of every method after 5, 10, 20, 40 epochs.

Ten classes, 500 images of each to train on and as neighbours, 200 to ask about. Every point is a training of its own
that runs its schedule to the end, so that the table says what so many epochs are worth; nothing is picked on the way.
Beside them the same vote on the pixels themselves, and on features of the networks as they are drawn. Settings are
each method's own.

    python benchmarks/pretraining.py --threads 1 --cases moco-v2 byol
"""

import sys

import common
import pictures

from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.encoders.extract import extract_features
from unpoison.evaluate.probes import knn
from unpoison.pretrain.loop import METHODS, PretrainConfig
from unpoison.records import Geometry
from unpoison.runtime import seeded

NAME = "pretraining"
DATA = common.Data(folder="cifar10", size=32, classes=10, train=500, test=200)
EPOCHS = (5, 10, 20, 40)


def jobs(options):
    """The short trainings of all methods first, so that a run that is stopped early still compares them."""
    for seed in options.seeds:
        yield common.Job("pixels", seed, settings(None), lambda: {"knn": vote(*splits(), pixels)})
        for arch in dict.fromkeys(PretrainConfig(method=method).recipe.arch for method in options.cases):
            yield common.Job(
                f"untrained {arch}",
                seed,
                settings(None),
                lambda arch=arch, seed=seed: {"knn": vote(*splits(), untrained(arch, seed, options))},
            )
        for epochs in EPOCHS:
            for method in options.cases:
                config = PretrainConfig(method=method, epochs=epochs)
                yield common.Job(
                    f"{method}, {epochs} epochs",
                    seed,
                    settings(config),
                    lambda config=config, seed=seed: measure(config, seed, options),
                )


def settings(config):
    return {
        "data": common.asdict(DATA),
        "config": None if config is None else common.asdict(config.resolve()),
    }


def splits():
    return common.load_split(DATA, "train"), common.load_split(DATA, "test")


def measure(config, seed, options):
    train, test = splits()
    encoder, seconds = common.trained(train.images, config, seed, options)
    accuracy = vote(train, test, lambda images: extract_features(encoder, images).values)
    common.say(f"kNN {100 * accuracy:.1f} % after {seconds:.0f} s")
    return {
        "method": config.method,
        "arch": config.recipe.arch,
        "epochs": config.epochs,
        "train_seconds": seconds,
        "knn": accuracy,
    }


def vote(train, test, features_of):
    found = knn(
        features_of(train.images), train.labels, features_of(test.images), n_classes=len(train.class_names)
    )
    return float((found.cpu() == test.labels).float().mean())


def pixels(images):
    return images.pixels.flatten(1).float() / 255 - 0.5


def untrained(arch, seed, options):
    """Features of a network as it is drawn."""
    size = splits()[0].images.size
    with seeded(seed, "benchmarks/pretraining"):
        network = build_backbone(Architecture(name=arch, image_size=size, width=PretrainConfig.width))
    encoder = Encoder(network, Preprocessing(geometry=Geometry(size, size)), device=options.device)
    return lambda images: extract_features(encoder, images).values


def table(results):
    """A line per method, a column per length of training: kNN accuracy, and the seconds that the training took."""
    rows = results["rows"]
    lengths = sorted({row["epochs"] for row in rows if "epochs" in row})
    header = ["method", "network", "seeds", *(f"{n} epochs: kNN % (s)" for n in lengths)]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if "method" in row):
        own = [row for row in rows if row.get("method") == method]
        cells = []
        for length in lengths:
            at = [row for row in own if row["epochs"] == length]
            accuracy = common.spread((row["knn"] for row in at), percent=True, digits=1)
            seconds = common.spread(row["train_seconds"] for row in at)
            cells.append(f"{accuracy} ({seconds})" if at else "–")
        seeds = len({row["seed"] for row in own})
        lines.append([method, own[0]["arch"], str(seeds), *cells])
    for case in dict.fromkeys(row["case"] for row in rows if "method" not in row):
        bare = common.spread((row["knn"] for row in rows if row["case"] == case), percent=True, digits=1)
        lines.append([case, "–", "–", bare, *[""] * (len(lengths) - 1)])
    return f"{common.markdown(header, lines)}\n\n{pictures.linked(NAME, 'kNN accuracy against epochs')}"


def plot(results):
    rows = results["rows"]
    lines = [
        pictures.series(
            method, ((row["epochs"], 100 * row["knn"]) for row in rows if row.get("method") == method)
        )
        for method in dict.fromkeys(row["method"] for row in rows if "method" in row)
    ]
    ends = (min(EPOCHS), max(EPOCHS))
    for row in rows:
        if "method" not in row and row["seed"] == rows[0]["seed"]:
            lines.append(pictures.series(row["case"], ((epochs, 100 * row["knn"]) for epochs in ends)))
    return pictures.panel("kNN accuracy, CIFAR-10, 5 000 images", "epochs", "%", lines)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=[0], cases=list(METHODS))
    code = common.run_jobs(NAME, jobs(options), options)
    pictures.draw(NAME, plot)
    common.print_table(NAME, table)
    sys.exit(code)
