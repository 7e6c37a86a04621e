from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpoison.data import sources
from unpoison.data.sources import (
    FileSource,
    ParquetSource,
    RawImage,
    TarSource,
    escape,
    open_files,
    open_source,
    unusable_name,
)
from unpoison.errors import ConfigError, DataError, NothingToScanError
from unpoison.records import Skipped

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def write_parquet(path: Path, cells: list[object], *, group: int = 4, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pa.array(cells, IMAGE), **columns})
    pq.write_table(table, path, row_group_size=group)
    return path


def cells(*data: bytes | None) -> list[object]:
    return [{"bytes": item, "path": f"{row}.png"} for row, item in enumerate(data)]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def read(source: sources.ImageSource) -> dict[str, bytes | str | None]:
    rows = list(source.stream())
    assert tuple(row.id for row in rows) == source.ids
    assert all((row.data is None) == (row.reason is not None) for row in rows)
    return {row.id: row.reason if row.data is None else row.data for row in rows}


# Folder


def test_folder_ids_are_sorted_relative_paths_at_any_depth(tmp_path):
    touch(tmp_path, "b/z.JPG", "b/a.png", "a.webp", "c/d/e/f.TIFF", "notes.txt", "noext")
    source = open_source(tmp_path)
    assert isinstance(source, FileSource)
    assert source.ids == ("a.webp", "b/a.png", "b/z.JPG", "c/d/e/f.TIFF")
    assert source.refused == ()
    assert read(source) == {id: id.encode() for id in source.ids}
    assert source.path_of("b/a.png") == tmp_path / "b/a.png"
    assert source.path_of("../x.png") is None
    assert source.containers()[0] == tmp_path / "a.webp"


FINDER_NOTE = b"\x00\x05\x16\x07 what macOS writes beside a picture"


def test_hidden_images_are_read_as_trainers_read_them(tmp_path):
    touch(tmp_path, "a.png", ".hidden.png", ".folder/x.png", "b/._z.jpg")
    (tmp_path / "._a.png").write_bytes(FINDER_NOTE)
    assert open_source(tmp_path).ids == (".folder/x.png", ".hidden.png", "a.png", "b/._z.jpg")
    write_tar(tmp_path / "x.tar", [(".a.png", b"one"), ("._a.png", FINDER_NOTE), ("b/._c.png", b"two")])
    assert open_source(tmp_path / "x.tar").ids == ("x.tar:.a.png", "x.tar:b/._c.png")


