"""Which images there are: a folder, a text list, Hugging Face parquet or WebDataset tar shards, as one ImageSource.

Opening a source reads names and sizes only. Every entry that looks like an image ends up either in `ids` or, with its
reason, in `refused`: a scanner that loses rows without saying so can be blinded. Paths, names and archives are written
by strangers, so nothing outside the root is read unless links are followed on purpose, nothing is ever extracted, and
no name can smuggle a line break into a list of ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import os
import stat
import tarfile
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from unpoison.data.decode import MAX_FILE_BYTES
from unpoison.errors import ConfigError, DataError, NothingToScanError
from unpoison.records import Skipped

__all__ = [
    "IMAGE_SUFFIXES",
    "UNREAD_SUFFIXES",
    "FileSource",
    "ImageSource",
    "ParquetSource",
    "RawImage",
    "TarMember",
    "TarSource",
    "escape",
    "open_files",
    "open_source",
    "parquet_image_column",
    "sample_key",
    "shown",
    "tar_members",
    "unusable_name",
]

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".mpo",
))
# fmt: on
UNREAD_SUFFIXES = frozenset(
    (".avif", ".heic", ".heif", ".jp2", ".jxl")
)  # images too: must not vanish silently
_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class RawImage:
    """One entry of a source as it was read: its bytes, or the reason why there are none."""

    id: str
    data: bytes | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource(ABC):
    """Named images that have not been read yet.

    Attributes:
        location: what the user wrote, for messages and records.
        root: the folder that ids are relative to.
        ids: unique and sorted: by path, and within a parquet shard by row number.
        refused: what looks like an image but will not be read, with the reason.
    """

    location: str
    root: Path
    ids: tuple[str, ...]
    refused: tuple[Skipped, ...] = ()

    @abstractmethod
    def stream(self) -> Iterator[RawImage]:
        """Read the images lazily, in the order of `ids`, one RawImage for each; never raises for a bad entry."""

    @abstractmethod
    def containers(self) -> tuple[Path, ...]:
        """The files that hold the images, in the order of the ids: one per image, or the shards."""

    def path_of(self, id: str) -> Path | None:
        """The file of one image, when it has a file of its own; None for shards and unknown ids."""
        return None

    def signature(self) -> str:
        """Hex digest of the ids, and of sizes and times of their files: changes when the answer may be stale."""
        digest = hashlib.sha256()
        for line in (*self.ids, "", *(f"{entry.id}\t{entry.reason}" for entry in self.refused), ""):
            digest.update(line.encode() + b"\n")
        for path in self.containers():
            try:
                status = path.stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(b"missing\n")
        return digest.hexdigest()

    def select(self, keep: Collection[str]) -> Self:
        """The same source with only these ids, refused ones among them; unknown ids raise DataError."""
        wanted = set(keep)
        unknown = wanted.difference(self.ids, (entry.id for entry in self.refused))
        if unknown:
            raise DataError(
                f"{len(unknown)} of {len(wanted)} ids are not in {shown(self.location)}, the first is "
                f"{min(unknown)!r}; ids are paths relative to the source, or shard:row, as in findings.parquet"
            )
        return replace(
            self,
            ids=tuple(id for id in self.ids if id in wanted),
            refused=tuple(entry for entry in self.refused if entry.id in wanted),
        )


def open_source(
    images: str | Path,
    *,
    root: str | Path | None = None,
    follow_links: bool = False,
    only: Collection[str] | None = None,
) -> ImageSource:
    """Find the images that a path names; reads no image.

    Args:
        images: a folder of images at any depth; a parquet file or a folder of them (Hugging Face image schema); a tar
            shard or a folder of them (WebDataset); or a text file with one path per line.
        root: for a text file: the folder that its lines are relative to and must stay in; default: the file's own.
        follow_links: also read links to folders, and links to files that lie outside the root.
        only: keep just these ids.

    Raises:
        ConfigError: the path does not exist, is a single image, or `root` is given without a text list.
        DataError: shards and images are mixed, a shard has the wrong columns, a list names a file twice.
        NothingToScanError: there is no readable image.
    """
    path = Path(images)
    try:
        there = bool(str(images)) and path.exists()
    except OSError as error:
        raise ConfigError(f"{shown(path)[:120]}: cannot be looked at: {error.strerror}") from error
    if not there:
        raise ConfigError(
            f"{shown(path)}: no such file or folder; expected images, parquet or tar shards, or a list"
        )
    kind = _kind_of(path)
    if root is not None and kind != "list":
        raise ConfigError(f"root={shown(root)}: only a text list has a root; {shown(path)} is a {kind}")
    source: ImageSource
    if kind == "list":
        source = _open_list(path, Path(root) if root is not None else path.parent, follow_links)
    elif kind == "folder":
        source = _open_folder(path, follow_links)
    elif kind == "parquet file":
        source = _open_parquet(str(images), path.parent, [path.name])
    else:
        source = _open_tar(str(images), path.parent, [path.name])
    if only is not None:
        source = source.select(only)
    if not source.ids:
        raise NothingToScanError(_nothing_left(source, follow_links))
    return source


def open_files(paths: Sequence[str | Path]) -> FileSource:
    """A source of exactly these files; ids are relative to the deepest folder that holds them all.

    Raises:
        ConfigError: an element is no path.
        DataError: a file is named twice.
        NothingToScanError: the sequence is empty.
    """
    odd = next((path for path in paths if not isinstance(path, str | os.PathLike)), None)
    if odd is not None:
        raise ConfigError(f"images: expected paths of image files, got a {type(odd).__name__} among them")
    if not paths:
        raise NothingToScanError("an empty sequence of paths holds no images; expected at least one")
    absolute = [os.path.abspath(path) for path in paths]
    root = Path(os.path.commonpath([os.path.dirname(path) for path in absolute]))
    entries = [(f"path {number}", path) for number, path in enumerate(absolute, start=1)]
    return _files_below(f"{len(paths)} paths", root, entries, follow_links=True)


# Files: a folder or a text list --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSource(ImageSource):
    """Images that are files of their own, at `root / id`."""

    def stream(self) -> Iterator[RawImage]:
        """Read one file at a time."""
        for id in self.ids:
            yield _read_file(id, self.root / id)

    def containers(self) -> tuple[Path, ...]:
        """The image files themselves."""
        return tuple(self.root / id for id in self.ids)

    def path_of(self, id: str) -> Path | None:
        """Where the file is, whether or not it can be read; None when the source does not name it."""
        return self.root / id if id in self._known else None

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.ids)


def _open_folder(folder: Path, follow_links: bool) -> ImageSource:
    found = _walk(folder, follow_links)
    shards = {kind: names for kind in (".parquet", ".tar") if (names := found.shards[kind])}
    kinds = [*(["image files"] if found.images else []), *(f"{kind} shards" for kind in shards)]
    if len(kinds) > 1:
        raise DataError(f"{shown(folder)} holds {' and '.join(kinds)}; name the folder or file that is meant")
    if ".parquet" in shards:
        return _open_parquet(str(folder), folder, sorted(shards[".parquet"]), found.refused)
    if ".tar" in shards:
        return _open_tar(str(folder), folder, sorted(shards[".tar"]), found.refused)
    if not found.images:
        seen = sum(found.others.values())
        kinds = [f"{count} {suffix or 'without extension'}" for suffix, count in found.others.most_common(4)]
        detail = f"but {seen} other files ({', '.join(kinds)})" if seen else "and no other files"
        raise NothingToScanError(
            f"{shown(folder)} holds no images, {detail}{_about_refused(found.refused, follow_links)}"
        )
    return FileSource(
        location=str(folder),
        root=folder,
        ids=tuple(sorted(found.images)),
        refused=_sorted_unique(found.refused, found.images),
    )


@dataclass(eq=False)
class _Found:
    """What a walk through a folder came across; names are relative, with forward slashes."""

    images: list[str]
    shards: dict[str, list[str]]
    refused: list[Skipped]
    others: Counter[str]


def _walk(folder: Path, follow_links: bool) -> _Found:
    """Visit every folder once: real ones first, then linked ones in sorted order, so links cannot multiply them."""
    found = _Found([], {".parquet": [], ".tar": []}, [], Counter())
    real_root = os.path.realpath(folder)
    seen: set[tuple[int, int]] = set()
    real, linked = [""], list[str]()
    while real or linked:
        here = real.pop() if real else heapq.heappop(linked)
        try:
            if (identity := _identity(folder / here)) in seen:
                found.refused.append(Skipped(escape(here), "a link to a folder that is already read"))
                continue
            seen.add(identity)
            entries = list(os.scandir(folder / here))
        except OSError as error:
            if not here:
                raise DataError(f"{shown(folder)}: the folder cannot be read: {error.strerror}") from error
            found.refused.append(Skipped(escape(here), _unreadable("folder", error)))
            continue
        for entry in entries:
            if entry.name.startswith("._") and _is_finder_note(entry.path):
                continue
            name = f"{here}/{entry.name}" if here else entry.name
            if not _is_folder(entry):
                _note_file(found, name, entry, real_root, follow_links)
            elif not entry.is_symlink():
                real.append(name)
            elif follow_links:
                heapq.heappush(linked, name)
            else:
                found.refused.append(Skipped(escape(name), _LINKED_FOLDER))
    return found


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in circles
        return False


def _note_file(found: _Found, name: str, entry: os.DirEntry[str], real_root: str, follow_links: bool) -> None:
    """Put one directory entry where it belongs; what is neither image nor shard is only counted."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in IMAGE_SUFFIXES and suffix not in found.shards:
        if suffix in UNREAD_SUFFIXES:
            found.refused.append(Skipped(escape(name), f"{suffix} is a format that is not read"))
        found.others[suffix] += 1
        return
    reason = unusable_name(name)
    if reason is None and entry.is_symlink():
        if not os.path.exists(entry.path):
            reason = "a broken link"
        elif not follow_links and not _is_inside(os.path.realpath(entry.path), real_root):
            reason = _LINK_OUTSIDE
    if reason is None and not entry.is_file():
        reason = _NOT_REGULAR
    if reason is not None:
        found.refused.append(Skipped(escape(name), reason))
    elif suffix in found.shards:
        found.shards[suffix].append(name)
    else:
        found.images.append(name)


