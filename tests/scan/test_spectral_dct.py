"""The spectral screen: one number per image, from what is usual for each coefficient."""

from __future__ import annotations

import pytest
import torch

from toys import planted_images
from unpoison.errors import ConfigError, ShapeError
from unpoison.functional.frequency import block_dct, to_yuv
from unpoison.functional.global_triggers import apply_global
from unpoison.scan.spectral_dct import SpectralDctConfig, fit_spectral_dct

NOTHING = torch.zeros(3, 1, 1, dtype=torch.uint8)


def images(count: int = 100) -> torch.Tensor:
    return planted_images(count, 0, torch.Generator().manual_seed(0))[0].pixels


def test_the_score_is_the_formula() -> None:
    pixels = images(30)
    detector = fit_spectral_dct(pixels)
    logs = torch.stack(
        [
            (block_dct(to_yuv(image.double())[1:], 32).abs().mean(dim=(1, 2)) + 1).log().flatten()
            for image in pixels
        ]
    )
    usual = logs.sort(dim=0).values[14]
    spread = (logs - usual).abs().sort(dim=0).values[14]
    values = (logs - usual) / (spread + 0.05)
    expected = values.max(dim=1).values - values.sort(dim=1).values[:, 1023]
    assert torch.allclose(detector.score(pixels).double(), expected, rtol=1e-3)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("share", [0.01, 0.2])
def test_waves_stand_out_at_any_share_and_size(side: int, share: float) -> None:
    pixels = images().repeat_interleave(side // 32, dim=2).repeat_interleave(side // 32, dim=3)
    count = int(share * 100)
    pixels[:count] = apply_global(pixels[:count], "ctrl", 100.0, NOTHING)
    scores = fit_spectral_dct(pixels).score(pixels)
    assert scores[:count].min() > scores[count:].max()


def test_complaints() -> None:
    with pytest.raises(ConfigError, match="block=3: expected blocks of 4 to 512 pixels"):
        SpectralDctConfig(block=3)
    with pytest.raises(ConfigError, match="floor=0: expected a positive number"):
        SpectralDctConfig(floor=0)
    with pytest.raises(ShapeError, match="a block of 32 pixels does not fit in 16×16"):
        fit_spectral_dct(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
