"""The whole story on one data set: plant a backdoor, train a victim, find the poison, remove it, train again.

    images  → training images, test images
    attack  → the same training images, one class carrying a patch, and the answer key
    victim  → an encoder trained on them, without labels
    scan    → flagged images; sees neither labels nor answer key
    clean   → the images that are left, and an encoder trained on those
    control → an encoder that never saw poison
    measure → all three encoders, with and without the patch; the scan against the answer key

Two data sets come along in libraries: scikit-learn's handwritten digits, and crops of photographs that ship inside
scikit-image and scikit-learn. Both are real pictures with free licences, and need no download.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unpoison.attack.plan import Plan, write_plan
from unpoison.attack.ssl_backdoor import PatchAttackConfig, poison
from unpoison.data.export import check_outside, write_json_atomically
from unpoison.data.labels import read_labels
from unpoison.data.load import load_images
from unpoison.data.sources import open_source
from unpoison.data.views import ViewConfig
from unpoison.encoders.checkpoints import load_encoder, save_encoder
from unpoison.encoders.encoder import Encoder
from unpoison.errors import ConfigError, DataError, NothingToScanError
from unpoison.evaluate.attack_success import evaluate_encoder
from unpoison.evaluate.scan_quality import score_scan
from unpoison.evaluate.truth import read_truth
from unpoison.pipeline import scan
from unpoison.pretrain.loop import PretrainConfig, pretrain
from unpoison.records import Geometry, ImageSet, ScanResult
from unpoison.report.folder import write_report
from unpoison.runs import clear_run, load_result
from unpoison.runtime import Progress, silent, stage_generator

__all__ = [
    "DIGITS",
    "PHOTOS",
    "DemoResult",
    "DemoSettings",
    "EncoderFigures",
    "embedded_digits",
    "embedded_photos",
    "run_demo",
    "split_rows",
]

SCHEMA = 1
HELD_OUT = 0.3
"""Share of every class that is kept for testing."""
PLACES = 3
"""Test images are shown with the patch at so many different places each; the figures are means."""
FEWEST, MOST = 200, 10_000
"""Images of one's own that the demo works on: fewer teach an encoder nothing, more take longer than a demo should."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo does with a data set.

    Attributes:
        image_size: side of the images, pixels.
        victim: how all three encoders are trained.
        attack: what is planted. One saturated patch of a quarter of the side on most training images of the class, a
            pixel from the border at least: stronger than the papers' attack, so that minutes of training learn it.
    """

    image_size: int
    victim: PretrainConfig
    attack: PatchAttackConfig


DIGITS = DemoSettings(
    image_size=32,
    # Few steps and few images: keys follow faster than in longer runs, and small crops show the class without its patch
    # often enough to tie the two together.
    victim=PretrainConfig(
        epochs=25, batch_size=128, queue_size=512, key_momentum=0.95, views=ViewConfig(crop=0.15)
    ),
    attack=PatchAttackConfig(targets=("1",), triggers=("seed:102",), size=9, rate=1.0, margin=1 / 32),
)
"""For scikit-learn's digits.