def test_streaming_is_lazy_and_reads_each_file_once(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    stream = open_source(tmp_path).stream()
    assert next(stream) == RawImage("a.png", b"a.png")
    (tmp_path / "b.png").unlink()
    assert next(stream) == RawImage("b.png", None, "the file cannot be read: No such file or directory")


def test_a_very_deep_folder(tmp_path):
    deep = "/".join(["d"] * 300)
    touch(tmp_path, f"{deep}/x.png")
    assert open_source(tmp_path).ids == (f"{deep}/x.png",)


def test_links_out_and_links_to_folders_need_permission(tmp_path):
    inside, outside = touch(tmp_path / "in", "a.png", "sub/b.png"), touch(tmp_path / "out", "c.png")
    (inside / "same.png").symlink_to("a.png")
    (inside / "escape.png").symlink_to(outside / "c.png")
    (inside / "folder").symlink_to(outside)
    (inside / "broken.png").symlink_to("nowhere")
    source = open_source(inside)
    assert source.ids == ("a.png", "same.png", "sub/b.png")
    assert source.refused == (
        Skipped("broken.png", "a broken link"),
        Skipped("escape.png", "a link that leaves the root, and links are not followed"),
        Skipped("folder", "a link to a folder, and links are not followed"),
    )
    followed = open_source(inside, follow_links=True)
    assert followed.ids == ("a.png", "escape.png", "folder/c.png", "same.png", "sub/b.png")
    assert read(followed)["folder/c.png"] == b"c.png"


def test_links_in_circles_end(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png", "c/3.png")
    for here in "abc":
        for there in "abc":
            (tmp_path / here / f"to_{there}").symlink_to(tmp_path / there)
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to("self.png")
    source = open_source(tmp_path, follow_links=True)
    assert source.ids == ("a/1.png", "b/2.png", "c/3.png")
    assert {entry.reason for entry in source.refused} == {
        "a link to a folder that is already read",
        "a broken link",
    }


def test_names_that_break_lines_are_refused_with_an_escaped_id(tmp_path):
    touch(tmp_path, "ok é 1.png")
    for name in (b"a\nb.png", b"a\x07.png", b"caf\xe9.png", "x\u2028y.png".encode(), b"bad\ndir/z.png"):
        path = os.fsencode(tmp_path) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass
    source = open_source(tmp_path)
    assert source.ids == ("ok é 1.png",)
    control, encoding = (
        "the name holds a line break or another control character",
        "the name is not valid UTF-8",
    )
    assert source.refused == (
        Skipped("a\\nb.png", control),
        Skipped("a\\x07.png", control),
        Skipped("bad\\ndir/z.png", control),
        Skipped("caf\\xe9.png", encoding),
        Skipped("x\\u2028y.png", control),
    )


def test_an_escaped_id_never_collides_with_a_real_one(tmp_path):
    touch(tmp_path, "a\nb.png", "a\\nb.png")
    source = open_source(tmp_path)
    assert source.ids == ("a\\nb.png",)
    assert source.refused[0].id == "a\\nb.png#2"


@given(st.text(st.characters(codec=None), min_size=1, max_size=20))
def test_escaped_names_are_printable_lines(name):
    assert len(escape(name).splitlines()) <= 1
    escape(name).encode()
    if unusable_name(name) is None:
        assert name.splitlines() == [name]


def test_what_is_no_regular_file_is_refused_not_opened(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(tmp_path)
    assert source.ids == ("a.png", "b.png")
    assert source.refused == (Skipped("pipe.png", "not a regular file"),)
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")  # swapped after the listing
    assert read(source)["b.png"] == "not a regular file"


def test_image_formats_that_are_not_read_do_not_vanish(tmp_path):
    touch(tmp_path, "a.png", "b.HEIC")
    assert open_source(tmp_path).refused == (Skipped("b.HEIC", ".heic is a format that is not read"),)


def test_a_file_that_is_too_long(tmp_path, monkeypatch):
    touch(tmp_path, "a.png")
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 3)
    assert read(open_source(tmp_path)) == {"a.png": "more than 3 bytes"}


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    reason = "the folder cannot be read: Permission denied"
    assert open_source(tmp_path).refused == (Skipped("locked", reason),)
    with pytest.raises(DataError, match=r"locked: the folder cannot be read: Permission denied"):
        open_source(tmp_path / "locked")


def test_missing_path():
    with pytest.raises(
        ConfigError, match="nowhere: no such file or folder; expected images, parquet or tar shards"
    ):
        open_source("nowhere")


def test_empty_folder_says_what_it_saw(tmp_path):
    with pytest.raises(NothingToScanError, match="holds no images, and no other files$") as caught:
        open_source(tmp_path)
    assert caught.value.exit_code == 4
    touch(tmp_path, "a.txt", "b.txt", "c.csv", "noext")
    with pytest.raises(
        NothingToScanError, match=r"but 4 other files \(2 .txt, 1 .csv, 1 without extension\)$"
    ):
        open_source(tmp_path)


def test_a_folder_of_links_names_the_option(tmp_path):
    touch(tmp_path / "out", "c.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/c.png").symlink_to(tmp_path / "out/c.png")
    (tmp_path / "in/d").symlink_to(tmp_path / "out")
    with pytest.raises(
        NothingToScanError, match="2 entries were refused, .*; 2 are links: --follow-links reads them"
    ):
        open_source(tmp_path / "in")


def test_mixed_folders_are_ambiguous(tmp_path):
    touch(tmp_path, "a.png", "x.parquet", "y.tar")
    with pytest.raises(
        DataError, match="holds image files and .parquet shards and .tar shards; name the folder"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.png", "is a single image; name the folder that holds it"),
        ("a.tar.gz", "is a compressed archive; unpack it"),
        ("a.zip", "is a compressed archive"),
    ],
)
def test_files_that_are_no_source(tmp_path, name, message):
    touch(tmp_path, name)
    with pytest.raises(ConfigError, match=message):
        open_source(tmp_path / name)


def test_a_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is not a regular file; expected a folder"):
        open_source(tmp_path / "pipe")


def test_root_is_for_lists_only(image_folder):
    with pytest.raises(ConfigError, match="only a text list has a root; .* is a folder"):
        open_source(image_folder, root=image_folder)


def test_only_keeps_named_ids_and_names_unknown_ones(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.heic", "d.avif")
    source = open_source(tmp_path, only={"b.png", "c.heic"})
    assert source.ids == ("b.png",)
    assert [entry.id for entry in source.refused] == ["c.heic"]
    with pytest.raises(DataError, match=r"2 of 3 ids are not in .*, the first is 'x.png'; ids are paths"):
        open_source(tmp_path, only=["a.png", "z.png", "x.png"])
    with pytest.raises(NothingToScanError, match="names no image that may be read$"):
        open_source(tmp_path, only=[])


def test_signature_follows_names_sizes_and_times(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    first = open_source(tmp_path).signature()
    assert open_source(tmp_path).signature() == first
    assert open_source(tmp_path, only=["a.png"]).signature() != first
    os.utime(tmp_path / "a.png", ns=(1, 1))
    second = open_source(tmp_path).signature()
    assert second != first
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    assert source.signature() not in (first, second)


# Text list


def test_list_is_relative_to_its_folder_and_sorted(tmp_path):
    touch(tmp_path, "b.png", "d/a.png", "d/picture", "#c.png", " space .png")
    (tmp_path / "list.txt").write_text("b.png\r\n\n./d/../d/a.png\nd/picture\n  \n#c.png\n space .png\n")
    source = open_source(tmp_path / "list.txt")
    assert source.ids == (" space .png", "#c.png", "b.png", "d/a.png", "d/picture")
    assert read(source)["d/picture"] == b"d/picture"


def test_list_with_another_root_byte_order_mark_and_absolute_paths(tmp_path):
    touch(tmp_path / "images", "a.png", "b.png")
    listing = tmp_path / "clean.txt"
    listing.write_bytes(b"\xef\xbb\xbfa.png\n" + os.fsencode(tmp_path / "images/b.png"))
    source = open_source(listing, root=tmp_path / "images")
    assert source.ids == ("a.png", "b.png")
    with pytest.raises(ConfigError, match=r"root=.*nowhere: expected the folder that the lines of"):
        open_source(listing, root=tmp_path / "nowhere")


def test_list_entries_that_leave_the_root_are_refused(tmp_path):
    touch(tmp_path, "out.png", "in/a.png")
    (tmp_path / "in/link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in/sub").symlink_to(tmp_path)
    listing = tmp_path / "in/list.txt"
    listing.write_text(
        "a.png\n../out.png\n/etc/hostname\nlink.png\nsub/out.png\n../in2/x.png\ntab\there.png\n"
    )
    source = open_source(listing)
    assert source.ids == ("a.png",)
    outside, link = "outside the root of the list", "a link that leaves the root, and links are not followed"
    assert source.refused == (
        Skipped("../in2/x.png", outside),
        Skipped("../out.png", outside),
        Skipped("/etc/hostname", outside),
        Skipped("link.png", link),
        Skipped("sub/out.png", link),
        Skipped("tab\\there.png", "the name holds a line break or another control character"),
    )
    assert open_source(listing, follow_links=True).ids == ("a.png", "link.png", "sub/out.png")


def test_list_duplicates_name_both_lines(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\nb.png\n\nx/../a.png\n")
    with pytest.raises(DataError, match=r"list.txt: 'x/../a.png' is named by line 1 and again by line 4"):
        open_source(tmp_path / "list.txt")


def test_list_entries_that_are_missing_or_folders_become_reasons(tmp_path):
    touch(tmp_path, "a.png", "d/b.png")
    (tmp_path / "list.txt").write_text("a.png\nmissing.png\nd\n")
    assert read(open_source(tmp_path / "list.txt")) == {
        "a.png": b"a.png",
        "d": "not a regular file",
        "missing.png": "the file cannot be read: No such file or directory",
    }


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"\xff\xfe\xfa", DataError, "is no list of paths: byte 0 is not UTF-8; expected one path per line"),
        (b"a\0b", DataError, "is no list of paths: it holds zero bytes"),
        (b" \n\n", NothingToScanError, "names no images; expected one path per line"),
        (
            b"../x.png",
            NothingToScanError,
            "1 entries were refused, the first is '../x.png': outside the root",
        ),
    ],
)
def test_lists_that_are_none(tmp_path, content, error, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(error, match=message):
        open_source(tmp_path / "list.txt")


def test_open_files(tmp_path):
    touch(tmp_path, "x/b.png", "y/a.jpg")
    source = open_files([tmp_path / "y/a.jpg", str(tmp_path / "x/b.png")])
    assert source.ids == ("x/b.png", "y/a.jpg")
    assert source.root == tmp_path
    assert open_files([tmp_path / "x/b.png"]).ids == ("b.png",)
    with pytest.raises(NothingToScanError, match="an empty sequence of paths"):
        open_files([])
    with pytest.raises(DataError, match="is named by path 1 and again by path 2"):
        open_files([tmp_path / "x/b.png"] * 2)
    with pytest.raises(ConfigError, match="expected paths of image files, got a int among them"):
        open_files([1])  # type: ignore[list-item]


# Parquet


def test_parquet_file_in_row_order(tmp_path):
    data = [f"image {row}".encode() for row in range(11)]
    path = write_parquet(tmp_path / "train.parquet", cells(*data), label=list(range(11)))
    source = open_source(path)
    assert isinstance(source, ParquetSource)
    assert source.ids == tuple(f"train.parquet:{row}" for row in range(11))
    assert list(read(source).values()) == data
    assert source.path_of("train.parquet:3") is None
    assert source.containers() == (path,)


def test_parquet_shards_and_a_selection(tmp_path):
    write_parquet(tmp_path / "b/1.parquet", cells(*[b"b%d" % row for row in range(9)]), group=3)
    write_parquet(tmp_path / "a.parquet", cells(b"a0", b"a1"))
    source = open_source(tmp_path)
    assert source.ids[:3] == ("a.parquet:0", "a.parquet:1", "b/1.parquet:0")
    some = source.select(["b/1.parquet:8", "b/1.parquet:2", "a.parquet:1"])
    assert read(some) == {"a.parquet:1": b"a1", "b/1.parquet:2": b"b2", "b/1.parquet:8": b"b8"}


def test_parquet_rows_without_bytes_have_a_reason(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet", [{"bytes": b"ok", "path": None}, {"bytes": None, "path": "p"}, None]
    )
    assert list(read(open_source(path)).values()) == [b"ok", *["the row holds no image bytes"] * 2]


def test_parquet_columns_of_other_names_and_kinds(tmp_path):
    pq.write_table(pa.table({"img": pa.array(cells(b"x"), IMAGE), "n": [1]}), tmp_path / "img.parquet")
    pq.write_table(pa.table({"image": pa.array([b"y"], pa.binary())}), tmp_path / "plain.parquet")
    pq.write_table(pa.table({"image": pa.array([b"z"], pa.large_binary())}), tmp_path / "wide.parquet")
    assert list(read(open_source(tmp_path)).values()) == [b"x", b"y", b"z"]


def test_parquet_of_another_schema_names_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "image": [3]}), tmp_path / "x.parquet")
    with pytest.raises(
        DataError, match=r"expected a column image: struct<bytes, path>, found text: .*, image: int64"
    ):
        open_source(tmp_path / "x.parquet")
    both = {name: pa.array(cells(b"x"), IMAGE) for name in ("left", "right")}
    pq.write_table(pa.table(both), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="is not in the Hugging Face image schema"):
        open_source(tmp_path / "x.parquet")


