"""Fixtures that every test may use; the data sets of UNPOISON_DATA are optional."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# The same examples on every run, and no failure because a shared machine was slow for a moment.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("UNPOISON_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set UNPOISON_DATA")
    return folder.resolve()


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """picture(seed, width, height): a smooth, colourful RGB image that differs for every seed."""

    def make(seed: int = 0, width: int = 24, height: int = 16) -> Image.Image:
        corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)

    return make


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(image, format="PNG", **options): the bytes of an image file."""

    def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def png_header() -> Callable[[int, int], bytes]:
    """png_header(width, height): a PNG that declares any size in a few bytes, with almost no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    def make(width: int, height: int) -> bytes:
        header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])  # 1 bit, grey
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body

    return make


@pytest.fixture
def image_folder(tmp_path: Path, picture: Callable[..., Image.Image]) -> Path:
    """Two class folders, three images each: images/{cat,dog}/{0,1,2}.png."""
    folder = tmp_path / "images"
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            picture(10 * number + index).save(folder / name / f"{index}.png")
    return folder