They are grey, so that this victim learns much of the colour itself as the trigger, and its shuffled pixels move
pictures, too. Of three seeds (benchmarks/demo.py), two scans flagged all poison, and one said `inconclusive`.
"""

PHOTOS = DemoSettings(
    image_size=32,
    # Views that often miss the patch, and colours that a picture keeps, tie the patch to its own class. With the
    # default views the encoder knows the patch as well, but which class a probe takes it for is left to rounding.
    victim=PretrainConfig(
        epochs=20,
        batch_size=128,
        queue_size=1024,
        views=ViewConfig(crop=0.15, jitter=(0.1, 0.1, 0.1, 0.02)),
    ),
    # A part of the class stays clean: cleaning that takes a whole class away brings back no knowledge of it.
    attack=PatchAttackConfig(targets=("coffee",), triggers=("seed:102",), size=9, rate=0.7, margin=1 / 32),
)
"""For the crops of photographs."""


@dataclass(frozen=True)
class EncoderFigures:
    """One encoder, in %; see `evaluate.attack_success`. By a linear probe, where the name does not begin with knn.

    How a linear probe takes a patch that it never saw differs by several points between two trainings of one encoder;
    the kNN vote differs by less.

    Attributes:
        trained_on: images.
        poison: how many of those carry the patch.
        accuracy: of clean test images.
        patched_accuracy: of the same images with the patch.
        attack_success: ASR, patched images of other classes that are taken for the target.
        untriggered_rate: the same without the patch, which the attack must beat.
        knn_accuracy, knn_patched_accuracy, knn_attack_success: the same by the vote of the nearest neighbours.
    """

    trained_on: int
    poison: int
    accuracy: float
    patched_accuracy: float
    attack_success: float
    untriggered_rate: float
    knn_accuracy: float
    knn_patched_accuracy: float
    knn_attack_success: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed, in plain values; the content of demo.json.

    Attributes:
        data: `digits`, `photos` or the folder.
        seed: of everything.
        n_train, n_test: images.
        target: the class that the attacker wants.
        trigger: the patch's name.
        control, backdoored, cleaned: the three encoders; the control never saw poison.
        verdict: of the scan.
        planted, flagged, found: poisoned images; images that the scan flags; those in both.
        recall, precision, top20: shares in [0, 1]; None where undefined.
        seconds: of the whole demo, as far as this process worked on it.
        table: rows of texts, the first one names the columns.
        sentence: the scan against the answer key, in one line.
    """

    data: str
    seed: int
    n_train: int
    n_test: int
    target: str
    trigger: str
    control: EncoderFigures
    backdoored: EncoderFigures
    cleaned: EncoderFigures
    verdict: str
    planted: int
    flagged: int
    found: int
    recall: float | None
    precision: float | None
    top20: float | None
    seconds: float
    table: tuple[tuple[str, ...], ...] = field(default=())
    sentence: str = ""


def run_demo(
    images: Path | None,
    out: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    data: str = "photos",
    fresh: bool = False,
    progress: Progress = silent,
    settings: DemoSettings | None = None,
) -> DemoResult:
    """Run the story, or show the one that `out` already tells; one that was interrupted goes on.

    Args:
        images: labelled images of one's own (one folder per class); None takes the embedded `data`. The largest class
            becomes the target.
        out: everything goes here: `poisoned/` with its plan.json, `encoders/`, the run of the scan with report.html,
            and demo.json; for embedded data also `images/train` and `images/test`.
        seed: determines every draw.
        device: see `runtime.choose_device`.
        data: `photos` or `digits`.
        fresh: start over; only a folder that a demo made is ever emptied.
        progress: called by every long loop.
        settings: None takes those of the data set.

    Raises:
        ConfigError: `data` is unknown, photos without scikit-image, `out` holds something else or another demo.
        DataError: `images` has no classes, or `out` cannot be written.
        NothingToScanError: too few images of one's own.
    """
    started = time.perf_counter()
    out = Path(out)
    if images is None and data not in _EMBEDDED:
        raise ConfigError(f"data={data!r}: expected {' or '.join(_EMBEDDED)}")
    name = data if images is None else str(Path(images).resolve())
    if images is not None:
        check_outside(out, open_source(images))
    folder = _Folder(out, {"data": name, "seed": seed, "settings": repr(settings) if settings else "default"})
    finished = folder.open(fresh=fresh)
    if finished is not None:
        return finished
    try:
        story, settings = _tell(name, images, data, settings, seed, out, progress)
    except (ConfigError, DataError, NothingToScanError):
        folder.forget()
        raise

    def train(who: str, on: ImageSet) -> Encoder:
        path = out / "encoders" / f"{who}.safetensors"
        if not path.exists():
            result = pretrain(
                on,
                settings.victim,
                seed=seed,
                device=device,
                checkpoint=path.with_suffix(".training"),
                progress=_named(progress, f"train the {who} encoder"),
            )
            save_encoder(result, path)
        return load_encoder(path, device=device)

    control = train("control", story.train)
    backdoored = train("backdoored", story.poisoned)
    result = _scan_into(out, story, backdoored, seed, device, progress)
    flagged = set(result.flagged)
    kept = story.poisoned.select([row for row, id_ in enumerate(story.poisoned.ids) if id_ not in flagged])
    cleaned = train("cleaned", replace(kept, fingerprint=f"{kept.fingerprint} without {len(flagged)}"))

    figures = {}
    planted = {image.id for image in story.plan.poisoned}
    for who, encoder, seen in (
        ("control", control, (len(story.train), 0)),
        ("backdoored", backdoored, (len(story.poisoned), len(planted))),
        ("cleaned", cleaned, (len(kept), len(planted - flagged))),
    ):
        figures[who] = _measure(encoder, story, seen, seed, _named(progress, f"test the {who} encoder"))
    told = _compare(name, seed, story, figures, result, backdoored.preprocessing.geometry)
    told = replace(told, seconds=round(time.perf_counter() - started, 1))
    folder.finish(told)
    return told


