"""The spectral screen: one number per image, from what is usual for each coefficient."""

from __future__ import annotations

import pytest
import torch

from toys import planted_images
from unpoison.errors import ConfigError, ShapeError
from unpoison.functional.frequency import block_dct, to_yuv
from unpoison.functional.global_triggers import apply_global
from unpoison.scan.spectral_dct import SpectralDctConfig, _one_sided, find_waves, fit_spectral_dct

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


# ── waves in a whole set ─────────────────────────────────────────────────────────────────────────────────────────────


def noisy(count: int, seed: int = 0) -> torch.Tensor:
    """Pictures of smooth colours and noise, as likely as their mirror images."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(
        torch.rand(count, 3, 5, 5, generator=generator), 32, mode="bilinear"
    )
    noise = 0.06 * torch.randn(count, 3, 32, 32, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def with_waves(images: torch.Tensor, magnitude: float = 100.0) -> torch.Tensor:
    return apply_global(images, "ctrl", magnitude, torch.zeros(3, 1, 1, dtype=torch.uint8))


def test_waves_are_found_where_they_were_added_and_so_are_their_carriers() -> None:
    images = noisy(300)
    images[:30] = with_waves(images[:30])
    said = find_waves(images, 0.001)
    assert said.p_value < 1e-4 and {(0, 15, 15), (1, 15, 15)} <= set(said.frequencies)
    assert said.flagged[:30].all() and int(said.flagged[30:].sum()) <= 3


def test_the_stated_rate_of_false_alarms_holds() -> None:
    """Corrected for all tests; a few alarms at 10 % among twenty sets would be no surprise, seven would."""
    p_values = [find_waves(noisy(100, seed), 0.1).p_value for seed in range(20)]
    assert sum(p <= 0.1 for p in p_values) <= 6 and all(0 < p <= 1 for p in p_values)


def test_the_sizes_of_coefficients_raise_no_alarm() -> None:
    """Waves of either sign: as strong, but as likely as their mirror image."""
    images = noisy(300)
    images[:60] = with_waves(images[:60])
    images[:30] = images[:30].flip(3)
    said = find_waves(images, 0.05)
    assert said.p_value == 1.0 and not said.flagged.any()


def test_copies_of_one_picture_count_once() -> None:
    images = noisy(300)
    images[:60] = with_waves(images[:1], 150.0)
    images[:60] = (images[:60].int() + torch.randint(0, 2, (60, 1, 1, 1))).clamp(0, 255).to(torch.uint8)
    assert find_waves(images, 0.05).p_value == 1.0


def test_copies_of_one_picture_hide_no_waves_and_are_not_flagged_for_them() -> None:
    images = noisy(900)
    images[:60] = with_waves(images[:60])
    generator = torch.Generator().manual_seed(1)
    wave = 60 * torch.cos(torch.arange(32) * torch.pi * 11 / 32 + 0.2)
    copied = (
        images[60].float() + torch.stack((wave, 0 * wave, -wave))[:, None] * wave.sign()[:, None]
    ).clamp(0, 255)
    images[700:] = copied + torch.randint(0, 3, (200, 3, 32, 32), generator=generator)
    said = find_waves(images, 0.001)
    assert said.p_value < 1e-4 and {(0, 15, 15), (1, 15, 15)} <= set(said.frequencies)
    assert len(said.frequencies) <= 4  # the four that CTRL uses
    assert said.flagged[:60].float().mean() > 0.9 and int(said.flagged[60:].sum()) <= 6


def test_few_images_say_nothing_and_small_ones_are_refused() -> None:
    said = find_waves(with_waves(noisy(31)), 0.5)
    assert said.p_value == 1.0 and said.flagged.shape == (31,) and said.frequencies == ()
    with pytest.raises(ShapeError, match="a block of 32 pixels does not fit"):
        find_waves(noisy(40)[:, :, :16, :16], 0.01)


def test_the_threshold_lets_few_innocent_values_pass() -> None:
    """Twin: every threshold in turn."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((torch.randn(400, generator=generator), 3 + torch.rand(60, generator=generator)))
    fine = [
        float(t)
        for t in values[values > 0]
        if (1 + int((values <= -t).sum())) / int((values >= t).sum()) <= 0.05
    ]
    assert _one_sided(values) == min(fine)
    assert _one_sided(torch.tensor([1.0, 2.0, -3.0])) == torch.inf
    assert _one_sided(torch.zeros(5)) == torch.inf
