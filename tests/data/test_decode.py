from __future__ import annotations

import io
import struct
import threading
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from unpoison.data import decode
from unpoison.data.decode import decode_image, quiet_pillow, to_square
from unpoison.errors import ConfigError, DataError
from unpoison.records import Box, Geometry


def pixels_of(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP", "JPEG"])
def test_every_format_is_read(format, picture, encoded):
    options = {"lossless": True} if format == "WEBP" else {}
    image = (
        picture(1) if format == "JPEG" else picture(1).quantize(16).convert("RGB")
    )  # GIF keeps few colours
    got = pixels_of(encoded(image, format, **options)).astype(int)
    assert np.abs(got - np.asarray(image)).mean() <= (6 if format == "JPEG" else 0)


def test_the_first_of_several_pictures_is_read(picture, encoded):
    for format, options in (("GIF", {}), ("TIFF", {}), ("MPO", {"quality": 95})):
        data = encoded(
            Image.new("RGB", (8, 8), "red"), format, save_all=True, append_images=[picture(2)], **options
        )
        assert np.abs(pixels_of(data).astype(int) - [255, 0, 0]).max() <= 2, format


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_other_modes_look_as_they_do_to_torchvisions_loader(mode, picture, encoded):
    image = picture(3).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encoded(image.convert(mode))
    with quiet_pillow(), Image.open(io.BytesIO(data)) as loaded:
        expected = np.asarray(loaded.convert("RGB"))
    assert np.array_equal(pixels_of(data), expected)


def test_transparent_pixels_keep_their_colour(encoded):
    assert pixels_of(encoded(Image.new("RGBA", (2, 2), (9, 200, 30, 0)))).tolist() == [[[9, 200, 30]] * 2] * 2


def test_palette_with_transparency_in_bytes_gives_no_warning(picture, encoded):
    data = encoded(picture(4).quantize(8), transparency=bytes([0, 128, 255]))
    assert decode_image(data).size == (24, 16)  # warnings are errors in this suite


def test_cmyk(encoded):
    red = pixels_of(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format, encoded):
    values = np.array([[0, 257, 40_000, 65_535]], dtype=np.uint16)
    assert pixels_of(encoded(Image.fromarray(values), format))[0, :, 0].tolist() == [0, 1, 156, 255]


def test_dark_16_bit_pgm_is_not_taken_for_an_8_bit_one():
    assert pixels_of(b"P5 2 1 65535 " + struct.pack(">2H", 200, 257 * 7))[0, :, 0].tolist() == [1, 7]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 257.0, 65535.0]], np.float32), [0, 1, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, np.nan, np.inf]], np.float32), [0, 0, 0]),
        (np.array([[0, 70_000, 140_000]], np.int32), [0, 128, 255]),
        (np.array([[-5, -5, -5]], np.int32), [0, 0, 0]),
    ],
)
def test_32_bit_grey_takes_the_range_of_its_values(values, expected, encoded):
    assert pixels_of(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation(orientation, format, picture, encoded):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(5), format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(pixels_of(data), np.asarray(expected))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9,
    ],
)
def test_broken_exif_is_ignored(exif, picture, encoded):
    assert decode_image(encoded(picture(6), "JPEG", exif=exif)).size == (24, 16)


def test_odd_orientation_is_ignored(picture, encoded):
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode_image(encoded(picture(6), "JPEG", exif=exif)).size == (24, 16)


def test_huge_png_is_refused_without_allocating_it(png_header):
    for side, pixels in ((8_001, "64,016,001"), (10_000, "100,000,000"), (20_000, "400,000,000")):
        tracemalloc.start()
        with pytest.raises(DataError, match=f"^declares {pixels} pixels, the limit is 64,000,000$"):
            decode_image(png_header(side, side))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.stop()


def test_limit_is_inclusive_and_settable(picture, encoded):
    data = encoded(picture(0, 10, 10))
    assert decode_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(DataError, match="declares 100 pixels, the limit is 99"):
        decode_image(data, max_pixels=99)


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}]
)
def test_webp_canvas_is_checked_before_the_reader_sees_it(options, picture, encoded, monkeypatch):
    data = encoded(picture(0, 20, 30), "WEBP", **options)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the file was opened"))
    with pytest.raises(DataError, match="declares 600 pixels, the limit is 599"):
        decode_image(data, max_pixels=599)


def test_too_many_bytes(monkeypatch, picture, encoded):
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 50)
    with pytest.raises(DataError, match=r"bytes, the limit for one file is 50"):
        decode_image(encoded(picture(0)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "^the file is empty$"),
        (b"this is a text file named .png", r"^not a picture in a format that is read \(JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "^not a picture"),
        (b"\x89PNG\r\n\x1a\n", "^(not a picture|cannot be decoded)"),
    ],
)
def test_what_is_no_picture_says_so(data, reason):
    with pytest.raises(DataError, match=reason):
        decode_image(data)


