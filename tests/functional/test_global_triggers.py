"""Triggers that cover the image do what their papers say."""

from __future__ import annotations

import math

import pytest
import torch

from unpoison.errors import ConfigError, ShapeError
from unpoison.functional.frequency import block_dct, to_yuv
from unpoison.functional.global_triggers import CTRL_COEFFICIENTS, apply_global, global_change

NOTHING = torch.zeros(3, 1, 1, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (70, 40)])
def test_ctrl_is_two_coefficients_of_u_and_v_in_every_block(height: int, width: int) -> None:
    kept, added = global_change("ctrl", 100.0, NOTHING, height, width)
    assert kept == 1
    spectrum = block_dct(to_yuv(added), 32)
    expected = torch.zeros_like(spectrum)
    for row, column in CTRL_COEFFICIENTS:
        expected[1:, :, :, row, column] = 100
    assert torch.allclose(spectrum, expected, atol=1e-9)
    assert not added[:, height // 32 * 32 :].any() and not added[:, :, width // 32 * 32 :].any()


def test_ctrl_is_as_faint_as_measured() -> None:
    _, added = global_change("ctrl", 100.0, NOTHING, 32, 32)
    chroma = to_yuv(added)[1:]
    assert chroma.square().mean().sqrt() == pytest.approx(4.4, abs=0.05)
    assert [round(v) for v in added.square().mean((1, 2)).sqrt().tolist()] == [5, 4, 9]
    assert [math.ceil(v) for v in added.abs().amax((1, 2)).tolist()] == pytest.approx([12, 10, 22], abs=3)


def test_sig_waves_six_times_across_and_not_at_all_down() -> None:
    kept, added = global_change("sig", 20.0, NOTHING, 24, 48)
    assert kept == 1 and bool((added == added[0, 0]).all())
    assert added.abs().max() == pytest.approx(20)
    for column in range(48):
        assert added[0, 0, column] == pytest.approx(20 * math.sin(2 * math.pi * 6 * column / 48), abs=1e-9)


def test_blending_mixes_the_stretched_picture() -> None:
    pattern = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1)
    images = torch.full((2, 3, 5, 7), 50, dtype=torch.uint8)
    mixed = apply_global(images, "blended", 0.2, pattern)
    assert mixed.unique(dim=0).shape[0] == 1
    assert mixed[0, :, 0, 0].tolist() == [40, 60, 80]


def test_images_are_clipped_and_not_changed_in_place() -> None:
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    changed = apply_global(images, "sig", 100.0, NOTHING)
    assert not images.any() and int(changed.max()) == 100 and int(changed.min()) == 0


def test_complaints() -> None:
    with pytest.raises(ConfigError, match="trigger kind 'warp': expected one of ctrl, blended, sig"):
        global_change("warp", 1.0, NOTHING, 8, 8)
    with pytest.raises(ConfigError, match="images of 40×31 pixels: CTRL needs at least 32 on each side"):
        global_change("ctrl", 1.0, NOTHING, 31, 40)
    with pytest.raises(ShapeError, match=r"images must be \(N, 3, H, W\) uint8"):
        apply_global(torch.zeros(1, 3, 8, 8), "sig", 1.0, NOTHING)