def test_a_file_that_is_no_parquet(tmp_path):
    touch(tmp_path, "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet cannot be read as parquet: "):
        open_source(tmp_path)


def test_an_empty_parquet(tmp_path):
    write_parquet(tmp_path / "x.parquet", [])
    with pytest.raises(NothingToScanError, match=r"x.parquet names no image that may be read"):
        open_source(tmp_path / "x.parquet")


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"image": pa.array(cells(*[bytes([65 + row]) * 500 for row in range(12)]), IMAGE)})
    pq.write_table(table, path, row_group_size=4, compression="gzip", use_dictionary=False)
    source = open_source(path)
    raw = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
        start, length = column.data_page_offset, column.total_compressed_size
    raw[start + 40 : start + length] = bytes(length - 40)
    path.write_bytes(raw)
    rows = list(read(source).values())
    assert [len(row) for row in rows[:4] + rows[8:]] == [500] * 8
    assert all(str(row).startswith("the shard is damaged: ") for row in rows[4:8])


def test_a_shard_that_shrinks_or_vanishes_gives_reasons(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", cells(b"a", b"b", b"c"))
    source = open_source(path)
    write_parquet(path, cells(b"a"))
    assert list(read(source).values()) == [b"a", *["the shard ends before this row"] * 2]
    path.unlink()
    assert all(str(reason).startswith("the shard cannot be read: ") for reason in read(source).values())


def test_parquet_bytes_are_bounded(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", cells(b"abc", b"abcdefgh"))
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 4)
    assert list(read(open_source(path)).values()) == [b"abc", "8 bytes is too long"]


# Tar


def test_tar_shards(tmp_path):
    write_tar(
        tmp_path / "1.tar",
        [("./b/2.jpg", b"two"), ("a.cls", b"0"), ("a.png", b"one"), ("b/._2.jpg", FINDER_NOTE)],
    )
    write_tar(tmp_path / "2.tar", [("a.PNG", b"three"), ("a.json", b"{}")])
    source = open_source(tmp_path)
    assert isinstance(source, TarSource)
    assert read(source) == {"1.tar:a.png": b"one", "1.tar:b/2.jpg": b"two", "2.tar:a.PNG": b"three"}
    assert source.containers() == (tmp_path / "1.tar", tmp_path / "2.tar")
    assert open_source(tmp_path / "2.tar").ids == ("2.tar:a.PNG",)
    assert read(source.select(["2.tar:a.PNG"])) == {"2.tar:a.PNG": b"three"}


def test_tar_members_that_are_no_plain_files_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("dev.png", tarfile.CHRTYPE),
            ("dir.png", tarfile.DIRTYPE),
        ):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            archive.addfile(header)
        for name, data in (
            ("a.png", b"1"),
            ("./a.png", b"2"),
            ("b.avif", b""),
            ("n\nl.png", b""),
            ("../up.png", b"3"),
        ):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    source = open_source(tmp_path / "x.tar")
    assert read(source) == {"x.tar:../up.png": b"3", "x.tar:a.png": b"1"}  # a name only: nothing is extracted
    assert source.refused == (
        Skipped("x.tar:a.png#2", "another member has the same name"),
        Skipped("x.tar:b.avif", ".avif is a format that is not read"),
        Skipped("x.tar:dev.png", "not a regular file"),
        Skipped("x.tar:link.png", "not a regular file"),
        Skipped("x.tar:n\\nl.png", "the name holds a line break or another control character"),
    )


