from __future__ import annotations

import dataclasses
import json
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unpoison.data import load
from unpoison.data.decode import decode_image, to_square
from unpoison.data.load import as_image_set, load_images
from unpoison.data.sources import open_source
from unpoison.errors import ConfigError, DataError, NothingToScanError, ShapeError
from unpoison.records import Geometry, ImageSet

GEOMETRY = Geometry(8, 10)


@pytest.fixture
def bad_folder(image_folder, png_header, picture, encoded):
    """Six good images, and five that cannot be read."""
    (image_folder / "text.png").write_text("not an image")
    (image_folder / "truncated.jpg").write_bytes(encoded(picture(9), "JPEG")[:200])
    (image_folder / "huge.png").write_bytes(png_header(20_000, 20_000))
    (image_folder / "empty.png").touch()
    (image_folder / "x.heic").touch()
    (image_folder / "one.png").write_bytes(encoded(Image.new("RGB", (1, 1), (1, 2, 3))))
    return image_folder


def test_rows_in_are_rows_out(bad_folder):
    source = open_source(bad_folder)
    images = load_images(source, GEOMETRY)
    assert images.ids == (*(f"{name}/{row}.png" for name in ("cat", "dog") for row in range(3)), "one.png")
    assert [entry.id for entry in images.skipped] == [
        "empty.png",
        "huge.png",
        "text.png",
        "truncated.jpg",
        "x.heic",
    ]
    assert len(images.ids) + len(images.skipped) == len(source.ids) + len(source.refused)
    reasons = {entry.id: entry.reason for entry in images.skipped}
    assert reasons["huge.png"] == "declares 400,000,000 pixels, the limit is 64,000,000"
    assert reasons["empty.png"] == "the file is empty"
    assert (images.pixels[-1].permute(1, 2, 0) == torch.tensor([1, 2, 3])).all()


def test_pixels_are_those_of_each_file_in_order_and_channels_last(bad_folder):
    images = load_images(open_source(bad_folder), GEOMETRY, workers=3)
    assert images.pixels.dtype == torch.uint8
    assert images.pixels.is_contiguous(memory_format=torch.channels_last)
    for id, pixels in zip(images.ids, images.pixels, strict=True):
        expected = to_square(decode_image((bad_folder / id).read_bytes()), GEOMETRY)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_order_does_not_depend_on_which_thread_is_faster(image_folder, monkeypatch):
    lock, calls = threading.Lock(), []

    def slow_at_first(data, *, max_pixels):
        with lock:
            calls.append(data)
            wait = 0.03 if len(calls) == 1 else 0
        time.sleep(wait)
        return decode_image(data, max_pixels=max_pixels)

    expected = load_images(open_source(image_folder), GEOMETRY, workers=1)
    monkeypatch.setattr(load, "decode_image", slow_at_first)
    got = load_images(open_source(image_folder), GEOMETRY, workers=4)
    assert got.ids == expected.ids
    assert torch.equal(got.pixels, expected.pixels)
    assert len(calls) == 6  # each file once


def test_the_window_of_waiting_bytes_is_bounded(image_folder, monkeypatch):
    monkeypatch.setattr(load, "_BYTES_IN_FLIGHT", 1)
    assert len(load_images(open_source(image_folder), GEOMETRY, workers=4)) == 6


def test_progress_ends_at_the_total(image_folder, monkeypatch):
    monkeypatch.setattr(load, "_REPORT_EVERY", 2)
    heard = []
    load_images(open_source(image_folder), GEOMETRY, workers=1, progress=lambda *event: heard.append(event))
    assert heard[0] == ("decode images", 0, 6)
    assert heard[-1] == ("decode images", 6, 6)
    assert ("decode images", 2, 6) in heard


def test_fingerprint_follows_names_and_bytes_but_not_the_geometry(bad_folder, picture):
    first = load_images(open_source(bad_folder), GEOMETRY).fingerprint
    assert len(first) == 64
    assert load_images(open_source(bad_folder), Geometry(4, 4)).fingerprint == first
    (bad_folder / "text.png").write_text("another text")  # skipped ones count too
    second = load_images(open_source(bad_folder), GEOMETRY).fingerprint
    (bad_folder / "text.png").rename(bad_folder / "text2.png")
    third = load_images(open_source(bad_folder), GEOMETRY).fingerprint
    (bad_folder / "x.heic").unlink()
    fourth = load_images(open_source(bad_folder), GEOMETRY).fingerprint
    assert len({first, second, third, fourth}) == 4