def _open_list(listing: Path, root: Path, follow_links: bool) -> ImageSource:
    try:
        text = listing.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shown(listing)} is no list of paths: byte {error.start} is not UTF-8; expected one path per line"
        ) from None
    if "\0" in text:
        raise DataError(
            f"{shown(listing)} is no list of paths: it holds zero bytes; expected one path per line"
        )
    if not root.is_dir():
        raise ConfigError(
            f"root={shown(root)}: expected the folder that the lines of {shown(listing)} start from"
        )
    lines = (
        (f"line {number}", line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)
    )
    entries = [(where, line) for where, line in lines if line.strip()]
    if not entries:
        raise NothingToScanError(f"{shown(listing)} names no images; expected one path per line")
    return _files_below(str(listing), root, entries, follow_links)


def _files_below(
    location: str, root: Path, entries: Iterable[tuple[str, str]], follow_links: bool
) -> FileSource:
    """Turn paths into ids below `root`; `entries` are (where it was named, path), relative to root or absolute."""
    absolute_root, real_root = os.path.abspath(root), os.path.realpath(root)
    named: dict[str, str] = {}
    ids: list[str] = []
    refused: list[Skipped] = []
    for where, entry in entries:
        path = os.path.normpath(os.path.join(absolute_root, entry))
        if path in named:
            raise DataError(
                f"{shown(location)}: {escape(entry)!r} is named by {named[path]} and again by {where}"
            )
        named[path] = where
        if not _is_inside(path, absolute_root):
            refused.append(Skipped(escape(entry), _OUTSIDE))
            continue
        id = os.path.relpath(path, absolute_root).replace(os.sep, "/")
        reason = unusable_name(id)
        if reason is None and not follow_links and not _is_inside(os.path.realpath(path), real_root):
            reason = _LINK_OUTSIDE
        if reason is None:
            ids.append(id)
        else:
            refused.append(Skipped(escape(id), reason))
    return FileSource(
        location=location, root=root, ids=tuple(sorted(ids)), refused=_sorted_unique(refused, ids)
    )


