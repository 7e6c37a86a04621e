import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fakes import fake_result
from unpoison.errors import ShapeError
from unpoison.records import Box
from unpoison.report.pictures import (
    Picture,
    as_pixels,
    colour_map,
    data_uri,
    enlarge,
    outline,
    overlay,
    trigger_sheet,
    write_trigger_sheets,
)


def test_enlarging_repeats_pixels_until_the_side_is_reached():
    small = np.random.default_rng(0).integers(0, 256, (32, 20, 3), dtype=np.uint8)
    large = enlarge(small, 96)
    assert (large.scale, large.pixels.shape) == (3, (96, 60, 3))
    assert np.array_equal(large.pixels[1::3, 1::3], small)
    assert enlarge(np.zeros((224, 224, 3), np.uint8), 96).scale == 1


@pytest.mark.parametrize("box", [Box(4, 5, 8, 9), Box(0, 0, 8, 8), Box(24, 24, 8, 8), Box(0, 0, 32, 32)])
def test_a_frame_surrounds_its_box_and_leaves_the_inside_and_the_argument_alone(box):
    grey = Picture(np.full((96, 96, 3), 128, np.uint8), 3)
    framed = outline(grey, box).pixels
    assert (grey.pixels == 128).all()
    assert (framed == 255).all(axis=2).any() and (framed == [20, 20, 30]).all(axis=2).any()
    inside = framed[3 * box.y + 4 : 3 * (box.y + box.h) - 4, 3 * box.x + 4 : 3 * (box.x + box.w) - 4]
    assert (inside == 128).all()


def test_the_colour_map_grows_lighter_all_the_way():
    colours = colour_map().astype(float) @ [0.2126, 0.7152, 0.0722]
    assert colours[0] < 40 and colours[-1] > 220
    assert (np.diff(colours) > -0.51).all()  # half a grey level is rounding


def test_attention_colours_its_picture():
    pixels = np.zeros((4, 4, 3), np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2], heat[3, 3], heat[0, 0] = 1.0, np.nan, 7.0
    mixed = overlay(pixels, heat, strength=1.0)
    assert np.array_equal(mixed[1, 2], colour_map()[255]) and np.array_equal(mixed[0, 0], colour_map()[255])
    assert np.array_equal(mixed[3, 3], colour_map()[0]) and (pixels == 0).all()
    with pytest.raises(ShapeError, match=r"attention must be \(4, 4\) like its picture, got \(2, 2\)"):
        overlay(pixels, heat[:2, :2])


def test_a_sheet_shows_every_patch_in_its_order():
    patches = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8) * 40
    sheet = trigger_sheet(patches, columns=3, side=16)
    assert sheet.scale == 2 and sheet.pixels.shape == (2 * 20 + 4, 3 * 20 + 4, 3)
    assert [int(sheet.pixels[4 + 20 * (i // 3), 4 + 20 * (i % 3), 0]) for i in range(5)] == [
        0,
        40,
        80,
        120,
        160,
    ]
    assert trigger_sheet(patches, most=2, columns=9, side=8).pixels.shape == (16, 28, 3)


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(ShapeError, match="patches must be .* at least 1"):
        trigger_sheet(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(
        ShapeError, match=r"a picture must be \(3, H, W\) uint8, got \(3, 8, 8\) torch.float32"
    ):
        as_pixels(torch.zeros(3, 8, 8))


def test_a_data_uri_holds_the_very_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    kind, text = data_uri(pixels).split(",")
    assert kind in ("data:image/webp;base64", "data:image/png;base64")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))), pixels)


def test_trigger_sheets_are_written_by_number(tmp_path):
    triggers = fake_result().triggers
    assert write_trigger_sheets(triggers, tmp_path) == ("triggers/trigger-1.png",)
    with Image.open(tmp_path / "triggers/trigger-1.png") as image:
        assert image.size[0] >= 96
