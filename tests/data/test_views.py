"""Random views: ranges, seeds, one set of parameters per image, colours against a slow twin."""

from __future__ import annotations

import colorsys
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unpoison.data import views
from unpoison.data.views import ViewConfig, random_views, recolour
from unpoison.errors import ConfigError

STILL = ViewConfig(crop=1.0, flip=False, jitter=(0, 0, 0, 0))
STRONG = ViewConfig(crop=0.2, jitter=(0.4, 0.4, 0.4, 0.1), grey_probability=0.2, blur_probability=0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 16, size: int = 16, seed: int = 0) -> Tensor:
    coarse = torch.rand(n, 3, 4, 4, generator=generator(seed))
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return smooth.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_views_stay_in_range_and_leave_the_images_alone(dtype: torch.dtype) -> None:
    images = pictures() if dtype == torch.float32 else (pictures() * 255).to(torch.uint8)
    before = images.clone()
    seen = random_views(images, STRONG, generator=generator())
    assert seen.shape == images.shape and seen.dtype == torch.float32
    assert seen.min() >= 0 and seen.max() <= 1
    assert torch.equal(images, before)
    still = random_views(images, STILL, generator=generator())
    still.zero_()
    assert torch.equal(images, before)  # not even through a view that shares memory


def test_bytes_and_floats_give_the_same_views() -> None:
    images = (pictures() * 255).to(torch.uint8)
    from_bytes = random_views(images, STRONG, generator=generator(3))
    assert torch.equal(from_bytes, random_views(images.float() / 255, STRONG, generator=generator(3)))