def _read_file(id: str, path: Path) -> RawImage:
    try:
        # Looked at before it is opened: a named pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            return RawImage(id, None, _NOT_REGULAR)
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        return RawImage(id, None, _unreadable("file", error))
    return _bounded(id, data)


# Hugging Face parquet ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ParquetSource(ImageSource):
    """Rows of parquet shards in the Hugging Face image schema; the id is `shard:row`.

    Attributes:
        shards: paths relative to `root`, sorted.
    """

    shards: tuple[str, ...]

    def stream(self) -> Iterator[RawImage]:
        """Read one shard after the other, a few rows at a time, the image column only."""
        for shard, rows in self.rows_by_shard():
            yield from _read_parquet_rows(self.root / shard, shard, rows)

    def rows_by_shard(self) -> list[tuple[str, list[int]]]:
        """The row numbers that the ids name, ascending, for each shard that has any."""
        rows: dict[str, list[int]] = {}
        for id in self.ids:
            shard, _, row = id.rpartition(":")
            rows.setdefault(shard, []).append(int(row))
        return list(rows.items())

    def containers(self) -> tuple[Path, ...]:
        """The shards."""
        return tuple(self.root / shard for shard in self.shards)


def parquet_image_column(path: Path) -> str:
    """The column that holds images: named `image`, or the only one that is a struct with `bytes`.

    Raises:
        DataError: the file is no parquet, or has no such column.
    """
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shown(path)} cannot be read as parquet: {_first_line(error)}") from error
    structs = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    candidates = ["image"] if "image" in structs or _is_binary(schema, "image") else structs
    if len(candidates) != 1:
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(
            f"{shown(path)} is not in the Hugging Face image schema: expected a column image: struct<bytes, path>, "
            f"found {escape(columns)[:300] or 'no columns'}"
        )
    return candidates[0]