def test_limit_and_sample(bad_folder):
    source = open_source(bad_folder)
    assert load_images(source, GEOMETRY, limit=2).ids == ("cat/0.png", "cat/1.png")
    assert load_images(source, GEOMETRY, limit=99).ids == load_images(source, GEOMETRY).ids
    draws = [load_images(source, GEOMETRY, sample=9, seed=seed) for seed in (0, 0, 1)]
    names = [sorted((*draw.ids, *(entry.id for entry in draw.skipped))) for draw in draws]
    assert [len(names_here) for names_here in names] == [9, 9, 9]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("name", ["limit", "sample", "workers", "max_pixels"])
def test_numbers_below_one_are_refused(name, image_folder):
    with pytest.raises(ConfigError, match=f"{name}=0: expected at least 1"):
        load_images(open_source(image_folder), GEOMETRY, **{name: 0})


def test_limit_and_sample_exclude_each_other(image_folder):
    with pytest.raises(ConfigError, match="limit=1 and sample=2: give one of them"):
        load_images(open_source(image_folder), GEOMETRY, limit=1, sample=2)


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").touch()
    message = "none of the 1 images of .* can be read; the first is 'a.png': the file is empty"
    for store in (None, tmp_path / "store"):
        with pytest.raises(NothingToScanError, match=message):
            load_images(open_source(tmp_path), GEOMETRY, store=store)
    assert list((tmp_path / "store").iterdir()) == []


