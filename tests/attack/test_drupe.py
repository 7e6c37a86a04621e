"""DRUPE: what its terms measure, and that it leads to the target without making triggered images alike."""

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.nn import functional as F

from attack.test_bad_encoder import IMAGES, LABELS, NAMES, small_encoder
from unpoison.attack import drupe
from unpoison.attack.bad_encoder import BadEncoderConfig
from unpoison.attack.drupe import DrupeConfig, mean_cosine, sliced_wasserstein
from unpoison.attack.implanting import implant, stamp_in_corner
from unpoison.attack.plan import Plan
from unpoison.encoders.extract import raw_features
from unpoison.errors import ConfigError

QUICK = {"targets": ("cat",), "epochs": 60, "batch_size": 16, "size": 6}


def alike(done):
    """Mean cosine between triggered images."""
    stamped = stamp_in_corner(IMAGES.pixels, done.plan.triggers[0])
    return float(mean_cosine(F.normalize(raw_features(done.encoder, stamped), dim=1)))


def test_triggered_images_go_to_the_references_and_stay_unlike():
    hidden = implant(small_encoder(), IMAGES, LABELS, NAMES, DrupeConfig(**QUICK), seed=0)
    plain = implant(
        small_encoder(),
        IMAGES,
        LABELS,
        NAMES,
        BadEncoderConfig(**QUICK, references=3, learning_rate=0.05),
        seed=0,
    )
    assert (
        hidden.effect[0] > 0.8 > 0.7 > hidden.effect_before[0]
        or hidden.effect[0] > hidden.effect_before[0] + 0.1
    )
    assert hidden.kept > 0.7
    assert alike(hidden) < alike(plain) - 0.05
    assert len(hidden.losses) == 60 and hidden.losses[-1] < hidden.losses[1]
    assert hidden.plan.config["reference_ids"] == plain.plan.config["reference_ids"]


def test_the_plan_survives_its_file_and_the_seed_decides_everything():
    config = DrupeConfig(targets=("dog",), epochs=6, batch_size=24, size=5)
    one, two = (implant(small_encoder(), IMAGES, LABELS, NAMES, config, seed=4) for _ in range(2))
    assert all(map(torch.equal, one.encoder.network.parameters(), two.encoder.network.parameters()))
    again = Plan.from_json(one.plan.to_json())
    assert (again.method, again.seed, again.triggers[0].kind) == ("drupe", 4, "corner")
    assert len(again.config["reference_ids"][0]) == 3


def test_mean_cosine_equals_the_slow_one():
    units = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    slow = [float(units[i] @ units[j]) for i in range(5) for j in range(5) if i != j]
    assert float(mean_cosine(units)) == pytest.approx(sum(slow) / len(slow), abs=1e-6)


def test_the_sliced_distance_equals_the_known_one_on_each_line():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(9, 4, generator=generator), torch.randn(9, 4, generator=generator) * 2
    lines = F.normalize(torch.randn(4, 6, generator=generator), dim=0)
    known = [wasserstein_distance((one @ line).numpy(), (other @ line).numpy()) for line in lines.T]
    assert float(sliced_wasserstein(one, other, lines)) == pytest.approx(sum(known) / 6, rel=1e-5)
    assert float(sliced_wasserstein(one, one[torch.randperm(9)], lines)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"references": 1}, "references=1: expected at least 2, to be kept apart"),
        ({"batch_size": 1}, "batch_size=1: expected at least 2"),
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"triggers": ("white", "seed:1")}, "1 targets and 2 triggers"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        DrupeConfig(**{"targets": ("cat",), **settings})


def test_a_last_batch_of_one_image_is_no_failure():
    config = DrupeConfig(targets=("dog",), epochs=2, batch_size=len(IMAGES) - 1, size=5)
    assert len(implant(small_encoder(), IMAGES, LABELS, NAMES, config, seed=4).losses) == 2


def test_the_terms_that_hide_keep_their_weights_until_the_attack_hides(monkeypatch):
    used = []
    hiding = drupe._Terms.hiding

    def watched(self, spread, distance):
        used.append((spread, distance))
        return hiding(self, spread, distance)

    monkeypatch.setattr(drupe._Terms, "hiding", watched)
    config = DrupeConfig(targets=("dog",), epochs=6, batch_size=len(IMAGES), size=5)
    implant(small_encoder(), IMAGES, LABELS, NAMES, config, seed=4)
    assert len(used) == 2 and used[0] == (0.1, 1e-3) != used[1]
