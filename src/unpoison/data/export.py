"""Results out: lists and JSON written atomically, and the cleaned copy of a data set.

Whatever is written appears under its name only when it is complete: a reader, or the same command after a kill, finds
the old file, the new file or none, never half of one. The source is only ever read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
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
    parquet_image_column,
    sample_key,
    shown,
    tar_members,
)
from unpoison.errors import ConfigError, DataError
from unpoison.runtime import Progress, silent

__all__ = [
    "CleanCopy",
    "CopyMode",
    "atomic_file",
    "check_new_folder",
    "check_outside",
    "clean_copy",
    "fresh_folder",
    "write_json_atomically",
    "write_lines_atomically",
]

CopyMode = Literal["copy", "link", "list"]

_FRESH = "fresh"
"""Stands for the job where a killed one's files are of no use."""

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
    source: ImageSource,
    keep_ids: Collection[str],
    out: str | Path,
    mode: CopyMode = "copy",
    *,
    progress: Progress = silent,
) -> CleanCopy:
    """Write the data set again with the kept images only; read back and compared before it gets its name.

    Folders and lists keep their relative paths. Parquet shards keep schema, metadata and all columns of the rows that
    stay. Tar shards keep every member except the samples whose images all go. A shard without a kept image is left out.
    A copy that was killed goes on when it is asked for again, from a hidden folder beside `out`.

    Args:
        source: what was scanned; never changed.
        keep_ids: the images to keep.
        out: a folder that does not exist yet or is empty, outside the source.
        mode: `copy`; `link` for hard links, which fall back to copies across devices and for shards (editing a linked
            file later edits the original too); `list` writes only `clean.txt`.
        progress: told ("copy images", done, total), then ("compare with the original", done, total).

    Raises:
        ConfigError: an unknown mode, or an output folder that is in use, inside the source or cannot be written.
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
    check_new_folder(out, source)
    job = hashlib.sha256("\n".join((mode, kept.signature())).encode()).hexdigest()[:12]
    with _folder_in_one_step(out, job) as partial:
        if mode == "list":
            write_lines_atomically(partial / "clean.txt", kept.ids)
            if (partial / "clean.txt").read_bytes().decode().split("\n")[:-1] != list(kept.ids):
                raise DataError(f"{out}: the list does not read as it was written; clean again")
            return CleanCopy(kept=len(kept.ids), removed=removed, copied=0, linked=0, bytes=0)
        linked = 0
        if isinstance(kept, ParquetSource):
            _copy_parquet(kept, partial, progress)
        elif isinstance(kept, TarSource):
            _copy_tar(kept, partial, progress)
        else:
            linked = _copy_files(kept, partial, mode, progress)
        total = _compare(kept, partial, progress)
        return CleanCopy(
            kept=len(kept.ids), removed=removed, copied=len(kept.ids) - linked, linked=linked, bytes=total
        )


def check_new_folder(out: Path, source: ImageSource | None = None) -> None:
    """Complain, before any work, about a folder that must not be written to.

    Args:
        out: must not exist, or be an empty folder.
        source: images that it must not lie among, since they are never changed.

    Raises:
        ConfigError: it is something else, lies there, or cannot be looked at.
    """
    if source is not None:
        check_outside(out, source)
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ConfigError(f"out={shown(out)} exists and is no folder; name a new folder")
        if out.exists() and any(out.iterdir()):
            raise ConfigError(
                f"out={shown(out)} is not empty; name a new folder, nothing is ever overwritten"
            )
    except OSError as error:
        raise _not_written(out, error) from error


def check_outside(out: Path, source: ImageSource) -> None:
    """Complain about an output that would lie among images, which are never changed.

    Raises:
        ConfigError: it lies there.
    """
    real = Path(os.path.realpath(out))
    for place in _places(source):
        if real == place or place in real.parents:
            raise ConfigError(
                f"out={shown(out)} lies inside the source {shown(place)}, which is never changed; "
                "name a folder elsewhere"
            )


@contextlib.contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `out` when the block ends well, and is deleted when it does not.

    A kill leaves it, under a hidden name; the next job for the same `out` removes it.

    Raises:
        ConfigError: it cannot be made.
    """
    partial = out.with_name(f".{out.name}.partial-{_FRESH}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _folder_in_one_step(out, _FRESH):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _not_written(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"out={shown(out)} cannot be written: {error.strerror}; name another folder")


def _places(source: ImageSource) -> set[Path]:
    """The folders that are the source: the one that was named, or for a list those of its images, its own left out."""
    if Path(source.location).is_dir():
        return {Path(os.path.realpath(source.location))}
    if not isinstance(source, FileSource):
        return set()
    folders = {os.path.realpath(path.parent) for path in source.containers()}
    return {Path(folder) for folder in folders - {os.path.realpath(source.root)}}


@contextlib.contextmanager
def _folder_in_one_step(out: Path, job: str) -> Iterator[Path]:
    """A folder to fill, which is renamed to `out` when the block ends well, and deleted when it fails.

    A kill leaves it, under a hidden name that holds `job`: the same job finds there what is complete already, another
    one for the same `out` removes it.
    """
    partial = out.with_name(f".{out.name}.partial-{job}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in glob.glob(
            f".{glob.escape(out.name)}.partial-{'[0-9a-f]' * len(job)}", root_dir=out.parent
        ):
            if left != partial.name:
                shutil.rmtree(out.parent / left)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise _not_written(out, error) from error
    try:
        yield partial
        os.replace(partial, out)
        _sync_folder(out.parent)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy_files(source: ImageSource, out: Path, mode: CopyMode, progress: Progress) -> int:
    """Copy or link every file; returns how many were linked."""
    linked = 0
    for done, id in enumerate(source.ids, start=1):
        original = source.path_of(id)
        assert original is not None
        target = out / id
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A killed run's file that is cut short is written again; any other difference fails the comparison.
            if not target.exists() or target.stat().st_size != original.stat().st_size:
                target.unlink(missing_ok=True)
                if mode != "link" or not _link(original, target):
                    shutil.copyfile(original, target)
            linked += os.path.samefile(original, target)
        except OSError as error:
            raise DataError(f"{id!r} cannot be copied: {error.strerror}; nothing was written") from error
        progress("copy images", done, len(source.ids))
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


@contextlib.contextmanager
def _new_shard(target: Path) -> Iterator[Path | None]:
    """Where to write a shard, which gets its name when the block ends well; None when a killed run completed it."""
    if target.exists():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, target)
    except (OSError, pa.ArrowException, tarfile.TarError) as error:
        raise DataError(
            f"{shown(target.name)} cannot be filtered: {str(error)[:120]}; nothing was written"
        ) from error


