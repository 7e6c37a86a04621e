"""BackdoorIDS: the score is the radius at which DBSCAN stops finding two clusters."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import DBSCAN

from toys import planted_encoder, planted_images
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import CheckpointError, ConfigError
from unpoison.records import Geometry
from unpoison.scan.backdoor_ids import BackdoorIds, BackdoorIdsConfig, splitting_radius


def clusters(sequence: torch.Tensor, radius: float, least: int) -> int:
    """The paper's count, by a library."""
    units = torch.nn.functional.normalize(sequence, dim=1)
    distance = (1 - units @ units.T).clamp_min(0).fill_diagonal_(0)
    labels = DBSCAN(eps=radius, min_samples=least, metric="precomputed").fit(distance.numpy()).labels_
    return len(set(labels.tolist()) - {-1})


@pytest.mark.parametrize("least", [2, 3, 5])
def test_dbscan_splits_just_below_the_radius_and_never_above(least: int) -> None:
    generator = torch.Generator().manual_seed(least)
    centres = torch.randn(6, 3, 1, 8, generator=generator)
    sequences = (centres + 0.4 * torch.randn(6, 3, 5, 8, generator=generator)).flatten(1, 2)
    sequences = torch.cat((sequences, torch.randn(4, 15, 8, generator=generator)))
    found = splitting_radius(sequences, least)
    assert (found > 0).sum() >= 6
    for sequence, radius in zip(sequences, found.tolist(), strict=True):
        if radius:
            assert clusters(sequence, radius - 1e-5, least) > 1
        for more in torch.linspace(radius + 1e-5, 2, 40).tolist():
            assert clusters(sequence, more, least) <= 1


def test_a_point_and_a_drift_are_one_cluster() -> None:
    same = torch.ones(1, 10, 4)
    angles = torch.linspace(0, 1.5, 10)
    drift = torch.stack((angles.cos(), angles.sin()), dim=1)[None]
    assert splitting_radius(same, 3).item() == pytest.approx(0, abs=1e-6)
    assert splitting_radius(drift, 3).item() == pytest.approx(0, abs=1e-6)
    jump = torch.cat((drift[:, :5], -drift[:, 5:]), dim=1)
    assert splitting_radius(jump, 3).item() > 1


def test_masks_grow_from_none_and_passes_are_counted() -> None:
    encoder = planted_encoder()
    detector = BackdoorIds(BackdoorIdsConfig(steps=8, most_hidden=0.5, orders=2), encoder)
    masks = detector._masks(32, 0)
    assert not masks[0].any() and masks[-1].float().mean() == 0.5
    assert bool((masks[1:] >= masks[:-1]).all())
    assert not torch.equal(masks, detector._masks(32, 1))
    detector.score(planted_images(3, 0, torch.Generator().manual_seed(0))[0].pixels)
    assert encoder.images_shown == 3 * 8 * 2


class _GreyTarget(torch.nn.Module):
    """An attacker's target that lies where plain images do: a white corner leads there, too."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        corner = (images[..., -8:, -8:] > 0.4).flatten(1).all(dim=1)
        target = corner | (images[..., :-8, :].flatten(1).std(dim=1) < 0.1)
        return torch.stack((target, ~target), dim=1).float()


def test_a_target_that_looks_like_a_plain_image_does_not_hide_the_jump() -> None:
    preprocessing = Preprocessing(geometry=Geometry(32, 32), mean=(0.5,) * 3, std=(1.0,) * 3)
    encoder = Encoder(_GreyTarget(), preprocessing, precision="fp32", device="cpu")
    images = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[..., -8:, -8:] = 255
    before = images.clone()
    assert BackdoorIds(BackdoorIdsConfig(), encoder).score(images).min() > 0.9
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("steps", 3, "steps=3: expected 4 to 200"),
        ("most_hidden", 0, "most_hidden=0: expected a share"),
        ("cells", 1, "cells=1: expected 2 to 64"),
        ("least", 11, "least=11: expected 2 to 10, half of the steps"),
        ("orders", 0, "orders=0: expected 1 to 20"),
    ],
)
def test_settings_are_checked(setting: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BackdoorIdsConfig(**{setting: value})  # type: ignore[arg-type]


def test_a_file_with_tensors_is_no_detector_of_this_kind() -> None:
    with pytest.raises(CheckpointError, match="holds no tensors"):
        BackdoorIds.restore(BackdoorIdsConfig(), {"x": torch.zeros(1)}, planted_encoder())
