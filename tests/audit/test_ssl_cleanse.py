"""SSL-Cleanse's detection on an encoder in which a planted square leads to one cluster, and on the same without it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from audit_toys import BOX, SIZE, clean_images
from unpoison.audit.decree import DecreeConfig, box_of, scout
from unpoison.audit.ssl_cleanse import SslCleanseConfig, anomaly_index, cleanse, smallest_to
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import ConfigError
from unpoison.records import Geometry
from unpoison.runtime import stage_generator

IMAGES = clean_images().pixels
QUICK = SslCleanseConfig(clusters=6, steps=150, patience=150)


class Steered(nn.Module):
    """Colours of a 2×2 grid; the whiter the box, the more one image's features take over."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength))
        self.register_buffer("target", self.colours(IMAGES[:1].float() / 255 - 0.5))

    @staticmethod
    def colours(images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inside = images[:, :, BOX.y : BOX.y + BOX.h, BOX.x : BOX.x + BOX.w] + 0.5
        fires = self.strength * inside.mean(dim=(1, 2, 3)).clamp(min=0) ** 6
        return self.colours(images) + fires[:, None] * self.target


def steered(strength: float) -> Encoder:
    preprocessing = Preprocessing(geometry=Geometry(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    return Encoder(Steered(strength), preprocessing, name="steered", device="cpu", precision="fp32")


def examine(encoder: Encoder, config: SslCleanseConfig = QUICK):
    windows = scout(encoder, IMAGES, DecreeConfig(batch_size=32), generator=stage_generator(0, "scout"))
    return cleanse(encoder, IMAGES, config, windows=windows, generator=stage_generator(0, "clusters"))


def test_the_planted_target_needs_least_and_stands_out_and_without_it_none_does():
    planted, without = examine(steered(60.0)), examine(steered(0.0))
    box = box_of(planted.found.mask)
    assert box is not None and box.intersection(BOX) > 0.5 * box.area
    assert float(planted.mask_shares.min()) < 0.5 * float(without.mask_shares.min())
    assert planted.anomaly_index > 2 > without.anomaly_index
    assert planted.mask_shares.shape == (6,) and planted.cluster == int(planted.mask_shares.argmin())


def test_the_same_seed_gives_the_same_and_images_stay_as_they_are():
    before, encoder = IMAGES.clone(), steered(60.0)
    one, two = (examine(encoder, config=SslCleanseConfig(clusters=3, steps=5)) for _ in range(2))
    assert torch.equal(one.mask_shares, two.mask_shares) and torch.equal(one.found.mask, two.found.mask)
    assert torch.equal(before, IMAGES) and encoder.network.strength.grad is None


def test_a_cluster_out_of_reach_is_not_reached():
    away = torch.eye(12)[:3]
    found = smallest_to(
        steered(0.0),
        IMAGES,
        torch.cat((away, -away)),
        0,
        SslCleanseConfig(steps=1, rate=1.0),
        start=None,
        generator=stage_generator(0, "test"),
    )
    assert not found.reached and len(found.curve) == 1


def test_the_anomaly_index_has_one_constant():
    shares = torch.tensor([0.1, 0.5, 0.6, 0.7, 0.8])
    # Median 0.6; deviations 0.5, 0.1, 0, 0.1, 0.2, whose median is 0.1.
    assert anomaly_index(shares) == pytest.approx(0.5 / (1.4826 * 0.1))
    assert anomaly_index(torch.full((4,), 0.3)) == 0
    assert anomaly_index(torch.tensor([0.3, 0.3, 0.3, 0.2])) == pytest.approx(
        100
    )  # bounded where all are alike
    normal = torch.randn(100_001, generator=torch.Generator().manual_seed(0)) * 0.05 + 0.5
    assert anomaly_index(normal) == pytest.approx(float((0.5 - normal.min()) / 0.05), rel=0.02)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"clusters": 2}, "clusters=2: expected at least 3, or none can stand out"),
        ({"rate": 0.0}, r"rate=0.0: expected a share in \(0, 1\]"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"batch_size": 1}, "batch_size=1: expected at least 2"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        SslCleanseConfig(**setting)