def test_too_large_for_memory_says_what_to_do(image_folder, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(load.np, "empty", fail)
    with pytest.raises(
        DataError, match=r"6 images of 8 pixels need 0.0 GiB of memory; keep them in a store on disk"
    ):
        load_images(open_source(image_folder), GEOMETRY)


def test_an_error_inside_a_thread_is_not_swallowed(image_folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(load, "decode_image", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        load_images(open_source(image_folder), GEOMETRY)


# Store


def same(a: ImageSet, b: ImageSet) -> bool:
    return (a.ids, a.skipped, a.fingerprint) == (b.ids, b.skipped, b.fingerprint) and torch.equal(
        a.pixels, b.pixels
    )


@pytest.fixture
def no_decoding(monkeypatch):
    def forbid():
        monkeypatch.setattr(load, "decode_image", lambda *_, **__: pytest.fail("decoded again"))

    return forbid


def test_a_complete_store_is_opened_not_decoded(bad_folder, tmp_path, no_decoding):
    store = tmp_path / "store"
    memory = load_images(open_source(bad_folder), GEOMETRY)
    written = load_images(open_source(bad_folder), GEOMETRY, store=store)
    assert sorted(path.name for path in store.iterdir()) == ["images.json", "pixels.u8"]
    assert json.loads((store / "images.json").read_text())["request"]["geometry"]["size"] == 8
    no_decoding()
    opened = load_images(open_source(bad_folder), GEOMETRY, store=store)
    assert same(written, memory)
    assert same(opened, memory)
    assert opened.pixels.is_contiguous(memory_format=torch.channels_last)


def test_writing_into_an_opened_store_changes_no_file(image_folder, tmp_path):
    first = load_images(open_source(image_folder), GEOMETRY, store=tmp_path / "store")
    before = (tmp_path / "store/pixels.u8").read_bytes()
    first.pixels.zero_()
    assert (tmp_path / "store/pixels.u8").read_bytes() == before


@pytest.mark.parametrize(
    "damage", ["truncated", "no pixels", "no index", "broken index", "foreign index", "left over"]
)
def test_a_damaged_store_is_redone(damage, image_folder, tmp_path):
    store = tmp_path / "store"
    expected = load_images(open_source(image_folder), GEOMETRY, store=store)
    pixels, index = store / "pixels.u8", store / "images.json"
    if damage == "truncated":
        content = pixels.read_bytes()
        pixels.unlink()  # the old file stays mapped by `expected`
        pixels.write_bytes(content[:-1])
    elif damage == "no pixels":
        pixels.unlink()
    elif damage == "no index":
        index.unlink()
    elif damage == "broken index":
        index.write_text(index.read_text()[:50])
    elif damage == "foreign index":
        index.write_text("[1, 2]")
    else:
        index.unlink()
        (store / "pixels.u8.partial-1").write_bytes(b"half")
    assert same(load_images(open_source(image_folder), GEOMETRY, store=store), expected)
    assert index.exists() and not list(store.glob("*.partial-*"))


def test_an_interrupted_store_is_redone(image_folder, tmp_path, monkeypatch):
    store = tmp_path / "store"

    def stop(stage, done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(open_source(image_folder), GEOMETRY, store=store, progress=stop)
    assert list(store.iterdir()) == []
    expected = load_images(open_source(image_folder), GEOMETRY)
    assert same(load_images(open_source(image_folder), GEOMETRY, store=store), expected)


def test_another_request_is_not_answered_from_the_store(image_folder, tmp_path, picture):
    store = tmp_path / "store"
    load_images(open_source(image_folder), GEOMETRY, store=store)
    assert load_images(open_source(image_folder), Geometry(4, 4), store=store).size == 4
    assert len(load_images(open_source(image_folder), Geometry(4, 4), store=store, limit=2)) == 2
    load_images(open_source(image_folder), GEOMETRY, store=store)
    picture(77, 30, 30).save(image_folder / "cat/0.png")
    fresh = load_images(open_source(image_folder), GEOMETRY)
    assert same(load_images(open_source(image_folder), GEOMETRY, store=store), fresh)


# as_image_set


def test_paths_sources_and_sequences_give_the_same_pixels(image_folder):
    expected = load_images(open_source(image_folder), GEOMETRY)
    files = [image_folder / id for id in expected.ids]
    for images in (
        image_folder,
        str(image_folder),
        open_source(image_folder),
        files,
        [str(file) for file in files],
    ):
        got = as_image_set(images, GEOMETRY)
        assert got.ids == expected.ids
        assert torch.equal(got.pixels, expected.pixels)


def test_options_reach_the_source_and_the_loader(image_folder, tmp_path):
    (tmp_path / "list.txt").write_text("cat/0.png\ndog/0.png\n")
    images = as_image_set(
        tmp_path / "list.txt", GEOMETRY, root=image_folder, limit=1, store=tmp_path / "store"
    )
    assert images.ids == ("cat/0.png",)
    assert (tmp_path / "store/images.json").exists()


@given(st.integers(1, 12))
def test_a_tensor_of_the_right_size_is_taken_as_it_is(count):
    pixels = torch.randint(
        0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )
    before = pixels.clone()
    images = as_image_set(pixels, GEOMETRY)
    assert torch.equal(images.pixels, before)
    assert torch.equal(as_image_set(pixels.float() / 255, GEOMETRY).pixels, before)
    assert images.ids == tuple(sorted(images.ids))
    assert [int(id) for id in images.ids] == list(range(count))
    assert len(images.fingerprint) == 64


def test_other_sizes_are_resized_like_files(image_folder):
    large = load_images(open_source(image_folder), Geometry(16, 16))
    small = as_image_set(large, GEOMETRY)
    assert small.ids == large.ids
    assert small.fingerprint == large.fingerprint
    expected = to_square(Image.fromarray(large.pixels[4].permute(1, 2, 0).contiguous().numpy()), GEOMETRY)
    assert np.array_equal(small.pixels[4].permute(1, 2, 0).numpy(), expected)
    assert as_image_set(large, Geometry(16, 16)) is large
    assert as_image_set(large, GEOMETRY, limit=2).ids == large.ids[:2]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 8, 8, 3), r"images must be \(N, 3, H, W\), got \(2, 8, 8, 3\)"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (torch.full((1, 3, 8, 8), 1.5), r"must lie in \[0, 1\], got 1.5 to 1.5; the encoder normalises them"),
        (torch.full((1, 3, 8, 8), -0.5), r"got -0.5 to -0.5"),
        (torch.full((1, 3, 8, 8), float("nan")), r"got nan to nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "must be uint8 or floating in .0, 1., got torch.int64"),
    ],
)
def test_tensors_of_the_wrong_kind(tensor, message):
    with pytest.raises(ShapeError, match=message):
        as_image_set(tensor, GEOMETRY)


def test_an_empty_tensor():
    with pytest.raises(NothingToScanError, match="a tensor of 0 images"):
        as_image_set(torch.zeros(0, 3, 8, 8), GEOMETRY)


def test_real_parquet_streams(shared_data):
    source = open_source(shared_data / "cifar10/test-00000-of-00001.parquet")
    images = load_images(source, Geometry(32, 32), sample=50, seed=3)
    assert len(images) == 50
    assert images.skipped == ()
    assert dataclasses.asdict(Geometry(32, 32))["size"] == images.size
