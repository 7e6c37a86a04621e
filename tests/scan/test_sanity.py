"""The sanity suite: data on which a scan must not cry wolf, and data on which it must.

What needs trained victims or many scans is a benchmark: clean victims of twenty seeds and more, never trained encoders,
CTRL, a logo and an even trigger on CIFAR-10 in benchmarks/false_alarms.py, poison rates in benchmarks/power.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from toys import SIZE, TRIGGER_SIDE, PlantedEncoder, planted_encoder, planted_images, planted_pattern
from unpoison import pipeline
from unpoison.attack.ctrl import CtrlConfig
from unpoison.attack.ssl_backdoor import poison
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.functional.clustering import kmeans
from unpoison.functional.windows import paste_windows
from unpoison.records import Box, Geometry, ImageSet, ScanResult
from unpoison.runs import load_result
from unpoison.runtime import seeded
from unpoison.scan.config import ScanConfig
from unpoison.scan.poison_classifier import ClassifierConfig

CONFIG = ScanConfig(method="poisoncam", clusters=10, n_flips=24, exploit=30)
CORNER = SIZE - TRIGGER_SIDE - 1


@pytest.fixture(scope="module", autouse=True)
def quick_classifier() -> Any:
    """A classifier that learns nothing, in no time."""
    quick = ClassifierConfig(networks=1, iterations=4, width=4, batch_size=16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ClassifierConfig, "of_scan", lambda scan: quick)
        yield


def clean_images(n: int = 160, seed: int = 0) -> ImageSet:
    return planted_images(n, 0, torch.Generator().manual_seed(seed))[0]


def overlaid(images: ImageSet, rows: torch.Tensor, corners: torch.Tensor) -> ImageSet:
    """The pattern of the toys on these images."""
    pixels = images.pixels.clone(memory_format=torch.channels_last)
    pixels[rows] = paste_windows(pixels[rows], planted_pattern().expand(len(rows), -1, -1, -1), corners)
    return dataclasses.replace(images, pixels=pixels)


def untrained(name: str = "resnet10", *, seed: int = 0, size: int = SIZE) -> Encoder:
    with seeded(seed, "tests/untrained"):
        network = build_backbone(Architecture(name=name, image_size=size, width=8))
    preprocessing = Preprocessing(geometry=Geometry(size, size), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Encoder(network, preprocessing, name=name, device="cpu", precision="fp32")


def raises_no_alarm(result: ScanResult) -> bool:
    return result.verdict != "poisoned" and not result.flagged and not result.triggers


@pytest.mark.slow
def test_clean_images_raise_at_most_one_alarm_in_twenty_scans() -> None:
    """Line 1, with the toy; trained victims: benchmarks/false_alarms.py."""
    scans = [
        pipeline.scan(clean_images(seed=seed), planted_encoder(), config=CONFIG, seed=seed)
        for seed in range(20)
    ]
    assert sum(not raises_no_alarm(result) for result in scans) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10", "vit_tiny", "mobilenetv3_small_050"])
def test_an_encoder_that_was_never_trained_raises_no_alarm(name: str) -> None:
    """Line 2."""
    images, _ = planted_images(160, 16, torch.Generator().manual_seed(1))
    assert raises_no_alarm(pipeline.scan(images, untrained(name), config=CONFIG))


class SeesWatermarks(PlantedEncoder):
    """Knows the pattern in the one corner where it was ever seen; elsewhere it means nothing."""

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        middle = CORNER + TRIGGER_SIDE // 2
        correlation = self.detector(images.float())[:, :, middle, middle]
        return torch.cat((20 * F.relu(correlation - 0.9) / 0.1, features[:, correlation.shape[1] :]), dim=1)


def encoder_of(network: PlantedEncoder) -> Encoder:
    return Encoder(network, planted_encoder().preprocessing, name="toy", device="cpu", precision="fp32")


@pytest.mark.parametrize("step", [8, 3], ids=["on one kind of images", "on all kinds alike"])
def test_a_mark_that_leads_nowhere_is_a_recurring_pattern_and_no_alarm(step: int) -> None:
    """Lines 3 and 4: always in the same corner, seen by the encoder, and without power over other images."""
    rows = torch.arange(0, 160, step)  # kinds take turns, and there are eight
    images = overlaid(clean_images(), rows, torch.full((len(rows), 2), CORNER))
    config = dataclasses.replace(CONFIG, samples=8)
    result = pipeline.scan(images, encoder_of(SeesWatermarks(planted_pattern())), config=config)
    assert raises_no_alarm(result)
    (pattern,) = result.benign_patterns
    assert set(pattern.source_ids) <= {images.ids[row] for row in rows.tolist()}
    mark = Box(CORNER, CORNER, TRIGGER_SIDE, TRIGGER_SIDE)
    assert all(box.intersection(mark) >= 0.4 * mark.area for box in pattern.boxes)
    (said,) = result.summary["benign_patterns"]
    assert said["n_sources"] == pattern.n_sources == len(pattern.source_ids) >= 5
    assert said["sources"] == list(pattern.source_ids) and said["flip_rate"] < 0.05


def test_the_same_patch_is_an_alarm_where_the_encoder_obeys_it_and_then_no_benign_pattern() -> None:
    """What the four lines above must not be bought with."""
    images, boxes = planted_images(160, 16, torch.Generator().manual_seed(0))
    result = pipeline.scan(images, planted_encoder(), config=CONFIG)
    assert result.verdict == "poisoned" and set(result.triggers[0].source_ids) <= boxes.keys()
    assert not any(set(pattern.source_ids) & boxes.keys() for pattern in result.benign_patterns)


def test_ctrl_s_waves_are_no_patch_and_the_scope_says_so() -> None:
    """Line 6."""
    images = clean_images()
    labels = torch.arange(len(images)) % 8
    names = tuple("abcdefgh")
    waves = CtrlConfig(target="a", rate=0.8, rate_of="class")
    images, _ = poison(images, labels, names, waves, 0)
    result = pipeline.scan(images, planted_encoder(), config=CONFIG)
    assert raises_no_alarm(result)
    assert any("whole image" in line for line in result.summary["scope"]["not_tested"])


def test_findings_do_not_depend_on_the_batch_size() -> None:
    """A real network in float32; the toy's features hardly differ between batches."""
    images, _ = planted_images(120, 12, torch.Generator().manual_seed(3))
    config = ScanConfig(method="poisoncam", clusters=8, n_flips=16, exploit=10)
    first, other = (
        pipeline.scan(images, untrained(), config=config, seed=5, batch_size=size) for size in (512, 31)
    )
    assert (first.verdict, first.flagged) == (other.verdict, other.flagged)
    pandas.testing.assert_frame_equal(
        first.findings.drop(columns="poison_score"), other.findings.drop(columns="poison_score")
    )
    pandas.testing.assert_series_equal(
        first.findings["poison_score"], other.findings["poison_score"], atol=1e-5, rtol=1e-4
    )
    assert first.summary["encoder_passes"] == other.summary["encoder_passes"]


