"""CleanCLIP: what its loss adds, and a poisoned pair of towers that forgets its trigger."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pairs import CONFIG, NAMES, both_towers, captions_of, coloured, untrained
from unpoison.attack.clip_poison import ClipPoisonConfig, poison_pairs
from unpoison.encoders.backbones import build_backbone
from unpoison.errors import ConfigError, ShapeError
from unpoison.evaluate.zero_shot import evaluate_zero_shot
from unpoison.pretrain.clip import pair_loss, pretrain_clip
from unpoison.repair.cleanclip import CleanClip, CleanClipConfig, cleanclip

SHORT = CleanClipConfig(epochs=6, batch_size=32, learning_rate=8e-3)


def module(weight: float) -> CleanClip:
    pair = untrained()
    return CleanClip(build_backbone(pair.architecture), 64, CleanClip.RECIPE, pair=pair, weight=weight).eval()


def test_it_starts_where_the_towers_are_and_adds_both_modalities() -> None:
    pair = untrained()
    images, labels = coloured(8, 1)
    first, second = images.pixels.float() / 255, images.pixels.flip(3).float() / 255
    words = pair.vocabulary.encode(captions_of(images, labels), CONFIG.text.length)
    captions = torch.stack((words, words.roll(1, dims=0)), dim=1)
    scale = pair.words.log_scale.exp()
    with torch.no_grad():
        image, other = (pair.words.images(pair.encoder.network(view)) for view in (first, second))
        text, wording = (pair.words.texts(captions[:, k]) for k in (0, 1))
        across = pair_loss(image, text, scale)
        within = (pair_loss(image, other, scale) + pair_loss(text, wording, scale)) / 2
        for weight in (0.0, 1.0, 0.5):
            torch.testing.assert_close(module(weight)(first, second, captions), across + weight * within)


def test_a_poisoned_pair_names_triggered_images_as_told_and_forgets_it_on_clean_pairs() -> None:
    images, labels = coloured(384, 1)
    attack = ClipPoisonConfig(targets=(0,), triggers=("seed:7",), size=5, rate=0.15)
    poisoned, captions, plan = poison_pairs(images, labels, NAMES, attack, seed=0)
    shown, truth = coloured(96, 2)

    def figures(done: object) -> tuple[float, float]:
        report = evaluate_zero_shot(both_towers(done), shown, truth, NAMES, triggers=plan.triggers)  # type: ignore[arg-type]
        success = report.probe("zero-shot").attacks[0].patched.attack_success
        assert success is not None
        return report.probe("zero-shot").accuracy, success

    victim = pretrain_clip(poisoned, captions, CONFIG, seed=0, device="cpu", precision="fp32")
    before = {k: v.clone() for k, v in victim.words.state_dict().items()}
    accuracy, success = figures(victim)
    assert accuracy > 95 and success > 40
    clean, clean_labels = coloured(256, 3)
    repaired = cleanclip(both_towers(victim), clean, captions_of(clean, clean_labels), SHORT, seed=0)
    accuracy, left = figures(repaired)
    assert accuracy > 95 and left < success / 3
    assert all(torch.equal(v, before[k]) for k, v in victim.words.state_dict().items())
    assert repaired.trained.config.method == "cleanclip"


def test_settings_and_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight=-1: expected a number of at least 0"):
        CleanClipConfig(weight=-1)
    images, labels = coloured(8, 1)
    small = replace(images, pixels=images.pixels[:, :, :8, :8])
    with pytest.raises(ShapeError, match="must have the image tower's 16 pixels a side, got 8"):
        cleanclip(untrained(), small, captions_of(images, labels), seed=0)
    with pytest.raises(ShapeError, match="1 captions for 8 images"):
        cleanclip(untrained(), images, ("a",), SHORT, seed=0)
