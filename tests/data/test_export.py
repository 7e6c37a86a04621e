from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unpoison.data import export
from unpoison.data.export import (
    CleanCopy,
    atomic_file,
    clean_copy,
    write_json_atomically,
    write_lines_atomically,
)
from unpoison.data.sources import open_source
from unpoison.errors import ConfigError, DataError

KEEP = ["cat/0.png", "dog/2.png"]


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_lines_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/list.txt"
    write_lines_atomically(path, ["a é", "b"])
    assert path.read_bytes() == "a é\nb\n".encode()
    with pytest.raises(DataError, match=r"'c\\nd' holds a line break and cannot be an entry of list.txt"):
        write_lines_atomically(path, ["x", "c\nd"])
    assert everything(tmp_path) == {"new/list.txt": "a é\nb\n".encode()}
    write_lines_atomically(path, [])
    assert path.read_bytes() == b""


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json_atomically(tmp_path / "x.json", {"b": [1, "é"], "a": None})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"b": [1, "é"], "a": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomically(tmp_path / "x.json", float("nan"))
    assert list(everything(tmp_path)) == ["x.json"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert everything(tmp_path) == {"x": b"new"}
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert everything(tmp_path) == {"x": b"new"}


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_a_folder_keeps_its_paths_and_its_source(mode, image_folder, tmp_path):
    before = everything(image_folder)
    result = clean_copy(open_source(image_folder), KEEP, tmp_path / "deep/out", mode)
    assert everything(tmp_path / "deep/out") == {id: before[id] for id in KEEP}
    assert everything(image_folder) == before
    size = sum(len(before[id]) for id in KEEP)
    linked = 2 if mode == "link" else 0
    assert result == CleanCopy(kept=2, removed=4, copied=2 - linked, linked=linked, bytes=size)
    shared = os.path.samefile(image_folder / KEEP[0], tmp_path / "deep/out" / KEEP[0])
    assert shared == (mode == "link")


def test_links_fall_back_to_copies_across_devices(image_folder, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    result = clean_copy(open_source(image_folder), KEEP, tmp_path / "out", "link")
    assert (result.linked, result.copied) == (0, 2)
    assert set(everything(tmp_path / "out")) == set(KEEP)


def test_other_link_errors_stop_and_leave_nothing(image_folder, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        DataError, match="'cat/0.png' cannot be copied: No space left on device; nothing was written"
    ):
        clean_copy(open_source(image_folder), KEEP, tmp_path / "out", "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_a_link_in_the_source_becomes_a_file(image_folder, tmp_path):
    (image_folder / "link.png").symlink_to("cat/0.png")
    for mode in ("copy", "link"):
        clean_copy(open_source(image_folder), ["link.png"], tmp_path / mode, mode)
        assert not (tmp_path / mode / "link.png").is_symlink()


def test_list_mode_writes_ids_that_open_as_a_list(image_folder, tmp_path):
    result = clean_copy(open_source(image_folder), KEEP[::-1], tmp_path / "out", "list")
    assert result == CleanCopy(kept=2, removed=4, copied=0, linked=0, bytes=0)
    assert everything(tmp_path / "out") == {"clean.txt": b"cat/0.png\ndog/2.png\n"}
    assert open_source(tmp_path / "out/clean.txt", root=image_folder).ids == tuple(KEEP)


def test_a_list_is_read_again(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_lines_atomically", lambda path, lines: path.write_text("cat/0.png\n"))
    with pytest.raises(DataError, match="the list does not read as it was written; clean again"):
        clean_copy(open_source(image_folder), KEEP, tmp_path / "out", "list")
    assert not (tmp_path / "out").exists()


def test_a_list_source(image_folder, tmp_path):
    (tmp_path / "list.txt").write_text("images/cat/0.png\nimages/dog/1.png\n")
    clean_copy(open_source(tmp_path / "list.txt"), ["images/dog/1.png"], tmp_path / "out")
    assert list(everything(tmp_path / "out")) == ["images/dog/1.png"]


def test_output_folders_in_use_are_refused(image_folder, tmp_path):
    source = open_source(image_folder)
    before = everything(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, message in (
        (image_folder, "lies inside the source"),
        (image_folder / "sub/out", "lies inside the source .*, which is never changed"),
        (tmp_path, "is not empty; name a new folder, nothing is ever overwritten"),
        (image_folder / "../images/cat", "lies inside the source"),
        (tmp_path / "link", "exists and is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            clean_copy(source, KEEP, out)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="exists and is no folder; name a new folder"):
        clean_copy(source, KEEP, tmp_path / "file")
    assert before.items() <= everything(tmp_path).items()
    clean_copy(source, KEEP, tmp_path / "empty")
    assert set(everything(tmp_path / "empty")) == set(KEEP)


class Killed(BaseException):
    """What no handler of errors sees."""


def kill_at(stage: str, times: int):
    def progress(name: str, done: int, total: int) -> None:
        if name == stage and done == times:
            raise Killed

    return progress


def test_a_killed_copy_leaves_nothing_under_its_name_and_goes_on(image_folder, tmp_path, monkeypatch):
    source = open_source(image_folder)
    with pytest.raises(Killed):
        clean_copy(source, KEEP, tmp_path / "out", progress=kill_at("copy images", 1))
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.glob(".out.partial-*")
    (partial / KEEP[1]).parent.mkdir(parents=True)
    (partial / KEEP[1]).write_bytes(b"cut short")
    copied = []
    copy = export.shutil.copyfile
    monkeypatch.setattr(export.shutil, "copyfile", lambda *paths: (copied.append(paths[0]), copy(*paths)))
    result = clean_copy(source, KEEP, tmp_path / "out")
    assert copied == [image_folder / KEEP[1]] and result.copied == 2
    assert everything(tmp_path / "out") == {id: (image_folder / id).read_bytes() for id in KEEP}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]


def test_what_another_copy_left_is_removed_and_other_folders_are_not(image_folder, tmp_path):
    source = open_source(image_folder)
    with pytest.raises(Killed):
        clean_copy(source, KEEP[:1], tmp_path / "out", progress=kill_at("compare with the original", 1))
    (tmp_path / ".out.partial-mine").mkdir()
    clean_copy(source, KEEP, tmp_path / "out")
    assert set(everything(tmp_path / "out")) == set(KEEP)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-mine", "images", "out"]


def test_a_killed_copy_of_shards_goes_on(tmp_path, monkeypatch):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "in").mkdir()
    for shard in ("a.parquet", "b.parquet"):
        images = pa.array([{"bytes": f"{shard}{row}".encode(), "path": None} for row in range(9)], kind)
        pq.write_table(pa.table({"image": images, "x": [float("nan")] * 9}), tmp_path / "in" / shard)
    keep = ["a.parquet:1", "b.parquet:2", "b.parquet:8"]
    with pytest.raises(Killed):
        clean_copy(open_source(tmp_path / "in"), keep, tmp_path / "out", progress=kill_at("copy images", 1))
    (partial,) = tmp_path.glob(".out.partial-*")
    assert [path.name for path in partial.iterdir()] == ["a.parquet"]
    (partial / ".b.parquet.unfinished").write_bytes(b"half")
    before = (partial / "a.parquet").stat().st_mtime_ns
    clean_copy(open_source(tmp_path / "in"), keep, tmp_path / "out")
    assert sorted(everything(tmp_path / "out")) == ["a.parquet", "b.parquet"]
    assert (tmp_path / "out/a.parquet").stat().st_mtime_ns == before
    assert len(pq.read_table(tmp_path / "out/b.parquet")) == 2


def test_a_folder_that_cannot_be_made_is_one_line(image_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out=.*file/out cannot be written: .*; name another folder"):
        clean_copy(open_source(image_folder), KEEP, tmp_path / "file/out")


def test_the_folders_of_listed_images_are_the_source(image_folder, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("images/cat/0.png\nimages/dog/2.png\n")
    source = open_source(listing)
    with pytest.raises(ConfigError, match=r"lies inside the source .*cat, which is never changed"):
        clean_copy(source, ["images/cat/0.png"], tmp_path / "images/cat/out")
    clean_copy(source, ["images/cat/0.png"], tmp_path / "out")
    assert list(everything(tmp_path / "out")) == ["images/cat/0.png"]


def test_a_label_that_differs_from_the_original_is_noticed(tmp_path, monkeypatch):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": bytes([row]), "path": None} for row in range(4)], kind)
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2, 3]}), tmp_path / "p/x.parquet")
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t/x.tar", "w") as archive:
        for name, data in (("1.png", b"one"), ("1.cls", b"0")):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))

    def spoil(stage: str, done: int, total: int) -> None:
        (partial,) = tmp_path.glob(".out.partial-*")
        if stage != "copy images":
            return
        for path in partial.glob("*.parquet"):
            table = pq.read_table(path)
            pq.write_table(table.set_column(1, "label", pa.array([7] * len(table))), path)
        for path in partial.glob("*.tar"):
            path.write_bytes(path.read_bytes().replace(b"0" + bytes(511), b"9" + bytes(511)))

    for folder, keep, message in (
        ("p", "x.parquet:2", "x.parquet: a column of the copy differs from the original"),
        ("t", "x.tar:1.png", "1.cls in the copy differs from the original"),
    ):
        with pytest.raises(DataError, match=f"{message}; nothing was written"):
            clean_copy(open_source(tmp_path / folder), [keep], tmp_path / "out", progress=spoil)
        assert not list(tmp_path.glob("*out*"))


def test_what_cannot_be_kept(image_folder, tmp_path):
    (image_folder / "x.heic").touch()
    source = open_source(image_folder)
    for keep, message in (
        (["nope.png"], "1 of 1 ids are not in"),
        ([], "no image is to be kept; nothing was written"),
        (["x.heic", *KEEP], "'x.heic' is to be kept but cannot be read: .heic is a format that is not read"),
    ):
        with pytest.raises(DataError, match=message):
            clean_copy(source, keep, tmp_path / "out")
    with pytest.raises(ConfigError, match="mode 'move': expected one of copy, link, list"):
        clean_copy(source, KEEP, tmp_path / "out", "move")
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_meanwhile_leaves_nothing_behind(image_folder, tmp_path, monkeypatch):
    source = open_source(image_folder)
    copy = export.shutil.copyfile

    def spoil(original, target):
        copy(original, target)
        Path(target).write_bytes(b"other")

    monkeypatch.setattr(export.shutil, "copyfile", spoil)
    with pytest.raises(DataError, match="'cat/0.png' cannot be copied: the copy differs from the original"):
        clean_copy(source, KEEP, tmp_path / "out")
    monkeypatch.undo()
    (image_folder / KEEP[1]).unlink()
    with pytest.raises(DataError, match=r"'dog/2.png' cannot be copied: No such file or directory; nothing"):
        clean_copy(source, KEEP, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_parquet_keeps_schema_metadata_and_columns(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for shard, rows in (("a.parquet", 700), ("sub/b.parquet", 5), ("c.parquet", 3)):
        images = pa.array(
            [{"bytes": f"{shard}{row}".encode(), "path": f"{row}.png"} for row in range(rows)], kind
        )
        table = pa.table({"image": images, "label": list(range(rows))}).replace_schema_metadata(
            {"huggingface": "{}"}
        )
        (tmp_path / "in/sub").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / "in" / shard, row_group_size=300)
    before = everything(tmp_path / "in")
    rows = [0, 299, 300, 555, 699]
    keep = [f"a.parquet:{row}" for row in rows] + ["sub/b.parquet:4"]
    result = clean_copy(open_source(tmp_path / "in"), keep, tmp_path / "out", "link")
    assert (result.kept, result.removed, result.copied, result.linked) == (6, 702, 6, 0)
    assert sorted(everything(tmp_path / "out")) == ["a.parquet", "sub/b.parquet"]
    original, copy = (pq.read_table(tmp_path / place / "a.parquet") for place in ("in", "out"))
    assert copy.schema.equals(original.schema, check_metadata=True)
    assert copy.equals(original.take(rows))
    assert everything(tmp_path / "in") == before


def test_tar_keeps_samples_whose_images_stay(tmp_path):
    members = [
        ("readme.txt", b"about"),
        *(("1.png", b"one"), ("1.cls", b"0"), ("2.png", b"two"), ("2.cls", b"1"), ("2.heic", b"?")),
        *(("3.left.png", b"left"), ("3.right.png", b"right"), ("3.json", b"{}"), ("3.left.png", b"again")),
    ]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/x.tar", "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    before = everything(tmp_path / "in")
    result = clean_copy(open_source(tmp_path / "in"), ["x.tar:1.png", "x.tar:3.left.png"], tmp_path / "out")
    assert (result.kept, result.removed, result.bytes) == (2, 4, 7)
    with tarfile.open(tmp_path / "out/x.tar") as archive:
        got = {header.name: archive.extractfile(header).read() for header in archive}
    assert got == {
        "readme.txt": b"about",
        "1.png": b"one",
        "1.cls": b"0",
        "3.left.png": b"left",
        "3.json": b"{}",
    }
    assert everything(tmp_path / "in") == before


def test_a_damaged_shard_leaves_nothing_behind(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": bytes([row]) * 500, "path": ""} for row in range(9)], kind)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/x.parquet"
    pq.write_table(pa.table({"image": images}), path, compression="gzip", use_dictionary=False)
    source = open_source(tmp_path / "in")
    raw = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(0)
        start, end = column.data_page_offset, column.data_page_offset + column.total_compressed_size
    raw[start + 40 : end] = bytes(end - start - 40)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"x.parquet cannot be filtered: .*; nothing was written"):
        clean_copy(source, ["x.parquet:0", "x.parquet:8"], tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]