def _copy_parquet(source: ParquetSource, out: Path, progress: Progress) -> None:
    done = 0
    for shard, rows in source.rows_by_shard():
        with _new_shard(out / shard) as target:
            if target is not None:
                keep = set(rows)
                with (
                    pq.ParquetFile(source.root / shard, pre_buffer=False, buffer_size=1 << 20) as file,
                    pq.ParquetWriter(target, file.schema_arrow) as writer,
                ):
                    for batch in _kept_rows(file, keep):
                        writer.write_batch(batch)
        done += len(rows)
        progress("copy images", done, len(source.ids))


def _kept_rows(
    file: pq.ParquetFile, keep: Collection[int], columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows with these numbers, a few at a time."""
    start = 0
    for batch in file.iter_batches(256, columns=columns, use_threads=False):
        stay = [row - start for row in range(start, start + batch.num_rows) if row in keep]
        if stay:
            yield batch.take(pa.array(stay))
        start += batch.num_rows


def _copy_tar(source: TarSource, out: Path, progress: Progress) -> None:
    kept: dict[str, set[str]] = {}
    for id in source.ids:
        shard, member = source.members[id]
        kept.setdefault(shard, set()).add(member.name)
    done = 0
    for shard, names in kept.items():
        with _new_shard(out / shard) as target:
            if target is not None:
                with tarfile.open(source.root / shard, "r:") as original, tarfile.open(target, "w:") as copy:
                    headers = _headers(source.root / shard)
                    stay = {sample_key(name) for name in names}
                    go = {sample_key(header.name) for header in headers if _is_image(header.name)} - stay
                    written: set[str] = set()
                    for header in headers:
                        wanted = (
                            header.name in names
                            if _is_image(header.name)
                            else sample_key(header.name) not in go
                        )
                        if wanted and header.isreg() and header.name not in written:
                            written.add(header.name)
                            copy.addfile(header, original.extractfile(header))
        done += len(names)
        progress("copy images", done, len(source.ids))


def _headers(shard: Path) -> list[tarfile.TarInfo]:
    return [header for header in tar_members(shard) if not isinstance(header, str)]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | UNREAD_SUFFIXES


def _compare(source: ImageSource, copy: Path, progress: Progress) -> int:
    """Read source and copy side by side, in the order of the ids; returns the number of bytes that are equal."""
    total = 0
    shards = isinstance(source, ParquetSource | TarSource)
    copied = open_source(copy) if shards else FileSource(location=str(copy), root=copy, ids=source.ids)
    if len(copied.ids) != len(source.ids):
        raise DataError(
            f"the copy holds {len(copied.ids)} images instead of {len(source.ids)}; nothing was written"
        )
    pairs = zip(source.stream(), copied.stream(), strict=True)
    for done, (theirs, ours) in enumerate(pairs, start=1):
        if theirs.data is None or theirs.data != ours.data:
            reason = theirs.reason or "the copy differs from the original"
            raise DataError(f"{theirs.id!r} cannot be copied: {reason}; nothing was written")
        total += len(theirs.data)
        progress("compare with the original", done, len(source.ids))
    if isinstance(source, ParquetSource):
        for shard, rows in source.rows_by_shard():
            _compare_columns(source.root / shard, copy / shard, set(rows))
    elif isinstance(source, TarSource):
        for shard in dict.fromkeys(source.members[id][0] for id in source.ids):
            _compare_members(source.root / shard, copy / shard)
    return total


def _compare_columns(original: Path, copy: Path, rows: set[int]) -> None:
    """The columns beside the images, such as labels, value by value."""
    image = parquet_image_column(original)
    with pq.ParquetFile(original) as theirs, pq.ParquetFile(copy) as ours:
        others = [name for name in theirs.schema_arrow.names if name != image]
        if not others:
            return
        before = _digest(_kept_rows(theirs, rows, others))
        after = _digest(_kept_rows(ours, range(len(rows)), others))
    if before != after:
        raise DataError(
            f"{shown(copy.name)}: a column of the copy differs from the original; nothing was written"
        )


def _digest(batches: Iterable[pa.RecordBatch]) -> bytes:
    """Of the values as text, because a missing number does not equal itself."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in batch.to_pylist():
            digest.update(f"{row}\n".encode("utf-8", "surrogatepass"))
    return digest.digest()


def _compare_members(original: Path, copy: Path) -> None:
    """The files beside the images, such as labels, byte by byte."""
    with tarfile.open(original, "r:") as theirs, tarfile.open(copy, "r:") as ours:
        first: dict[str, tarfile.TarInfo] = {}
        for header in _headers(original):
            first.setdefault(header.name, header)
        for header in _headers(copy):
            before, after = theirs.extractfile(first[header.name]), ours.extractfile(header)
            if before is None or after is None or before.read() != after.read():
                raise DataError(
                    f"{shown(header.name)} in the copy differs from the original; nothing was written"
                )


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system that cannot is no reason to fail."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
