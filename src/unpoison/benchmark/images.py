"""Labelled images of a study: a data set of UNPOISON_DATA, one's own folder, or images that come along."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unpoison.benchmark.task import DataConfig
from unpoison.data.labels import Labels, read_labels
from unpoison.data.load import load_images
from unpoison.data.sources import ImageSource, open_source
from unpoison.demo import embedded_digits, embedded_photos
from unpoison.errors import DataError
from unpoison.records import Geometry, ImageSet
from unpoison.runtime import Progress, silent

__all__ = ["Chosen", "Split", "choose", "data_root", "digest", "first_of_each_class", "load"]


@dataclass(frozen=True, eq=False)
class Split:
    """Decoded images with their classes.

    Attributes:
        images: training or test images.
        labels: (N,) int64 into `class_names`.
        class_names: of the whole data set, as far as it is used.
    """

    images: ImageSet
    labels: Tensor
    class_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which images a study takes, before any is decoded.

    Attributes:
        train, test: ids.
        class_names: what the labels mean.
        signature: changes when the images may have changed.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    class_names: tuple[str, ...]
    signature: str


_LATER = {"i_cutmix": False, "distill": None}
"""Settings that came after the first results, and the value that leaves everything as it was."""


def digest(value: Any) -> str:
    """20 hex digits that stand for a plain value; settings that came later count only where they change something.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1, "i_cutmix": False})
    True
    """
    text = json.dumps(_without_later(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _without_later(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_later(part)
            for key, part in value.items()
            if key not in _LATER or part != _LATER[key]
        }
    return [_without_later(part) for part in value] if isinstance(value, list | tuple) else value


def data_root() -> Path:
    """Where data sets lie that a task names by their folder: UNPOISON_DATA, else ../shared/data."""
    return Path(os.environ.get("UNPOISON_DATA", "../shared/data")).resolve()


def choose(data: DataConfig, root: Path) -> Chosen:
    """The images of a study; reads names and labels only.

    Args:
        data: where from, and how many.
        root: the folder that relative paths start at.

    Raises:
        DataError: no such data, or too few images of some class.
    """
    if data.embedded:
        images, labels, names = _embedded(data)
        by_id = dict(zip(images.ids, labels.tolist(), strict=True))
        train, test = _apart(by_id, data.held_out)
        return _chosen(data, by_id, train, by_id, test, names, data.embedded)
    (train_source, train_labels), (test_source, test_labels) = _sources(data, root)
    names = train_labels.class_names
    if test_source is train_source:
        train, test = _apart(train_labels.by_id, data.held_out)
        signature = train_source.signature()
        return _chosen(data, train_labels.by_id, train, test_labels.by_id, test, names, signature)
    if test_labels.class_names != names:
        test_only = sorted(set(test_labels.class_names) - set(names))
        if test_only:
            raise DataError(
                f"the test images have the class {test_only[0]!r}, which the training images lack: "
                "expected the same classes in both"
            )
    place = {index: names.index(name) for index, name in enumerate(test_labels.class_names)}
    numbered = {id_: place[label] for id_, label in test_labels.by_id.items()}
    signature = digest([train_source.signature(), test_source.signature()])
    return _chosen(data, train_labels.by_id, train_source.ids, numbered, test_source.ids, names, signature)


def load(data: DataConfig, root: Path, *, progress: Progress = silent) -> tuple[Split, Split]:
    """The training and the test images, decoded.

    Raises:
        DataError: as `choose`.
    """
    chosen = choose(data, root)
    names = chosen.class_names
    if data.embedded:
        images, labels, _ = _embedded(data)
        row_of = {id_: row for row, id_ in enumerate(images.ids)}
        rows = [[row_of[id_] for id_ in ids] for ids in (chosen.train, chosen.test)]
        train, test = (Split(images.select(part), labels[part], names) for part in rows)
        return train, test
    (train_source, train_labels), (test_source, test_labels) = _sources(data, root)
    geometry = Geometry(data.size, data.resize or data.size)
    splits = []
    for source, known, ids in (
        (train_source, train_labels, chosen.train),
        (test_source, test_labels, chosen.test),
    ):
        # Ids come in the order of the source, whatever order they were chosen in.
        images = load_images(source.select(ids), geometry, progress=progress)
        labels = known.of(images.ids)
        for row, index in enumerate(labels.tolist()):
            labels[row] = names.index(known.class_names[index])
        splits.append(Split(images, labels, names))
    return splits[0], splits[1]


def first_of_each_class(
    ids: Iterable[str], labels: Mapping[str, int], classes: Collection[int], most: int | None
) -> tuple[tuple[str, ...], dict[int, int]]:
    """The first `most` ids of each class, in the given order, and how many each class lacks.

    >>> first_of_each_class("abcd", {"a": 0, "b": 0, "c": 1, "d": 2}, {0, 1}, 1)
    (('a', 'c'), {0: 0, 1: 0})
    """
    taken = dict.fromkeys(classes, 0)
    chosen = []
    for id_ in ids:
        label = labels.get(id_, -1)
        if label in taken and (most is None or taken[label] < most):
            taken[label] += 1
            chosen.append(id_)
    least = 1 if most is None else most
    return tuple(chosen), {label: max(0, least - count) for label, count in taken.items()}


def _chosen(
    data: DataConfig,
    train_labels: Mapping[str, int],
    train_ids: Iterable[str],
    test_labels: Mapping[str, int],
    test_ids: Iterable[str],
    names: tuple[str, ...],
    signature: str,
) -> Chosen:
    count = data.classes or len(names)
    if not 2 <= count <= len(names):
        raise DataError(f"the images have {len(names)} classes: expected at least {max(2, count)}")
    parts = []
    for split, labels, ids, most in (
        ("training", train_labels, train_ids, data.train),
        ("test", test_labels, test_ids, data.test),
    ):
        chosen, lacking = first_of_each_class(ids, labels, range(count), most)
        short = [label for label, missing in lacking.items() if missing]
        if short:
            raise DataError(
                f"class {names[short[0]]!r} has only {(most or 1) - lacking[short[0]]} {split} images: "
                f"expected at least {most or 1} of each class"
            )
        parts.append(chosen)
    return Chosen(parts[0], parts[1], names[:count], digest([signature, asdict(data)]))


def _sources(data: DataConfig, root: Path) -> tuple[tuple[ImageSource, Labels], tuple[ImageSource, Labels]]:
    """Training and test images with their labels; one source twice where a part is to be held out."""
    if data.folder:
        folder = data_root() / data.folder
        if not folder.is_dir():
            raise DataError(
                f"no images at {folder}: set UNPOISON_DATA to the folder that holds {data.folder!r}"
            )
        source = open_source(folder)
        labels = read_labels(source)
        parts = []
        for start in ("train-", f"{data.test_split}-"):
            ids = [id_ for id_ in source.ids if id_.startswith(start)]
            if not ids:
                raise DataError(f"{folder} has no shards {start}*: expected train-* and TEST_SPLIT-*")
            parts.append((source.select(ids), labels))
        return parts[0], parts[1]
    assert data.images is not None, "one of folder, images and embedded is given"
    train = open_source(root / data.images)
    first = (train, read_labels(train))
    if data.test_images is None:
        return first, first
    test = open_source(root / data.test_images)
    return first, (test, read_labels(test))


def _embedded(data: DataConfig) -> tuple[ImageSet, Tensor, tuple[str, ...]]:
    return embedded_digits() if data.embedded == "digits" else embedded_photos()


def _apart(labels: Mapping[str, int], share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and test ids, a share of every class for testing, drawn by a hash of the id alone."""
    order = sorted(labels, key=lambda id_: hashlib.sha256(f"held out/{id_}".encode()).digest())
    members: dict[int, list[str]] = {}
    for id_ in order:
        members.setdefault(labels[id_], []).append(id_)
    test = {id_ for ids in members.values() for id_ in ids[: max(1, round(share * len(ids)))]}
    return tuple(id_ for id_ in labels if id_ not in test), tuple(id_ for id_ in labels if id_ in test)