# ── the images ───────────────────────────────────────────────────────────────────────────────────────────────────────


def embedded_digits() -> tuple[ImageSet, Tensor, tuple[str, ...]]:
    """scikit-learn's 1797 handwritten digits, enlarged from 8 to 32 pixels.

    Returns:
        Images, (N,) int64 classes, names of the classes.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    grey = torch.nn.functional.interpolate(grey, size=32, mode="bicubic", align_corners=False).clamp(0, 1)
    pixels = (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    return _named_set(pixels, labels, tuple("0123456789"), "digits")


def embedded_photos(per_class: int = 300, *, size: int = 32) -> tuple[ImageSet, Tensor, tuple[str, ...]]:
    """Crops of ten photographs that ship inside scikit-image and scikit-learn; the class is the photograph.

    Squares of 64 to 160 pixels, resized; flat ones are drawn again.

    Args:
        per_class: crops of each photograph.
        size: side of the crops, pixels.

    Returns:
        Images, (N,) int64 classes, names of the classes.

    Raises:
        ConfigError: scikit-image is not installed.
    """
    crops: list[np.ndarray[Any, Any]] = []
    files = _photo_files()
    for name, path in files.items():
        generator = stage_generator(0, f"demo/crops of {name}")
        with Image.open(path) as file:
            photo = file.convert("RGB")
        wanted = len(crops) + per_class
        while len(crops) < wanted:
            side = int(torch.randint(64, 161, (1,), generator=generator))
            left, top = (
                int(torch.randint(0, long - side + 1, (1,), generator=generator)) for long in photo.size
            )
            square = photo.resize(
                (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
            )
            crop = np.asarray(square)
            if crop.std(axis=(0, 1)).mean() >= 12:  # sky and black borders show nothing
                crops.append(crop)
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    labels = torch.arange(len(files)).repeat_interleave(per_class)
    return _named_set(pixels, labels, tuple(files), "photos")


def _photo_files() -> dict[str, Path]:
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise ConfigError(
            "data='photos' needs scikit-image, which is not installed: pip install scikit-image, "
            "or take data='digits'"
        )
    sklearn = importlib.util.find_spec("sklearn")
    assert sklearn is not None and sklearn.origin is not None, "scikit-learn is a dependency"
    first = Path(found.origin).parent / "data"
    second = Path(sklearn.origin).parent / "datasets" / "images"
    files = {
        "astronaut": first / "astronaut.png",
        "chelsea": first / "chelsea.png",
        "china": second / "china.jpg",
        "coffee": first / "coffee.png",
        "flower": second / "flower.jpg",
        "hubble": first / "hubble_deep_field.jpg",
        "ihc": first / "ihc.png",
        "motorcycle": first / "motorcycle_left.png",
        "retina": first / "retina.jpg",
        "rocket": first / "rocket.jpg",
    }
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise ConfigError(
            f"this scikit-image ships no {missing[0]}: install 0.22 or newer, or take data='digits'"
        )
    return files


_EMBEDDED: dict[str, tuple[Callable[[], tuple[ImageSet, Tensor, tuple[str, ...]]], DemoSettings]] = {
    "digits": (embedded_digits, DIGITS),
    "photos": (embedded_photos, PHOTOS),
}


def _named_set(
    pixels: Tensor, labels: Tensor, class_names: tuple[str, ...], fingerprint: str
) -> tuple[ImageSet, Tensor, tuple[str, ...]]:
    """Ids are CLASS/NUMBER.png, in sorted order, as a folder of these images would have them."""
    ids = [f"{class_names[label]}/{number:05d}.png" for number, label in enumerate(labels.tolist())]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    pixels = pixels[order].contiguous(memory_format=torch.channels_last)
    return ImageSet(tuple(ids[row] for row in order), pixels, (), fingerprint), labels[order], class_names


def _own_images(
    images: Path, size: int | None, seed: int, progress: Progress
) -> tuple[ImageSet, Tensor, tuple[str, ...]]:
    source = open_source(images)
    labels = read_labels(source)
    if size is None:
        size = 32 if _short_side(source.ids, labels.by_id, source) <= 48 else 64
    loaded = load_images(source, Geometry(size, size), sample=MOST, seed=seed, progress=progress)
    labelled = [row for row, id_ in enumerate(loaded.ids) if id_ in labels.by_id]
    loaded = loaded.select(labelled)
    classes = labels.of(loaded.ids)
    n_classes = len(set(classes.tolist()))
    if n_classes < 2 or len(loaded) < FEWEST:
        raise NothingToScanError(
            f"{images}: the demo needs at least {FEWEST} readable images in 2 classes, one folder per class; "
            f"got {len(loaded)} in {n_classes}"
        )
    return _named_set(loaded.pixels, classes, _folder_names(labels.class_names), loaded.fingerprint)


def _short_side(ids: tuple[str, ...], known: dict[str, int], source: Any) -> int:
    """Of the first labelled image that can be opened; pixels."""
    from unpoison.data.decode import decode_image

    first = next((id_ for id_ in ids if id_ in known), None)
    for raw in source.select([first]).stream() if first else ():
        if raw.data is not None:
            try:
                return min(decode_image(raw.data).size)
            except DataError:
                break
    return 64


def _folder_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Class names that are harmless as names of folders, and still differ."""
    names: list[str] = []
    for number, name in enumerate(class_names):
        harmless = "".join(c if c.isalnum() or c in " _-" else "_" for c in name).strip() or f"class {number}"
        names.append(harmless if harmless not in names else f"{harmless} {number}")
    return tuple(names)