def _is_binary(schema: Any, name: str) -> bool:
    index = schema.get_field_index(name)
    if index < 0:
        return False
    kind = schema.field(index).type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open_parquet(
    location: str, root: Path, shards: list[str], refused: Iterable[Skipped] = ()
) -> ParquetSource:
    ids: list[str] = []
    for shard in shards:
        parquet_image_column(root / shard)
        with pq.ParquetFile(root / shard) as file:
            ids.extend(f"{shard}:{row}" for row in range(file.metadata.num_rows))
    return ParquetSource(
        location=location,
        root=root,
        ids=tuple(ids),
        refused=_sorted_unique(refused, ids),
        shards=tuple(shards),
    )


def _read_parquet_rows(path: Path, shard: str, rows: list[int]) -> Iterator[RawImage]:
    """Read these rows (ascending) group by group; a damaged group costs its own rows only, each with a reason."""
    wanted = iter(rows)
    row: int | None = next(wanted)
    try:
        column = parquet_image_column(path)
        # Neither option may read a whole row group ahead: groups of gigabytes exist.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            column = column if _is_binary(file.schema_arrow, column) else f"{column}.bytes"
            end = 0
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if row is None or row >= end:
                    continue
                try:
                    for batch in file.iter_batches(
                        _ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False
                    ):
                        stop = start + batch.num_rows
                        while row is not None and row < stop:
                            yield _parquet_image(f"{shard}:{row}", batch.column(0)[row - start].as_py())
                            row = next(wanted, None)
                        start = stop
                        if row is None or row >= end:
                            break
                except (OSError, pa.ArrowException) as error:
                    reason = f"the shard is damaged: {_first_line(error)}"
                    while row is not None and row < end:
                        yield RawImage(f"{shard}:{row}", None, reason)
                        row = next(wanted, None)
    except (OSError, pa.ArrowException, DataError) as error:
        reason = f"the shard cannot be read: {_first_line(error)}"
        while row is not None:
            yield RawImage(f"{shard}:{row}", None, reason)
            row = next(wanted, None)
    while row is not None:
        yield RawImage(f"{shard}:{row}", None, "the shard ends before this row")
        row = next(wanted, None)


