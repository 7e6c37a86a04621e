"""Bounded decoding: the bytes of one untrusted file in, an RGB picture or a one-line reason out.

A hostile file may announce a picture of gigabytes, stop half-way, or carry broken metadata. Formats are an allow-list,
the size that the header declares is checked before a pixel is decoded, and every failure becomes a DataError whose
text is the same from run to run. Alpha is dropped exactly as PIL's `convert("RGB")` drops it, because that is what
torchvision's image folder shows a training run; a trigger hidden under transparency is therefore seen here too.
"""

from __future__ import annotations

import contextlib
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from unpoison.errors import ConfigError, DataError
from unpoison.records import Geometry

__all__ = [
    "FORMATS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "decode_image",
    "quiet_pillow",
    "short_side",
    "to_square",
]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's names of the formats that are read (its JPEG reader takes MPO too); of several pictures, the first."""

MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 256 * 2**20

_LONGEST_ASPECT = 16  # beyond it the long side is cut to its middle first, so that no resized picture is huge
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one file to 8-bit RGB, upright.

    Args:
        data: the whole file, at most MAX_FILE_BYTES.
        max_pixels: width times height that the header may declare; compared before anything is decoded.

    Returns:
        An RGB picture, rotated as its EXIF orientation says (an EXIF block that cannot be read is ignored). 16-bit
        grey is scaled by 1/257 rather than clipped; 32-bit integers and floats by the range that their values have.

    Raises:
        DataError: no supported format, more than `max_pixels`, truncated, broken, or colours that have no RGB.
    """
    if not data:
        raise DataError("the file is empty")
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{len(data):,} bytes, the limit for one file is {MAX_FILE_BYTES:,}")
    with quiet_pillow():
        try:
            _check_webp_header(data, max_pixels)
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                _check_pixels(image.width * image.height, max_pixels)
                image.load()
                return _upright(_to_rgb(image), _orientation(image))
        except DataError:
            raise
        except UnidentifiedImageError:
            raise DataError(f"not a picture in a format that is read ({', '.join(FORMATS)})") from None
        except Image.DecompressionBombError as error:
            # Pillow's own limit comes first for the largest ones; its message holds the number of pixels.
            declared = re.search(r"\((\d+) pixels\)", str(error))
            raise DataError(_too_large(int(declared[1]) if declared else None, max_pixels)) from None
        except MemoryError:
            raise DataError("not enough memory to decode it") from None
        except Exception as error:  # hostile bytes may make a decoder raise anything
            raise DataError(f"cannot be decoded: {_short(error)}") from error


def short_side(data: bytes) -> int | None:
    """Short side in pixels that a file's header declares; None where it declares none. Decodes no pixel."""
    with quiet_pillow():
        try:
            _check_webp_header(data, MAX_PIXELS)
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                return min(image.size)
        except Exception:  # a hostile header can make the reader fail in any way; decoding will say why
            return None


def to_square(image: Image.Image, geometry: Geometry) -> NDArray[np.uint8]:
    """Resize the short side to `geometry.resize` (antialiased), then cut out the central `geometry.size` pixels.

    Returns:
        (S, S, 3) uint8, contiguous. A picture more than 16 times longer than wide is first cut to the middle part.

    Raises:
        ConfigError: an unknown interpolation, or a crop larger than the resized picture.
    """
    if geometry.interpolation not in _RESAMPLING:
        raise ConfigError(
            f"interpolation {geometry.interpolation!r}: expected one of {', '.join(_RESAMPLING)}"
        )
    if not 1 <= geometry.size <= geometry.resize:
        raise ConfigError(f"size {geometry.size}, resize {geometry.resize}: expected 1 <= size <= resize")
    image = _without_far_ends(image)
    scale = geometry.resize / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)  # as Geometry.place computes them
    if (width, height) != image.size:
        image = image.resize((width, height), _RESAMPLING[geometry.interpolation])
    left, top = (width - geometry.size) // 2, (height - geometry.size) // 2
    pixels = np.asarray(image)[top : top + geometry.size, left : left + geometry.size]
    return np.array(pixels, dtype=np.uint8, order="C")


# Pillow reports oddities in a file through `warnings`. Python's way to silence them swaps process-wide state and is
# not thread-safe, so all threads share one such block: the first to enter opens it, the last to leave closes it.
_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_block = warnings.catch_warnings()


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence warnings that Pillow itself issues; nests, and may be held by many threads at once."""
    global _quiet_depth, _quiet_block
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_block = warnings.catch_warnings()
            _quiet_block.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_block.__exit__(None, None, None)


def _check_pixels(pixels: int, max_pixels: int) -> None:
    if pixels > max_pixels:
        raise DataError(_too_large(pixels, max_pixels))


def _too_large(pixels: int | None, max_pixels: int) -> str:
    declared = "too many" if pixels is None else f"{pixels:,}"
    return f"declares {declared} pixels, the limit is {max_pixels:,}"


def _check_webp_header(data: bytes, max_pixels: int) -> None:
    """Compare the canvas that a WebP declares: Pillow's reader allocates it as soon as the file is opened."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return
    width = height = 0
    if data[12:16] == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif data[12:16] == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
    _check_pixels(width * height, max_pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy() if image.readonly else image
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 257)
    if image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        # A 16-bit PGM arrives as 32-bit integers; a dark one must not be taken for an 8-bit picture.
        return _grey(values / 257 if image.format == "PPM" and image.mode == "I" else _to_bytes_range(values))
    return image.convert("RGB")


def _grey(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")


def _to_bytes_range(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale to 0..255 from the smallest usual range that holds all values: [0, 1], 8 bits, 16 bits, or their own."""
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    fractions = high <= 1 and bool((values != np.rint(values)).any())
    return values * 255 if fractions else values if high <= 255 else values / 257


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 1 when there is none or the block is broken."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata must not cost us the picture
        return 1
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _without_far_ends(image: Image.Image) -> Image.Image:
    short, long = min(image.size), max(image.size)
    keep = _LONGEST_ASPECT * short
    if long <= keep:
        return image
    start = (long - keep) // 2
    if image.width == long:
        return image.crop((start, 0, start + keep, image.height))
    return image.crop((0, start, image.width, start + keep))


def _short(error: Exception) -> str:
    """An exception in at most 120 printable characters, without the memory addresses that change on every run."""
    text = (
        re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>|0x[0-9a-fA-F]{6,}", "the file", str(error))
        or type(error).__name__
    )
    return "".join(c if c.isprintable() else " " for c in text)[:120]