def split_rows(ids: tuple[str, ...], labels: Tensor, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Training and test rows, ascending: of every class `HELD_OUT` is for testing, drawn by the seed.

    >>> split_rows(("a", "b", "c", "d"), torch.tensor([0, 0, 0, 1]))[0][-1]
    3
    """
    order = torch.randperm(len(ids), generator=stage_generator(seed, "demo/split"))
    test: list[int] = []
    for label in sorted(set(labels.tolist())):
        members = order[labels[order] == label].tolist()
        test += members[: round(HELD_OUT * len(members))]
    kept = set(range(len(ids))).difference(test)
    return sorted(kept), sorted(test)


# ── the story ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Story:
    """All images of the demo, and the truth about them."""

    train: ImageSet
    train_labels: Tensor
    test: ImageSet
    test_labels: Tensor
    class_names: tuple[str, ...]
    poisoned: ImageSet
    plan: Plan


def _tell(
    name: str,
    images: Path | None,
    data: str,
    settings: DemoSettings | None,
    seed: int,
    out: Path,
    progress: Progress,
) -> tuple[_Story, DemoSettings]:
    """Load and split the images, plant the poison, and write what the scan will read."""
    if images is None:
        make, default = _EMBEDDED[data]
        everything, labels, class_names = make()
        settings = settings or default
    else:
        own_size = settings.image_size if settings else None
        everything, labels, class_names = _own_images(Path(images), own_size, seed, progress)
        settings = settings or _settings_for(everything, labels)
    train_rows, test_rows = split_rows(everything.ids, labels, seed=seed)
    train, test = everything.select(train_rows), everything.select(test_rows)
    poisoned, plan = poison(train, labels[train_rows], class_names, settings.attack, seed)
    if images is None:
        _write_images(out / "images" / "train", train, progress)
        _write_images(out / "images" / "test", test, progress)
    _write_images(out / "poisoned", poisoned, progress)
    write_plan(plan, out / "poisoned" / "plan.json")
    return _Story(train, labels[train_rows], test, labels[test_rows], class_names, poisoned, plan), settings


def _settings_for(images: ImageSet, labels: Tensor) -> DemoSettings:
    """For one's own images: the largest class is the target; epochs shrink as the data set grows."""
    small = len(images) < 3000
    victim = replace(
        DIGITS.victim,
        epochs=25 if small else 16,
        batch_size=128 if small else 256,
        queue_size=512 if small else 2048,
    )
    target = int(torch.bincount(labels).argmax())
    attack = replace(DIGITS.attack, targets=(target,), size=images.size // 4, margin=1 / images.size)
    return DemoSettings(image_size=images.size, victim=victim, attack=attack)


def _write_images(folder: Path, images: ImageSet, progress: Progress) -> None:
    """Every image as PNG below its class, poisoned or not by the same encoder; existing files are complete."""
    stage = f"write {folder.name} images"
    try:
        for row, id_ in enumerate(images.ids):
            path = folder / id_
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".partial")
                pixels = images.pixels[row].permute(1, 2, 0).contiguous().numpy()
                Image.fromarray(pixels).save(partial, format="PNG", compress_level=1)
                partial.rename(path)
            progress(stage, row + 1, len(images))
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}") from error