def _parquet_image(id: str, cell: Any) -> RawImage:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None:
        return RawImage(id, None, "the row holds no image bytes")
    return _bounded(id, data)


# WebDataset tar shards -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TarMember:
    """A regular file inside a tar: where its bytes start, and how many there are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource(ImageSource):
    """Images inside uncompressed tar shards; the id is `shard.tar:member`. Nothing is ever extracted.

    Attributes:
        shards: paths relative to `root`, sorted.
        members: of each id, the shard and the place in it.
    """

    shards: tuple[str, ...]
    members: Mapping[str, tuple[str, TarMember]]

    def stream(self) -> Iterator[RawImage]:
        """Read one member at a time, by seeking to it."""
        for shard, group in itertools.groupby(self.ids, key=lambda id: self.members[id][0]):
            with contextlib.ExitStack() as stack:
                try:
                    file = stack.enter_context((self.root / shard).open("rb"))
                except OSError as error:
                    yield from (RawImage(id, None, _unreadable("shard", error)) for id in group)
                    continue
                for id in group:
                    yield _read_member(id, file, self.members[id][1])

    def containers(self) -> tuple[Path, ...]:
        """The shards."""
        return tuple(self.root / shard for shard in self.shards)


def tar_members(path: Path) -> Iterator[tarfile.TarInfo | str]:
    """Headers of a tar, in the order of the file; a str instead of a header is a problem that a reader should report.

    `tarfile` ends quietly at a damaged header, which would hide everything behind it; here that is the last, str item.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            while (header := archive.next()) is not None:
                # `tarfile` would step back by a negative size, and read the same headers for ever (CVE-2025-8194).
                if header.size < 0 or archive.offset <= header.offset:
                    yield f"damaged at byte {header.offset}; what follows cannot be read"
                    return
                yield header
            archive.fileobj.seek(archive.offset)
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0"):
                yield f"damaged at byte {archive.offset}; what follows cannot be read"
    except (OSError, tarfile.TarError) as error:
        yield f"cannot be read as a tar: {_first_line(error)}"


def sample_key(name: str) -> str:
    """What the files of one WebDataset sample share: the path up to the first dot of the file name.

    >>> sample_key("./train/0001.left.png")
    'train/0001'
    """
    folder, slash, file = name.removeprefix("./").rpartition("/")
    return f"{folder}{slash}{file.split('.', 1)[0]}"


def _open_tar(location: str, root: Path, shards: list[str], refused: Iterable[Skipped] = ()) -> TarSource:
    refused = list(refused)
    members: dict[str, tuple[str, TarMember]] = {}
    ids: list[str] = []
    for shard in shards:
        inside: list[str] = []
        for header in tar_members(root / shard):
            if isinstance(header, str):
                refused.append(Skipped(escape(shard), header))
                continue
            name = header.name.removeprefix("./")
            suffix = os.path.splitext(name)[1].lower()
            if header.isdir() or suffix not in IMAGE_SUFFIXES | UNREAD_SUFFIXES:
                continue
            if name.rpartition("/")[2].startswith("._") and _is_finder_note(root / shard, header.offset_data):
                continue
            id = f"{shard}:{name}"
            reason = unusable_name(name)
            if suffix in UNREAD_SUFFIXES:
                reason = f"{suffix} is a format that is not read"
            elif not header.isreg() or header.issparse():
                reason = _NOT_REGULAR
            elif id in members:
                reason = "another member has the same name"
            if reason is not None:
                refused.append(Skipped(escape(id), reason))
                continue
            members[id] = (shard, TarMember(header.name, header.offset_data, header.size))
            inside.append(id)
        ids.extend(sorted(inside))
    return TarSource(
        location=location,
        root=root,
        ids=tuple(ids),
        refused=_sorted_unique(refused, ids),
        shards=tuple(shards),
        members=members,
    )


def _read_member(id: str, file: BinaryIO, member: TarMember) -> RawImage:
    if member.size > MAX_FILE_BYTES:
        return RawImage(id, None, _too_long(member.size))
    try:
        file.seek(member.offset)
        data = file.read(member.size)
    except OSError as error:
        return RawImage(id, None, _unreadable("shard", error))
    if len(data) < member.size:
        return RawImage(id, None, "the shard ends inside this member")
    return RawImage(id, data)