def test_formats_outside_the_list_are_refused(picture, encoded):
    with pytest.raises(DataError, match="not a picture in a format that is read"):
        decode_image(encoded(picture(0), "ICO", sizes=[(16, 16)]))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_truncated_files_are_refused_with_a_repeatable_reason(format, encoded):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    reasons = set()
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            decode_image(data[: len(data) * 3 // 4])
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


def test_reasons_hold_no_addresses_and_no_line_breaks():
    text = decode._short(OSError("cannot identify <_io.BytesIO object at 0x7f1234567890>\nat all"))
    assert text == "cannot identify the file at all"
    assert decode._short(KeyError()) == "KeyError"
    assert len(decode._short(ValueError("x" * 1000))) == 120


@given(st.data())
def test_damage_gives_a_picture_or_a_data_error(data):
    format = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]))
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(buffer, format)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(raw), max_pixels=10_000).mode == "RGB"
    except DataError as error:
        assert "\n" not in str(error)


def test_memory_error_is_a_reason(monkeypatch, picture, encoded):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decode, "_to_rgb", fail)
    with pytest.raises(DataError, match="not enough memory to decode it"):
        decode_image(encoded(picture(0)))


def test_pillow_warnings_are_silent_in_all_threads_and_filters_are_restored(png_header, picture, encoded):
    before = list(warnings.filters)
    bomb = png_header(9_500, 9_500)  # Pillow warns above 89 million pixels
    palette = encoded(picture(4).quantize(8), transparency=bytes([0, 128, 255]))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                decode_image(palette)
                with pytest.raises(DataError, match="90,250,000"):
                    decode_image(bomb)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before


def test_quiet_pillow_nests_and_hides_nothing_else():
    with quiet_pillow(), quiet_pillow(), pytest.warns(UserWarning, match="ours"):
        warnings.warn("ours", UserWarning, stacklevel=1)


# to_square


def slow_square(image: Image.Image, size: int, resize: int) -> np.ndarray:
    short = min(image.size)
    width, height = (round(side * (resize / short)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.integers(1, 32), margin=st.integers(0, 8))
def test_to_square_is_resize_then_centre_crop(width, height, size, margin):
    rng = np.random.default_rng(width * 61 + height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    square = to_square(image, Geometry(size, size + margin))
    assert square.shape == (size, size, 3)
    assert square.dtype == np.uint8
    assert square.flags.c_contiguous
    assert square.flags.writeable
    if max(width, height) <= 16 * min(width, height):
        assert np.array_equal(square, slow_square(image, size, size + margin))


def test_to_square_agrees_with_where_geometry_places_a_box():
    image = Image.new("RGB", (60, 40))
    image.paste((255, 255, 255), (30, 20, 42, 32))
    geometry = Geometry(24, 32)
    box = geometry.place(Box(30, 20, 12, 12), 60, 40)
    bright = np.argwhere(to_square(image, geometry)[..., 0] > 127)
    (top, left), (bottom, right) = bright.min(0), bright.max(0) + 1
    assert abs(np.array([left, top, right, bottom]) - [box.x, box.y, box.x + box.w, box.y + box.h]).max() <= 1


def test_one_pixel_becomes_a_flat_square():
    assert (to_square(Image.new("RGB", (1, 1), (7, 8, 9)), Geometry(32, 36)) == [7, 8, 9]).all()


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (3, 50_001)])
def test_extreme_shapes_stay_small(size):
    tracemalloc.start()
    square = to_square(Image.new("RGB", size, (1, 2, 3)), Geometry(224, 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (square == [1, 2, 3]).all()
    assert peak < 64 * 256 * 256 * 3


def test_extreme_shapes_show_their_middle():
    image = Image.new("RGB", (10_000, 10), "black")
    image.paste((255, 0, 0), (4_950, 0, 5_050, 10))
    assert (to_square(image, Geometry(8, 8)) == [255, 0, 0]).all()


def test_interpolations_differ_and_unknown_ones_are_refused(picture):
    image = picture(8, 50, 50)
    linear, cubic = (to_square(image, Geometry(20, 20, name)) for name in ("bilinear", "bicubic"))
    assert not np.array_equal(linear, cubic)
    with pytest.raises(ConfigError, match="interpolation 'magic': expected one of bilinear, bicubic"):
        to_square(image, Geometry(20, 20, "magic"))


@pytest.mark.parametrize(("size", "resize"), [(0, 4), (5, 4)])
def test_impossible_geometry_is_refused(size, resize, picture):
    with pytest.raises(ConfigError, match=f"size {size}, resize {resize}: expected 1 <= size <= resize"):
        to_square(picture(0), Geometry(size, resize))