def test_a_damaged_header_does_not_hide_the_rest_silently(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{row}.png", b"data") for row in range(4)])
    raw = bytearray(path.read_bytes())
    raw[2 * 1024 : 2 * 1024 + 300] = b"?" * 300
    path.write_bytes(raw)
    source = open_source(path)
    assert source.ids == ("x.tar:0.png", "x.tar:1.png")
    assert source.refused == (Skipped("x.tar", "damaged at byte 2048; what follows cannot be read"),)


def test_a_truncated_tar(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.png", b"ok"), ("1.png", b"x" * 2000)])
    path.write_bytes(path.read_bytes()[: 3 * 512 + 700])
    source = open_source(path)
    assert read(source) == {"x.tar:0.png": b"ok", "x.tar:1.png": "the shard ends inside this member"}
    assert source.refused[0].reason == "cannot be read as a tar: unexpected end of data"


def test_a_tar_that_steps_back_comes_to_an_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.png", b"ok"), ("1.png", b"evil")])
    data = bytearray(path.read_bytes())
    header = data[1024:1536]
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # GNU's base 256: -512
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[1024:1536] = header
    path.write_bytes(data)
    source = open_source(path)
    assert source.ids == ("x.tar:0.png",)
    assert "byte 1024" in source.refused[0].reason or "tar" in source.refused[0].reason


def test_a_file_that_is_no_tar(tmp_path):
    touch(tmp_path, "x.tar")
    with pytest.raises(NothingToScanError, match="the first is 'x.tar': cannot be read as a tar: "):
        open_source(tmp_path / "x.tar")


def test_tar_members_are_bounded_and_a_vanished_shard_gives_reasons(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", [("0.png", b"ok"), ("1.png", b"long" * 9)])
    source = open_source(path)
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 4)
    assert list(read(source).values()) == [b"ok", "36 bytes is too long"]
    path.unlink()
    assert list(read(source).values()) == ["the shard cannot be read: No such file or directory"] * 2