# Shared helpers ------------------------------------------------------------------------------------

_LINKED_FOLDER = "a link to a folder, and links are not followed"
_OUTSIDE = "outside the root of the list"
_LINK_OUTSIDE = "a link that leaves the root, and links are not followed"
_NOT_REGULAR = "not a regular file"


def _is_finder_note(path: str | Path, offset: int = 0) -> bool:
    """Whether macOS wrote this beside a picture, as `._NAME`. Other hidden files count: trainers read them, too."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(4) == b"\x00\x05\x16\x07"
    except OSError:
        return False


def escape(name: str) -> str:
    r"""A name that is safe to print and to write on one line; what is not printable becomes a backslash escape.

    >>> escape("a\nb"), escape("caf\udce9.png"), escape("größe 1.png")
    ('a\\nb', 'caf\\xe9.png', 'größe 1.png')
    """
    raw = os.fsencode(name) if any("\udc80" <= c <= "\udcff" for c in name) else None
    text = raw.decode("utf-8", "backslashreplace") if raw is not None else name
    return "".join(c if c == " " or c.isprintable() else repr(c)[1:-1] for c in text)


def shown(path: str | Path) -> str:
    """A path as it appears in messages."""
    return escape(str(path))


def unusable_name(name: str) -> str | None:
    """Why a name cannot be an id: it must fit on one line of UTF-8 text. None when it can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "the name is not valid UTF-8"
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name):
        return "the name holds a line break or another control character"
    return None


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return "folder"
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ConfigError(
            f"{shown(path)} is {_NOT_REGULAR}; expected a folder, a parquet or tar shard, or a text list"
        )
    if suffix in IMAGE_SUFFIXES:
        raise ConfigError(f"{shown(path)} is a single image; name the folder that holds it")
    if path.name.lower().endswith(_ARCHIVES):
        raise ConfigError(
            f"{shown(path)} is a compressed archive; unpack it, or repack it as an uncompressed .tar"
        )
    return {".parquet": "parquet file", ".tar": "tar file"}.get(suffix, "list")


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _bounded(id: str, data: bytes) -> RawImage:
    return RawImage(id, None, _too_long(len(data))) if len(data) > MAX_FILE_BYTES else RawImage(id, data)


def _unreadable(what: str, error: OSError) -> str:
    return f"the {what} cannot be read: {error.strerror or type(error).__name__}"


def _too_long(size: int) -> str:
    return (
        f"more than {MAX_FILE_BYTES:,} bytes" if size == MAX_FILE_BYTES + 1 else f"{size:,} bytes is too long"
    )


def _first_line(error: BaseException) -> str:
    return escape(str(error).strip().split("\n")[0])[:120] or type(error).__name__


def _sorted_unique(refused: Iterable[Skipped], ids: Iterable[str]) -> tuple[Skipped, ...]:
    """Sort by id; an id that is taken (an escaped name can equal a real one) gets a number behind it."""
    taken = set(ids)
    unique = []
    for entry in sorted(refused, key=lambda entry: (entry.id, entry.reason)):
        id, number = entry.id, 2
        while id in taken:
            id, number = f"{entry.id}#{number}", number + 1
        taken.add(id)
        unique.append(Skipped(id, entry.reason))
    return tuple(unique)


def _about_refused(refused: Collection[Skipped], follow_links: bool) -> str:
    if not refused:
        return ""
    first = min(refused, key=lambda entry: entry.id)
    links = sum(entry.reason in (_LINKED_FOLDER, _LINK_OUTSIDE) for entry in refused)
    hint = f"; {links} are links: --follow-links reads them" if links and not follow_links else ""
    if any(entry.reason == _OUTSIDE for entry in refused):
        hint += "; --root DIR names the folder that holds them all"
    return f"; {len(refused)} entries were refused, the first is {first.id!r}: {first.reason}{hint}"


def _nothing_left(source: ImageSource, follow_links: bool) -> str:
    return f"{shown(source.location)} names no image that may be read{_about_refused(source.refused, follow_links)}"