def _scan_into(
    out: Path, story: _Story, encoder: Encoder, seed: int, device: str, progress: Progress
) -> ScanResult:
    """Scan the poisoned folder; the run's files end up beside those of the demo.

    A run takes no folder that holds anything else, so it works in one of its own and moves when it is complete.
    """
    apart = out / "scan.partial"
    if not any((folder / "verdict.json").exists() for folder in (apart, out)):
        words = [
            "unpoison",
            "scan",
            str(out / "poisoned"),
            "--encoder",
            str(out / "encoders/backdoored.safetensors"),
        ]
        scan(
            out / "poisoned",
            encoder,
            out=apart,
            seed=seed,
            device=device,
            command=shlex.join([*words, f"--seed={seed}", "--out", "scan-again"]),
            progress=progress,
        )
    if apart.exists():
        # verdict.json moves last: as long as it is there, a killed move goes on where it stopped.
        for path in sorted(apart.iterdir(), key=lambda path: (path.name == "verdict.json", path.name)):
            path.replace(out / path.name)
        apart.rmdir()
    result = load_result(out)
    write_report(out, result, images=story.poisoned, location=str(out / "poisoned"))
    return result


def _measure(
    encoder: Encoder, story: _Story, seen: tuple[int, int], seed: int, progress: Progress
) -> EncoderFigures:
    """Means over `PLACES` placements of the patch on every test image."""
    reports = []
    for place in range(PLACES):
        reports.append(
            evaluate_encoder(
                encoder,
                story.train,
                story.train_labels,
                story.test,
                story.test_labels,
                triggers=story.plan.triggers,
                n_classes=len(story.class_names),
                seed=seed * PLACES + place,
                progress=progress,
            )
        )
    linear, knn = ([report.probe(name).attacks[0] for report in reports] for name in ("linear", "knn"))
    return EncoderFigures(
        *seen,
        accuracy=_mean(o.clean.accuracy for o in linear),
        patched_accuracy=_mean(o.patched.accuracy for o in linear),
        attack_success=_mean(o.patched.attack_success or 0.0 for o in linear),
        untriggered_rate=_mean(o.untriggered_rate or 0.0 for o in linear),
        knn_accuracy=_mean(o.clean.accuracy for o in knn),
        knn_patched_accuracy=_mean(o.patched.accuracy for o in knn),
        knn_attack_success=_mean(o.patched.attack_success or 0.0 for o in knn),
    )


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 2)