def test_the_same_generator_gives_the_same_views_and_the_global_one_is_untouched() -> None:
    images, state = pictures(), torch.get_rng_state()
    first = random_views(images, STRONG, generator=generator(1))
    assert torch.equal(first, random_views(images, STRONG, generator=generator(1)))
    assert not torch.equal(first, random_views(images, STRONG, generator=generator(2)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "config",
    [
        ViewConfig(crop=0.2, flip=False, jitter=(0, 0, 0, 0)),
        ViewConfig(crop=1.0, jitter=(0.4, 0, 0, 0), jitter_probability=1.0),
        ViewConfig(crop=1.0, jitter=(0, 0, 0, 0.1), jitter_probability=1.0),
        ViewConfig(crop=1.0, flip=False, jitter=(0, 0, 0, 0), blur_probability=1.0),
    ],
)
def test_every_image_of_a_batch_gets_its_own_view(config: ViewConfig) -> None:
    one = pictures(1, 48).expand(24, 3, 48, 48).contiguous()
    seen = random_views(one, config, generator=generator())
    assert len({tuple(view.flatten().tolist()) for view in seen}) >= 20


def test_no_augmentation_is_the_image_itself_up_to_the_aspect_ratio() -> None:
    # A whole-area crop with another aspect ratio is cut to the picture, so at most one side shrinks.
    images = pictures(64)
    seen = random_views(images, STILL, generator=generator())
    assert (seen - images).abs().mean() < 0.06
    flat = torch.full((4, 3, 16, 16), 0.3)
    torch.testing.assert_close(random_views(flat, STILL, generator=generator()), flat)


def test_solarisation_inverts_the_bright_half_of_as_many_images_as_asked_for() -> None:
    ramp = torch.linspace(0, 1, 16).expand(400, 3, 16, 16).contiguous()
    still = replace(STILL, solarise_probability=0.5)
    seen = recolour(ramp, still, generator=generator())
    inverted = torch.where(ramp * 255 >= 128, 1 - ramp, ramp)
    changed = (seen != ramp).flatten(1).any(dim=1)
    torch.testing.assert_close(seen[changed], inverted[changed])
    assert 0.4 < changed.float().mean() < 0.6
    assert torch.equal(recolour(ramp, STILL, generator=generator()), ramp)


def test_half_of_the_images_are_mirrored() -> None:
    ramp = torch.linspace(0, 1, 16).expand(400, 3, 16, 16).contiguous()
    seen = random_views(ramp, ViewConfig(crop=1.0, jitter=(0, 0, 0, 0)), generator=generator())
    mirrored = (seen[:, 0, 0, 0] > seen[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6
    never = random_views(ramp, STILL, generator=generator())
    assert (never[:, 0, 0, 0] < never[:, 0, 0, -1]).all()


def test_crops_keep_the_share_of_the_area_that_was_asked_for() -> None:
    # On a ramp along x (and y), the range of values that a view shows is the width (height) of its crop.
    ramp = torch.linspace(0, 1, 64)
    images = torch.stack((ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)))
    seen = random_views(
        images.expand(300, 3, 64, 64).contiguous(),
        ViewConfig(crop=0.3, flip=False, jitter=(0, 0, 0, 0)),
        generator=generator(),
    )
    width = seen[:, 0].amax(dim=(1, 2)) - seen[:, 0].amin(dim=(1, 2))
    height = seen[:, 1].amax(dim=(1, 2)) - seen[:, 1].amin(dim=(1, 2))
    area = width * height
    assert area.min() > 0.25 and area.max() <= 1.01 and 0.5 < area.mean() < 0.75
    middle = seen[:, 0].mean(dim=(1, 2))
    assert middle.min() < 0.35 and middle.max() > 0.65  # crops reach both sides


def naive_jitter(
    image: Tensor, brightness: float, contrast: float, saturation: float, angle: float
) -> Tensor:
    """Pixel by pixel, one operation after the other, as torchvision's ColorJitter does them, hue in YIQ."""

    def grey(pixel: list[float]) -> float:
        return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]

    rows = image.permute(1, 2, 0).reshape(-1, 3).double().tolist()
    rows = [[brightness * v for v in pixel] for pixel in rows]
    mean = sum(map(grey, rows)) / len(rows)
    rows = [[contrast * v + (1 - contrast) * mean for v in pixel] for pixel in rows]
    rows = [[saturation * v + (1 - saturation) * grey(pixel) for v in pixel] for pixel in rows]
    to_yiq = [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
    back = torch.linalg.inv(torch.tensor(to_yiq, dtype=torch.float64)).tolist()
    turned = []
    for pixel in rows:
        y, i, q = (sum(w * v for w, v in zip(row, pixel, strict=True)) for row in to_yiq)
        i, q = i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle)
        turned.append([sum(w * v for w, v in zip(row, (y, i, q), strict=True)) for row in back])
    result = torch.tensor(turned).reshape(*image.shape[1:], 3).permute(2, 0, 1)
    return result.clamp(0, 1).float()


def test_colours_agree_with_their_twin() -> None:
    config = ViewConfig(crop=1.0, flip=False, jitter=(0.4, 0.3, 0.4, 0.1), jitter_probability=1.0)
    images = pictures(6, 8)
    drawn = generator(5)
    uncoloured = views._crop_and_flip(images, config, drawn)
    # The same numbers again, in the order in which the module draws them.
    b, c, s, turn = (torch.rand(6, generator=drawn) * 2 * v + 1 - v for v in config.jitter)
    angle = (turn - 1) * 2 * math.pi
    seen = random_views(images, config, generator=generator(5))
    for i in range(6):
        expected = naive_jitter(uncoloured[i], float(b[i]), float(c[i]), float(s[i]), float(angle[i]))
        torch.testing.assert_close(seen[i], expected, rtol=0, atol=2e-5)


def test_a_hue_turn_moves_colours_around_the_circle() -> None:
    red = torch.tensor([0.8, 0.2, 0.2]).view(1, 3, 1, 1).expand(50, 3, 8, 8).contiguous()
    config = ViewConfig(crop=1.0, flip=False, jitter=(0, 0, 0, 0.1), jitter_probability=1.0)
    seen = random_views(red, config, generator=generator())[:, :, 0, 0].tolist()
    hues = [(colorsys.rgb_to_hsv(*colour)[0] + 0.5) % 1 - 0.5 for colour in seen]
    assert min(hues) < -0.04 and max(hues) > 0.04 and max(map(abs, hues)) < 0.2


def test_grey_pictures_have_three_equal_channels() -> None:
    config = ViewConfig(grey_probability=1.0)
    seen = random_views(pictures(), config, generator=generator())
    torch.testing.assert_close(seen[:, 0], seen[:, 1])
    torch.testing.assert_close(seen[:, 0], seen[:, 2])
    some = random_views(pictures(400, 8), ViewConfig(grey_probability=0.3), generator=generator())
    share = ((some[:, 0] - some[:, 1]).abs().amax(dim=(1, 2)) < 1e-4).float().mean()
    assert 0.2 < share < 0.4


def test_jitter_happens_as_often_as_asked() -> None:
    flat = torch.full((400, 3, 4, 4), 0.5)
    config = ViewConfig(jitter=(0.4, 0, 0, 0), jitter_probability=0.25)
    changed = (random_views(flat, config, generator=generator())[:, 0, 0, 0] - 0.5).abs() > 1e-6
    assert 0.18 < changed.float().mean() < 0.32


def test_blur_agrees_with_its_twin_and_keeps_flat_pictures() -> None:
    config = ViewConfig(crop=1.0, flip=False, jitter=(0, 0, 0, 0), blur_probability=1.0)
    flat = torch.full((3, 3, 32, 32), 0.25)
    torch.testing.assert_close(random_views(flat, config, generator=generator()), flat)
    images = torch.rand(2, 3, 24, 24, generator=generator(1))
    drawn = generator(9)
    seen = views._blur(images, 1.0, generator(9))
    torch.rand(2, generator=drawn)
    sigmas = (torch.rand(2, generator=drawn) * 1.9 + 0.1) * 24 / 224
    for i in range(2):
        weights = [math.exp(-0.5 * (k / float(sigmas[i])) ** 2) for k in (-1, 0, 1)]
        for y, x in ((0, 0), (5, 7), (23, 23), (0, 12)):
            total = 0.0
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    row, column = (min(abs(v), 46 - abs(v)) for v in (y + dy, x + dx))  # reflected
                    total += weights[dy + 1] * weights[dx + 1] * float(images[i, 0, row, column])
            assert abs(float(seen[i, 0, y, x]) - total / sum(weights) ** 2) < 1e-5


def test_settings_out_of_range_are_refused() -> None:
    for crop in (0.0, 1.5):
        with pytest.raises(ConfigError, match=rf"crop={crop}: expected a share of the area in \(0, 1\]"):
            ViewConfig(crop=crop)
    for jitter in ((-0.1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 0, 0.6)):
        with pytest.raises(
            ConfigError, match=r"expected three strengths in \[0, 1\] and a hue in \[0, 0.5\]"
        ):
            ViewConfig(jitter=jitter)
    for name in ("jitter_probability", "grey_probability", "blur_probability", "solarise_probability"):
        with pytest.raises(ConfigError, match=rf"{name}=1.1: expected a probability in \[0, 1\]"):
            ViewConfig(**{name: 1.1})


def test_the_two_halves_are_the_whole() -> None:
    images = (pictures() * 255).to(torch.uint8)
    drawn = generator(4)
    halfway = views.crop_and_flip(images, STRONG, generator=drawn)
    before = halfway.clone()
    coloured = views.recolour(halfway, STRONG, generator=drawn)
    assert torch.equal(coloured, random_views(images, STRONG, generator=generator(4)))
    assert torch.equal(halfway, before)