@pytest.mark.parametrize("kinds", ["one kind", "all kinds", "all kinds, with captions"])
def test_what_the_encoder_obeys_is_an_attack_only_where_it_is_aimed(kinds: str, tmp_path: Any) -> None:
    """Fifteen seven, line four: in training, an overlay on images of all classes gets an attractor of its own."""
    images, encoder = clean_images(600, seed=3), planted_encoder()
    generator = torch.Generator().manual_seed(4)
    features = F.normalize(encoder.features(images.pixels), dim=1)
    kind = kmeans(features, 5, generator=generator).assignment
    rows = (
        (kind == 0).nonzero().flatten() if kinds == "one kind" else torch.randperm(600, generator=generator)
    )
    rows = rows[:150]
    corners = torch.randint(0, SIZE - TRIGGER_SIDE + 1, (len(rows), 2), generator=generator)
    config = dataclasses.replace(CONFIG, clusters=20, exploit=200)
    encoder.captioned = kinds == "all kinds, with captions"
    result = pipeline.scan(overlaid(images, rows, corners), encoder, config=config, out=tmp_path / "run")
    if encoder.captioned:  # the captions name the target; the images need not
        assert result.verdict == "poisoned" and result.summary["triggers"][0]["concentration"] is None
        return
    if kinds == "one kind":
        assert result.verdict == "poisoned" and result.summary["triggers"][0]["concentration"] > 1.5
        assert not any(pattern.steers for pattern in result.benign_patterns)
        return
    assert result.verdict == "inconclusive" and "it lies on images of all kinds" in result.summary["reason"]
    assert result.flagged == () and result.triggers == () and result.summary["p_value"] < 1e-6
    overlay, *others = result.benign_patterns
    assert overlay.steers and overlay.concentration == pytest.approx(1, abs=0.4) and overlay.flip_rate > 0.5
    assert not any(pattern.steers for pattern in others)
    assert set(overlay.source_ids) <= {images.ids[row] for row in rows.tolist()}
    assert result.summary["benign_patterns"][0]["steers"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "it is aimed at no kind of image" in page
    assert load_result(tmp_path / "run").benign_patterns[0].concentration == overlay.concentration