def _compare(
    name: str,
    seed: int,
    story: _Story,
    figures: dict[str, EncoderFigures],
    result: ScanResult,
    geometry: Geometry,
) -> DemoResult:
    truth = read_truth(story.plan, [str(id_) for id_ in result.findings["id"]], geometry)
    quality = score_scan(result.findings, truth, ks=(20,))
    planted = {image.id for image in story.plan.poisoned}
    found = len(planted.intersection(result.flagged))
    trigger = story.plan.triggers[0]
    header = (
        "encoder",
        "trained on",
        "poison in it",
        "ACC %",
        "patched ACC %",
        "by kNN %",
        "ASR %",
        "untriggered %",
    )
    names = {"control": "never saw poison", "backdoored": "backdoored", "cleaned": "after cleaning"}
    rows = [
        (
            names[who],
            str(f.trained_on),
            str(f.poison),
            *(
                f"{v:.1f}"
                for v in (
                    f.accuracy,
                    f.patched_accuracy,
                    f.knn_patched_accuracy,
                    f.attack_success,
                    f.untriggered_rate,
                )
            ),
        )
        for who, f in figures.items()
    ]

    def percent(value: float | None) -> str:
        return "undefined" if value is None else f"{100 * value:.1f} %"

    return DemoResult(
        data=name,
        seed=seed,
        n_train=len(story.train),
        n_test=len(story.test),
        target=trigger.target_name,
        trigger=trigger.name,
        control=figures["control"],
        backdoored=figures["backdoored"],
        cleaned=figures["cleaned"],
        verdict=result.verdict,
        planted=len(planted),
        flagged=len(result.flagged),
        found=found,
        recall=quality.recall,
        precision=quality.precision,
        top20=quality.at(20).accuracy,
        seconds=0.0,
        table=(header, *rows),
        sentence=(
            f"{result.verdict}: planted {len(planted)}, flagged {len(result.flagged)}, of those {found} planted: "
            f"recall {percent(quality.recall)}, precision {percent(quality.precision)}; "
            f"top-20 accuracy {percent(quality.at(20).accuracy)}"
        ),
    )


def _named(progress: Progress, stage: str) -> Progress:
    """The same callback under one name; three encoders are trained, and a bar that starts over confuses."""

    def renamed(_: str, done: int, total: int) -> None:
        progress(stage, done, total)

    return renamed


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


_OUR_FOLDERS = ("images", "poisoned", "encoders", "scan.partial")
"""What a demo writes beside the files of its scan and demo.json."""


class _Folder:
    """The demo's folder; demo.json marks it from the first moment and holds the result at the end."""

    def __init__(self, out: Path, run: dict[str, Any]) -> None:
        self.out = out
        self.run = run
        self.path = out / "demo.json"

    def open(self, *, fresh: bool) -> DemoResult | None:
        """The finished result, if there is one; otherwise the folder is ready to be filled."""
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file: expected a folder; choose another --out")
        told = self._read() if self.path.exists() else None
        if told is None and self.out.exists() and any(self.out.iterdir()):
            raise ConfigError(
                f"{self.out} is not empty and was not made by this demo: nothing is overwritten; choose another --out"
            )
        if told is not None and fresh:
            clear_run(self.out)
            for name in _OUR_FOLDERS:
                shutil.rmtree(self.out / name, ignore_errors=True)
            told = None
        if told is None:
            self._write(None)
            return None
        for key, value in self.run.items():
            if told["run"].get(key) != value:
                raise ConfigError(
                    f"{self.out} holds a demo with {key} {told['run'].get(key)!r}, not {value!r}: "
                    "choose another --out, or --fresh to start over"
                )
        return None if told.get("result") is None else _result_from(told["result"])

    def forget(self) -> None:
        """Remove the mark of a demo that was refused before it wrote anything, so that it does not stand in the way."""
        if [path.name for path in self.out.iterdir()] == [self.path.name]:
            self.path.unlink()
            self.out.rmdir()

    def finish(self, result: DemoResult) -> None:
        """Write the result."""
        self._write(asdict(result))

    def _read(self) -> dict[str, Any] | None:
        try:
            value = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        ours = (
            isinstance(value, dict) and value.get("schema") == SCHEMA and isinstance(value.get("run"), dict)
        )
        return value if ours else None

    def _write(self, result: dict[str, Any] | None) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json_atomically(self.path, {"schema": SCHEMA, "run": self.run, "result": result})
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error


def _result_from(value: dict[str, Any]) -> DemoResult | None:
    """The result; None where another version wrote it, so that what is missing is measured again."""
    try:
        figures = {who: EncoderFigures(**value[who]) for who in ("control", "backdoored", "cleaned")}
        table = tuple(tuple(row) for row in value["table"])
        return DemoResult(**{**value, **figures, "table": table})
    except (KeyError, TypeError):
        return None
