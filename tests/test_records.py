"""The nouns: boxes, geometry and sets of images."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unpoison.data.decode import to_square
from unpoison.errors import ShapeError
from unpoison.records import Box, Evidence, Geometry, ImageSet, ScanResult

BOXES = st.builds(Box, st.integers(0, 9), st.integers(0, 9), st.integers(0, 6), st.integers(0, 6))


@given(BOXES, BOXES)
def test_intersection_counts_shared_pixels(a: Box, b: Box) -> None:
    def pixels(box: Box) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box.x, box.x + box.w) for y in range(box.y, box.y + box.h)}

    assert a.intersection(b) == b.intersection(a) == len(pixels(a) & pixels(b))
    assert a.area == len(pixels(a)) == a.intersection(a)


@pytest.mark.parametrize(
    "geometry", [Geometry(32, 32), Geometry(32, 36, "bicubic"), Geometry(64, 64), Geometry(56, 64)]
)
@pytest.mark.parametrize(("width", "height"), [(32, 32), (96, 96), (80, 48), (48, 100), (33, 47), (500, 375)])
def test_a_placed_box_is_where_pillow_puts_the_pixels(geometry: Geometry, width: int, height: int) -> None:
    generator = np.random.default_rng(width + height)
    for _ in range(5):
        w, h = (
            generator.integers(width // 6 + 1, width // 2),
            generator.integers(height // 6 + 1, height // 2),
        )
        x, y = generator.integers(0, width - w + 1), generator.integers(0, height - h + 1)
        drawn = np.zeros((height, width, 3), dtype=np.uint8)
        drawn[y : y + h, x : x + w] = 255
        seen = to_square(Image.fromarray(drawn), geometry)[:, :, 0] > 127
        placed = geometry.place(Box(int(x), int(y), int(w), int(h)), width, height)
        assert 0 <= placed.x <= placed.x + placed.w <= geometry.size
        assert 0 <= placed.y <= placed.y + placed.h <= geometry.size
        # Edges may fall between pixels: each may be off by one.
        for start, length, axis in ((placed.x, placed.w, 0), (placed.y, placed.h, 1)):
            lit = np.flatnonzero(seen.any(axis=axis))
            if len(lit) == 0:
                assert length <= 1 or placed.area <= geometry.size
            elif placed.area:
                assert abs(start - lit[0]) <= 1 and abs(start + length - lit[-1] - 1) <= 1


def test_a_box_outside_the_crop_is_empty() -> None:
    assert Geometry(32, 32).place(Box(0, 0, 20, 100), 300, 100).area == 0


def image_set(n: int = 3) -> ImageSet:
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous()
    return ImageSet(tuple("abc"[:n]), pixels, fingerprint="f")


def test_an_image_set_knows_its_size_and_gives_rows_in_the_order_asked_for() -> None:
    images = image_set()
    assert (len(images), images.size) == (3, 4)
    chosen = images.select([2, 0])
    assert chosen.ids == ("c", "a") and chosen.pixels[:, 0, 0, 0].tolist() == [2, 0]
    assert chosen.fingerprint == "f" and chosen.pixels.is_contiguous(memory_format=torch.channels_last)
    assert len(images.select([])) == 0


def test_an_image_set_refuses_wrong_pixels() -> None:
    with pytest.raises(ShapeError, match=r"must be \(N, 3, H, W\) uint8, got \(1, 4, 4, 3\) torch.uint8"):
        ImageSet(("a",), torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=r"got \(1, 3, 4, 4\) torch.float32"):
        ImageSet(("a",), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ShapeError, match="2 ids for 1 images"):
        ImageSet(("a", "b"), torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_a_result_names_its_flagged_images() -> None:
    findings = pd.DataFrame({"id": ["a", "b", "c"], "flagged": [False, True, True]})
    evidence = Evidence((), torch.empty(0, 3, 4, 4, dtype=torch.uint8), torch.empty(0, 4, 4))
    result = ScanResult("poisoned", findings, (), evidence, {})
    assert result.flagged == ("b", "c")
    assert result.to_pandas().loc["b", "flagged"]
