"""Results out: lists and JSON written atomically, and the cleaned copy of a data set.

Whatever is written appears under its name only when it is complete: a reader, or the same command after a kill, finds
the old file, the new file or none, never half of one. The source is only ever read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tarfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from unpoison.data.sources import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    FileSource,
    ImageSource,
    ParquetSource,
    TarSource,
    open_source,
    sample_key,
    shown,
)
from unpoison.errors import ConfigError, DataError

__all__ = [
    "CleanCopy",
    "CopyMode",
    "atomic_file",
    "clean_copy",
    "write_json_atomically",
    "write_lines_atomically",
]

CopyMode = Literal["copy", "link", "list"]

_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES}


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write, which becomes `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_lines_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write a UTF-8 text file, one entry a line.

    Raises:
        DataError: an entry holds a line break, and would be read back as two.
    """
    with atomic_file(path) as file:
        for line in lines:
            if "\n" in line or "\r" in line:
                raise DataError(
                    f"'{shown(line)}' holds a line break and cannot be an entry of {shown(path.name)}"
                )
            file.write(line.encode() + b"\n")


def write_json_atomically(path: Path, value: Any) -> None:
    """Write a value as JSON (UTF-8, indented, keys in the given order; NaN is refused)."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).encode() + b"\n")


@dataclass(frozen=True, kw_only=True)
class CleanCopy:
    """What a cleaned copy holds; `kept` = `copied` + `linked` unless only a list was written.

    Attributes:
        kept: images that were asked for.
        removed: images that the source names, refused ones included, and that were not asked for.
        copied: images whose bytes were written.
        linked: images that share their bytes with the source.
        bytes: encoded size of the kept images, 0 for a list.
    """

    kept: int
    removed: int
    copied: int
    linked: int
    bytes: int


def clean_copy(
    source: ImageSource, keep_ids: Collection[str], out: str | Path, mode: CopyMode = "copy"
) -> CleanCopy:
    """Write the data set again with the kept images only; read back and compared before it gets its name.

    Folders and lists keep their relative paths. Parquet shards keep schema, metadata and all columns of the rows that
    stay. Tar shards keep every member except the samples whose images all go. A shard without a kept image is left out.

    Args:
        source: what was scanned; never changed.
        keep_ids: the images to keep.
        out: a folder that does not exist yet or is empty, outside the source.
        mode: `copy`; `link` for hard links, which fall back to copies across devices and for shards (editing a linked
            file later edits the original too); `list` writes only `clean.txt`.

    Raises:
        ConfigError: an unknown mode, or an output folder that is in use or inside the source.
        DataError: an id is not in the source, a file cannot be read, or the copy does not equal the original.
    """
    if mode not in get_args(CopyMode):
        raise ConfigError(f"mode {mode!r}: expected one of {', '.join(get_args(CopyMode))}")
    kept = source.select(keep_ids)
    if kept.refused:
        first = kept.refused[0]
        raise DataError(f"{first.id!r} is to be kept but cannot be read: {first.reason}; nothing was written")
    if not kept.ids:
        raise DataError("no image is to be kept; nothing was written")
    removed = len(source.ids) + len(source.refused) - len(kept.ids)
    out = Path(out)
    _check_output(source, out)
    with _folder_in_one_step(out) as partial:
        if mode == "list":
            write_lines_atomically(partial / "clean.txt", kept.ids)
            return CleanCopy(kept=len(kept.ids), removed=removed, copied=0, linked=0, bytes=0)
        linked = 0
        if isinstance(kept, ParquetSource):
            _copy_parquet(kept, partial)
        elif isinstance(kept, TarSource):
            _copy_tar(kept, partial)
        else:
            linked = _copy_files(kept, partial, mode)
        total = _compare(kept, partial)
        return CleanCopy(
            kept=len(kept.ids), removed=removed, copied=len(kept.ids) - linked, linked=linked, bytes=total
        )


def _check_output(source: ImageSource, out: Path) -> None:
    real = Path(os.path.realpath(out))
    place = Path(os.path.realpath(source.location))
    if place.is_dir() and (real == place or place in real.parents):
        raise ConfigError(
            f"out={shown(out)} lies inside the source {shown(source.location)}, which is never changed"
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"out={shown(out)} exists and is no folder; name a new folder")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out={shown(out)} is not empty; name a new folder, nothing is ever overwritten")


@contextlib.contextmanager
def _folder_in_one_step(out: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` when the block ends well, and deleted when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    if partial.exists():  # left by a killed run that had this process number
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, out)
        _sync_folder(out.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _copy_files(source: ImageSource, out: Path, mode: CopyMode) -> int:
    """Copy or link every file; returns how many were linked."""
    linked = 0
    for id in source.ids:
        original = source.path_of(id)
        assert original is not None
        target = out / id
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if mode == "link" and _link(original, target):
                linked += 1
            else:
                shutil.copyfile(original, target)
        except OSError as error:
            raise DataError(f"{id!r} cannot be copied: {error.strerror}; nothing was written") from error
    return linked


def _link(original: Path, target: Path) -> bool:
    """Whether a hard link could be made; some pairs of places have none."""
    try:
        os.link(os.path.realpath(original), target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


def _copy_parquet(source: ParquetSource, out: Path) -> None:
    for shard, rows in source.rows_by_shard():
        original, target = source.root / shard, out / shard
        target.parent.mkdir(parents=True, exist_ok=True)
        keep = set(rows)
        try:
            with (
                pq.ParquetFile(original, pre_buffer=False, buffer_size=1 << 20) as file,
                pq.ParquetWriter(target, file.schema_arrow) as writer,
            ):
                start = 0
                for batch in file.iter_batches(256, use_threads=False):
                    stay = [row - start for row in range(start, start + batch.num_rows) if row in keep]
                    if stay:
                        writer.write_batch(batch.take(pa.array(stay)))
                    start += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{shown(shard)} cannot be filtered: {str(error)[:120]}; nothing was written"
            ) from error


def _copy_tar(source: TarSource, out: Path) -> None:
    kept: dict[str, set[str]] = {}
    for id in source.ids:
        shard, member = source.members[id]
        kept.setdefault(shard, set()).add(member.name)
    for shard, names in kept.items():
        target = out / shard
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(source.root / shard, "r:") as original, tarfile.open(target, "w:") as copy:
                headers = original.getmembers()
                stay = {sample_key(name) for name in names}
                go = {sample_key(header.name) for header in headers if _is_image(header.name)} - stay
                written: set[str] = set()
                for header in headers:
                    wanted = (
                        header.name in names if _is_image(header.name) else sample_key(header.name) not in go
                    )
                    if wanted and header.isreg() and header.name not in written:
                        written.add(header.name)
                        copy.addfile(header, original.extractfile(header))
        except (OSError, tarfile.TarError) as error:
            raise DataError(
                f"{shown(shard)} cannot be filtered: {str(error)[:120]}; nothing was written"
            ) from error


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | UNREAD_SUFFIXES


def _compare(source: ImageSource, copy: Path) -> int:
    """Read source and copy side by side, in the order of the ids; returns the number of bytes that are equal."""
    total = 0
    shards = isinstance(source, ParquetSource | TarSource)
    copied = open_source(copy) if shards else FileSource(location=str(copy), root=copy, ids=source.ids)
    if len(copied.ids) != len(source.ids):
        raise DataError(
            f"the copy holds {len(copied.ids)} images instead of {len(source.ids)}; nothing was written"
        )
    for theirs, ours in zip(source.stream(), copied.stream(), strict=True):
        if theirs.data is None or theirs.data != ours.data:
            reason = theirs.reason or "the copy differs from the original"
            raise DataError(f"{theirs.id!r} cannot be copied: {reason}; nothing was written")
        total += len(theirs.data)
    return total


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system that cannot is no reason to fail."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
