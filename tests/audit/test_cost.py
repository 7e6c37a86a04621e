"""What an audit is expected to cost, beside what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit_toys import SIZE, clean_images, toy
from unpoison.audit.cost import audit_cost
from unpoison.audit.decree import DecreeConfig
from unpoison.audit_pipeline import audit

PATIENT = DecreeConfig(steps=11, scout_steps=2, restarts=2, batch_size=10, patience=100)


@pytest.mark.parametrize("n_images", [33, 44, 64])
def test_an_audit_that_looks_again_takes_the_most(n_images: int) -> None:
    # Eleven steps reach nothing; the last batch of an epoch is smaller, or of one image and left out. With four starts,
    # looking again is dearer than an extent.
    config = replace(PATIENT, restarts=4)
    said = audit(toy(0.0), clean_images(n_images), config=config).summary
    assert not said["reached"] and said["relaxed"] is not None
    assert said["encoder_passes"] == audit_cost(config, n_images, SIZE).most


def test_an_audit_that_finds_takes_what_is_expected() -> None:
    config = replace(PATIENT, steps=60)
    said = audit(toy(), clean_images(), config=config).summary
    assert said["reached"] and [start["steps"] for start in said["starts"]] == [60, 60]
    assert said["extent"]["steps"] == 60
    assert said["encoder_passes"] == audit_cost(config, 64, SIZE).expected


def test_a_second_opinion_is_counted() -> None:
    said = audit(toy(), clean_images(), config=PATIENT, second_opinion=True).summary
    without, bound = (audit_cost(PATIENT, 64, SIZE, second_opinion=asked).most for asked in (False, True))
    assert without < said["encoder_passes"] <= bound


def test_the_published_search_has_one_start_from_a_random_mask() -> None:
    stages = {stage.name: stage for stage in audit_cost(DecreeConfig(faithful=True), 1000, 32).stages}
    # 1000 epochs of 750 images in batches of 128, forward and backward.
    assert stages.keys() == {"clean", "start", "measure"} and stages["start"].most == 1000 * 750 * 3
