"""Images in: every file decoded once, at the encoder's size, kept as uint8 in the order of the ids.

Rows in = rows out: what the source named is either an image of the result or one of its `skipped` with a reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unpoison.data.decode import MAX_PIXELS, decode_image, quiet_pillow, short_side, to_square
from unpoison.data.export import atomic_file, write_json_atomically
from unpoison.data.sources import ImageSource, RawImage, open_files, open_source, shown
from unpoison.errors import ConfigError, DataError, NothingToScanError, ShapeError
from unpoison.records import Geometry, ImageSet, Skipped
from unpoison.runtime import Progress, silent, stage_generator

__all__ = ["as_image_set", "fingerprint_of", "load_images", "usual_side"]

_SCHEMA = 1
_PIXELS, _INDEX = "pixels.u8", "images.json"
_BYTES_IN_FLIGHT = (
    512 * 2**20
)  # encoded bytes that wait for a decoder; bounds memory whatever the files' sizes
_REPORT_EVERY = 32

_Row = tuple[
    str, NDArray[np.uint8] | None, str, str
]  # id, pixels, reason when there are none, digest of the bytes


def load_images(
    source: ImageSource,
    geometry: Geometry,
    *,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    store: Path | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> ImageSet:
    """Decode the images of a source, in parallel, in the order of their ids.

    Args:
        source: where the images are.
        geometry: the square that every image becomes.
        max_pixels: larger images are skipped before they are decoded.
        workers: decoding threads; default: one per usable core, at most 16.
        store: a folder that keeps the pixels on disk, memory-mapped; a complete store of the same request (same
            files by size and time, same geometry and limits) is opened instead of decoding again, any other redone.
        limit: only the first so many of all that the source names, refused entries last.
        sample: only so many of all that the source names, drawn by `seed`.
        seed: of the sample.
        progress: told ("decode images", done, total).

    Returns:
        `pixels` (N, 3, S, S) uint8, channels-last; len(ids) + len(skipped) is the number of rows asked for. The
        fingerprint covers ids and file bytes, skipped ones included, and does not depend on `geometry`.

    Raises:
        ConfigError: a number is out of range, or both `limit` and `sample` are given.
        NothingToScanError: none of the images can be decoded.
    """
    for name, value in (
        ("workers", workers),
        ("limit", limit),
        ("sample", sample),
        ("max_pixels", max_pixels),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: expected at least 1")
    source = _part_of(source, limit, sample, seed)
    workers = workers or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, 16)
    request = {
        "schema": _SCHEMA,
        "location": source.location,
        "signature": source.signature(),
        "geometry": asdict(geometry),
        "max_pixels": max_pixels,
    }
    if store is not None and (found := _open_store(store, request)) is not None:
        return found
    rows = _decode_all(source, geometry, max_pixels, workers, progress)
    if store is None:
        return _in_memory(source, geometry, rows)
    return _in_store(source, geometry, rows, store, request)


def fingerprint_of(source: ImageSource) -> str:
    """The fingerprint that `load_images` gives all images of a source; reads every byte and decodes nothing."""
    digests = [(raw.id, "-" if raw.data is None else _digest(raw.data)) for raw in source.stream()]
    return _fingerprint([*digests, *((entry.id, "-") for entry in source.refused)])


def as_image_set(
    images: str | Path | ImageSource | ImageSet | Tensor | Sequence[str | Path],
    geometry: Geometry,
    *,
    root: str | Path | None = None,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    store: Path | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> ImageSet:
    """Whatever a caller may hold, as decoded images of the geometry's size.

    Args:
        images: a path as in `open_source`; an open source; a sequence of image files; an ImageSet; or a tensor
            (N, 3, H, W), uint8 or floating in [0, 1]. Tensors and ImageSets that already have the geometry's size
            are taken as they are, others are resized and cropped like files; the ids of a tensor are its row numbers.
        geometry: the square that every image becomes.
        root: as in `open_source`; for paths only.
        follow_links: as in `open_source`; for paths only.
        max_pixels: as in `load_images`, like all arguments that follow.
        workers: as in `load_images`.
        store: as in `load_images`; not used for tensors and ImageSets.
        limit: as in `load_images`.
        sample: as in `load_images`.
        seed: as in `load_images`.
        progress: as in `load_images`.

    Raises:
        ShapeError: a tensor has the wrong shape, dtype or range.
    """
    if isinstance(images, Tensor):
        images = _from_tensor(images)
    if isinstance(images, ImageSet):
        rows = _chosen(len(images), limit, sample, seed)
        return _resized(images if rows is None else images.select(rows), geometry)
    if isinstance(images, str | Path):
        images = open_source(images, root=root, follow_links=follow_links)
    elif not isinstance(images, ImageSource):
        images = open_files(images)
    return load_images(
        images,
        geometry,
        max_pixels=max_pixels,
        workers=workers,
        store=store,
        limit=limit,
        sample=sample,
        seed=seed,
        progress=progress,
    )


def _part_of(source: ImageSource, limit: int | None, sample: int | None, seed: int) -> ImageSource:
    named = (*source.ids, *(entry.id for entry in source.refused))
    rows = _chosen(len(named), limit, sample, seed)
    return source if rows is None else source.select([named[row] for row in rows])


def _chosen(total: int, limit: int | None, sample: int | None, seed: int) -> list[int] | None:
    """Row numbers, ascending, that `limit` or `sample` leaves; None for all of them."""
    if limit is not None and sample is not None:
        raise ConfigError(f"limit={limit} and sample={sample}: give one of them, the first N or N at random")
    if sample is not None and sample < total:
        order = torch.randperm(total, generator=stage_generator(seed, "sample of images"))
        return sorted(order[:sample].tolist())
    return list(range(limit)) if limit is not None and limit < total else None


def _decode_all(
    source: ImageSource, geometry: Geometry, max_pixels: int, workers: int, progress: Progress
) -> Generator[_Row, None, None]:
    """One row per id, in order: threads decode ahead (Pillow releases the GIL), a bounded window of them."""

    def decode(raw: RawImage) -> _Row:
        if raw.data is None:
            return raw.id, None, raw.reason or "cannot be read", "-"
        digest = _digest(raw.data)
        try:
            return raw.id, to_square(decode_image(raw.data, max_pixels=max_pixels), geometry), "", digest
        except DataError as error:
            return raw.id, None, str(error), digest

    total = len(source.ids)
    waiting: deque[tuple[Future[_Row], int]] = deque()
    in_flight = done = 0
    progress("decode images", 0, total)
    with quiet_pillow(), ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for raw in source.stream():
                size = len(raw.data or b"")
                while waiting and (len(waiting) >= 4 * workers or in_flight + size > _BYTES_IN_FLIGHT):
                    future, freed = waiting.popleft()
                    yield future.result()
                    in_flight, done = in_flight - freed, done + 1
                    if done % _REPORT_EVERY == 0:
                        progress("decode images", done, total)
                waiting.append((pool.submit(decode, raw), size))
                in_flight += size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    progress("decode images", total, total)


class _Collector:
    """Splits decoded rows into ids and skipped ones, hands on the pixels, and computes the fingerprint."""

    def __init__(self, source: ImageSource, keep: Callable[[NDArray[np.uint8]], object]) -> None:
        self._source = source
        self._keep = keep
        self.ids: list[str] = []
        self.skipped: list[Skipped] = list(source.refused)
        self._digests = {entry.id: "-" for entry in source.refused}

    def collect(self, rows: Generator[_Row, None, None]) -> None:
        with contextlib.closing(rows):
            for id, pixels, reason, digest in rows:
                self._digests[id] = digest
                if pixels is None:
                    self.skipped.append(Skipped(id, reason))
                else:
                    self._keep(pixels)
                    self.ids.append(id)
        if not self.ids:
            first = self.skipped[0] if self.skipped else Skipped("", "nothing was named")
            raise NothingToScanError(
                f"none of the {len(self.skipped)} images of {shown(self._source.location)} can be read; "
                f"the first is {first.id!r}: {first.reason}"
            )

    def skipped_in_order(self) -> tuple[Skipped, ...]:
        return tuple(sorted(self.skipped, key=lambda entry: entry.id))

    def fingerprint(self) -> str:
        return _fingerprint(self._digests.items())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _fingerprint(digests: Iterable[tuple[str, str]]) -> str:
    total = hashlib.sha256()
    for id, digest in sorted(digests):
        total.update(f"{id}\t{digest}\n".encode())
    return total.hexdigest()


def _in_memory(source: ImageSource, geometry: Geometry, rows: Generator[_Row, None, None]) -> ImageSet:
    shape = (len(source.ids), geometry.size, geometry.size, 3)
    try:
        pixels = np.empty(shape, dtype=np.uint8)  # pages are taken as they are written, not now
    except MemoryError:
        raise DataError(
            f"{shape[0]} images of {geometry.size} pixels need {np.prod(shape) / 2**30:.1f} GiB of memory; "
            "keep them in a store on disk instead"
        ) from None
    collector = _Collector(source, lambda square: np.copyto(pixels[len(collector.ids)], square))
    collector.collect(rows)
    tensor = torch.from_numpy(pixels[: len(collector.ids)]).permute(0, 3, 1, 2)
    return ImageSet(tuple(collector.ids), tensor, collector.skipped_in_order(), collector.fingerprint())


def _in_store(
    source: ImageSource,
    geometry: Geometry,
    rows: Generator[_Row, None, None],
    store: Path,
    request: dict[str, Any],
) -> ImageSet:
    store.mkdir(parents=True, exist_ok=True)
    (store / _INDEX).unlink(
        missing_ok=True
    )  # from here on, and until the new one is written, the store is incomplete
    for left in store.glob(f"{_PIXELS}.partial-*"):  # of a killed run, and as large as all images
        left.unlink(missing_ok=True)
    with atomic_file(store / _PIXELS) as file:
        collector = _Collector(source, lambda square: file.write(square.data))
        collector.collect(rows)
    index = {
        "request": request,
        "fingerprint": collector.fingerprint(),
        "ids": collector.ids,
        "skipped": [[entry.id, entry.reason] for entry in collector.skipped_in_order()],
    }
    write_json_atomically(store / _INDEX, index)
    found = _open_store(store, request)
    if found is None:
        raise DataError(
            f"{shown(store)}: the pixels that were just written cannot be read back; is the disk full?"
        )
    return found


def _open_store(store: Path, request: dict[str, Any]) -> ImageSet | None:
    """The images of a complete store that answers this request; None when there is no such store."""
    try:
        index = json.loads((store / _INDEX).read_text(encoding="utf-8"))
        if index["request"] != request:
            return None
        ids = tuple(str(id) for id in index["ids"])
        skipped = tuple(Skipped(str(id), str(reason)) for id, reason in index["skipped"])
        fingerprint = str(index["fingerprint"])
        size = int(request["geometry"]["size"])
        if (store / _PIXELS).stat().st_size != len(ids) * size * size * 3 or not ids:
            return None
        # Copy-on-write: a caller who writes into the tensor changes his own memory, never the file.
        pixels = np.memmap(store / _PIXELS, dtype=np.uint8, mode="c", shape=(len(ids), size, size, 3))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ImageSet(ids, torch.from_numpy(pixels).permute(0, 3, 1, 2), skipped, fingerprint)


def _from_tensor(images: Tensor) -> ImageSet:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ShapeError(f"images must be (N, 3, H, W), got {tuple(images.shape)}")
    if len(images) == 0:
        raise NothingToScanError("a tensor of 0 images; expected at least one")
    images = images.detach().cpu()
    if images.is_floating_point():
        low, high = (float(value) for value in torch.aminmax(images))
        if not (low >= 0 and high <= 1):  # also catches not-a-number
            raise ShapeError(
                f"images of floating type must lie in [0, 1], got {low:.3g} to {high:.3g}; the encoder normalises them"
            )
        images = (images.float() * 255).round().to(torch.uint8)
    elif images.dtype != torch.uint8:
        raise ShapeError(f"images must be uint8 or floating in [0, 1], got {images.dtype}")
    digits = len(str(len(images) - 1))
    ids = tuple(str(row).zfill(digits) for row in range(len(images)))
    pixels = images.contiguous(memory_format=torch.channels_last)
    rows = pixels.permute(0, 2, 3, 1).numpy()
    digests = [_digest(row.tobytes()) for row in rows]
    return ImageSet(ids, pixels, (), _fingerprint(zip(ids, digests, strict=True)))


def _resized(images: ImageSet, geometry: Geometry) -> ImageSet:
    if tuple(images.pixels.shape[2:]) == (geometry.size, geometry.size):
        return images
    rows = images.pixels.permute(0, 2, 3, 1).numpy()
    squares = [to_square(Image.fromarray(np.ascontiguousarray(row)), geometry) for row in rows]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    return ImageSet(images.ids, pixels, images.skipped, images.fingerprint)


_SIDES = (32, 48, 64, 96, 128, 160, 192, 224)


def usual_side(source: str | Path | ImageSource | Sequence[str | Path], *, looked_at: int = 64) -> int:
    """Input side that fits the images: the median short side of the first readable ones, rounded, at most 224.

    Args:
        source: a path, an open source, or paths.
        looked_at: readable images that are looked at; only their headers are read.
    """
    if not isinstance(source, ImageSource):
        source = open_source(source) if isinstance(source, str | Path) else open_files(source)
    sides: list[int] = []
    for raw in source.stream():
        side = None if raw.data is None else short_side(raw.data)
        if side is not None:
            sides.append(side)
        if len(sides) == looked_at:
            break
    median = statistics.median(sides) if sides else _SIDES[0]
    return min(_SIDES, key=lambda side: (abs(side - median), side))
