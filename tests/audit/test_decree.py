from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from audit_toys import BOX, SIZE, clean_images, toy
from unpoison.audit import decree
from unpoison.audit.decree import (
    DecreeConfig,
    Windows,
    blend,
    box_of,
    hold_out,
    invert,
    mean_pairwise_cosine,
    own_collapse,
    scout,
    whole_trigger,
)
from unpoison.errors import ConfigError, NoVerdictError
from unpoison.records import Box
from unpoison.runtime import stage_generator

IMAGES = clean_images().pixels
QUICK = DecreeConfig(steps=250, batch_size=32)


def search(encoder, config=QUICK, *, seed=0, **more):
    return invert(
        encoder,
        IMAGES,
        config,
        clean_collapse=own_collapse(encoder, IMAGES),
        generator=stage_generator(seed, "test"),
        **more,
    )


@pytest.mark.parametrize("config", [QUICK, DecreeConfig(faithful=True)], ids=["mended", "faithful"])
def test_a_planted_white_square_is_recovered_and_without_it_the_mask_grows_markedly(config):
    found, without = search(toy(), config), search(toy(0.0), config)
    inside = found.mask[BOX.y : BOX.y + BOX.h, BOX.x : BOX.x + BOX.w]
    assert found.reached and without.reached
    assert inside.sum() > 0.7 * found.mask.sum()
    box = box_of(found.mask)
    assert box is not None
    shared = box.intersection(BOX)
    assert shared / (box.area + BOX.area - shared) > 0.3
    assert found.mask_share < 0.2 and without.mask_share > 3 * found.mask_share
    # The features of clean images are unlike in both cases, so that it is the mask that makes them alike.
    assert max(own_collapse(toy(), IMAGES), own_collapse(toy(0.0), IMAGES)) < 0.5
    assert mean_pairwise_cosine(toy(), IMAGES, mask=found.mask, pattern=found.pattern) > 0.85


def test_the_windows_over_the_trigger_collapse_the_features_most():
    encoder, told = toy(), []
    found = scout(
        encoder,
        IMAGES,
        QUICK,
        generator=stage_generator(0, "test"),
        progress=lambda *said: told.append(said),
    )
    # 16 pixels: windows of 4 at 0, 2, ..., 12 both ways; 8 steps of 17 images, forward and backward.
    assert found.side == 4 and found.corners.tolist() == [
        [y, x] for y in range(0, 13, 2) for x in range(0, 13, 2)
    ]
    assert encoder.images_shown == 49 * 8 * 17 * 3 and told[-1] == ("scout", 49, 49)
    assert (
        found.patterns.shape == (49, 3, 4, 4)
        and 0 <= float(found.patterns.min()) <= float(found.patterns.max()) <= 1
    )
    (best,) = found.best(1)
    top, left = found.corners[best].tolist()
    assert Box(left, top, 4, 4).intersection(BOX) >= 8
    start = search(toy(), DecreeConfig(steps=1, batch_size=32), start=(found, best))
    inside = start.mask[top : top + 4, left : left + 4]
    assert inside.mean() > 0.85 and (start.mask.sum() - inside.sum()) / (SIZE**2 - 16) < 0.03
    assert torch.allclose(start.pattern[:, top : top + 4, left : left + 4], found.patterns[best], atol=1e-3)


def test_the_whole_trigger_is_what_a_patch_at_its_place_can_do():
    encoder = toy()
    own = own_collapse(encoder, IMAGES)
    windows = scout(encoder, IMAGES, QUICK, generator=stage_generator(0, "test"))
    start = (windows, windows.best(1)[0])

    def reach(encoder, config=QUICK):
        return whole_trigger(
            encoder,
            IMAGES,
            config,
            clean_collapse=own,
            start=start,
            generator=stage_generator(0, "test"),
        )

    smallest, whole = search(encoder, start=start), reach(encoder)
    assert whole is not None and whole.reached
    assert whole.mask_share > smallest.mask_share and whole.collapse > smallest.collapse
    truth = torch.zeros_like(whole.mask, dtype=torch.bool)
    truth[BOX.y : BOX.y + BOX.h, BOX.x : BOX.x + BOX.w] = True

    def overlap(found):
        return float(((found.mask > 0.5) & truth).sum() / ((found.mask > 0.5) | truth).sum())

    assert overlap(whole) > max(0.3, overlap(smallest))
    # Where a patch does less than is asked of the smallest mask, there is no more to show.
    assert reach(toy(0.0)) is None
    # A mask that reaches as much was not found in time.
    assert reach(encoder, replace(QUICK, steps=1)) is None


def test_the_best_windows_lie_apart():
    corners = torch.tensor([[0, 0], [0, 1], [0, 2], [8, 8], [9, 9]])
    windows = Windows(corners, torch.zeros(5, 3, 4, 4), torch.tensor([0.5, 0.9, 0.6, 0.7, 0.8]))
    assert windows.best(1) == [1] and windows.best(9) == [1, 4]
    corners = torch.tensor([[0, 0], [0, 2]])
    assert Windows(corners, torch.zeros(2, 3, 4, 4), torch.tensor([0.1, 0.2])).best(2) == [1, 0]


def test_the_best_mask_keeps_its_pattern():
    found = search(toy())
    assert found.mask_share == pytest.approx(float(found.mask.mean()), abs=1e-6)
    enough = found.curve[:, 0] > own_collapse(toy(), IMAGES) + QUICK.gain * (1 - own_collapse(toy(), IMAGES))
    assert found.mask_share == pytest.approx(float(found.curve[enough, 1].min()), abs=1e-6)
    row = int(found.curve[:, 1].sub(found.mask_share).abs().argmin())
    assert found.collapse == pytest.approx(float(found.curve[row, 0]), abs=1e-6)
    assert found.mask.shape == (SIZE, SIZE) and found.pattern.shape == (3, SIZE, SIZE)
    assert float(found.pattern.min()) >= 0 and float(found.pattern.max()) <= 1


def test_the_same_seed_gives_the_same_and_nothing_else_changes():
    encoder, before, state = toy(), IMAGES.clone(), torch.get_rng_state()
    short = DecreeConfig(steps=20, batch_size=16)
    one, two, other = search(encoder, short), search(encoder, short), search(encoder, short, seed=1)
    assert torch.equal(one.mask, two.mask) and torch.equal(one.curve, two.curve)
    assert not torch.equal(one.mask, other.mask)
    assert torch.equal(IMAGES, before) and torch.equal(torch.get_rng_state(), state)
    assert encoder.network.strength.grad is None and not encoder.network.strength.requires_grad
    assert float(encoder.network.strength) == 40


def test_passes_are_counted_forward_and_backward_and_progress_ends_at_the_total():
    encoder, told = toy(), []
    collapse = own_collapse(encoder, IMAGES)
    before = encoder.images_shown
    found = invert(
        encoder,
        IMAGES,
        DecreeConfig(steps=5, batch_size=24),
        clean_collapse=collapse,
        generator=stage_generator(0, "test"),
        stage="start 1",
        progress=lambda *said: told.append(said),
    )
    # 64 images in batches of 24, 24 and 16.
    assert encoder.images_shown - before == 3 * (24 + 24 + 16 + 24 + 24)
    assert len(found.curve) == 5 and told[-1] == ("start 1", 5, 5)


def test_a_collapse_out_of_reach_is_said_and_a_relaxed_one_is_reached():
    short = DecreeConfig(steps=40, batch_size=32)
    strict = search(toy(2.0), DecreeConfig(steps=1, batch_size=32))
    assert not strict.reached and 0 < strict.mask_share < 1
    relaxed = search(toy(), short, gain=0.3)
    assert relaxed.reached and relaxed.mask_share < 1


def test_the_published_weights_follow_runs_of_six():
    found = search(toy(), DecreeConfig(faithful=True))
    enough, weights = (found.curve[:, 0].abs() > 0.99).tolist(), (found.curve[:, 2] / (3 * SIZE**2)).tolist()
    assert weights[0] == pytest.approx(1e-3)
    successes = failures = in_a_row = 0
    expected = 1e-3
    for success, weight in zip(enough, weights, strict=True):
        assert weight == pytest.approx(expected, rel=1e-4)
        successes, failures = (successes + 1, 0) if success else (0, failures + 1)
        in_a_row = in_a_row + 1 if success else 0
        if successes == 6:
            expected, successes = min(expected * 5, 1e5), 0
        if failures == 6:
            expected, failures = expected / 5 if expected >= 1e-5 else expected, 0
        if expected < 1e-5 and in_a_row > 10:
            expected = 1e-3


def test_mean_pairwise_cosine_equals_the_slow_one():
    encoder = toy()
    mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    pattern = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    few = IMAGES[:7]
    for trigger in ({}, {"mask": mask, "pattern": pattern}):
        images = few.float() / 255
        if trigger:
            images = blend(images, mask, pattern)
        features = encoder.features(images)
        pairs = [
            float(F.cosine_similarity(features[i], features[j], dim=0))
            for i in range(7)
            for j in range(7)
            if i != j
        ]
        assert mean_pairwise_cosine(encoder, few, batch_size=3, **trigger) == pytest.approx(
            sum(pairs) / len(pairs), abs=1e-5
        )


def test_blending_is_exact_at_both_ends():
    images = IMAGES[:2].float() / 255
    pattern = torch.zeros(3, SIZE, SIZE)
    assert torch.equal(blend(images, torch.zeros(SIZE, SIZE), pattern), images)
    assert torch.equal(blend(images, torch.ones(SIZE, SIZE), pattern)[1], pattern)


def test_a_mask_that_hides_nothing_has_no_box():
    assert box_of(torch.full((4, 4), 0.5)) is None
    assert box_of(torch.ones(4, 4)) == Box(0, 0, 4, 4)


def test_single_pixels_do_not_widen_the_box():
    mask = torch.zeros(16, 16)
    mask[9:14, 8:13] = 1
    mask[0, 0] = mask[15, 1] = 1
    assert box_of(mask) == Box(8, 9, 5, 5)


def test_a_quarter_is_held_out_and_shared_by_nobody():
    images = clean_images(40)
    searched, held = hold_out(images, stage_generator(0, "test"))
    assert (len(searched), len(held)) == (30, 10)
    rows = {bytes(pixels.numpy()) for pixels in torch.cat((searched, held)).contiguous()}
    assert len(rows) == 40
    with pytest.raises(NoVerdictError, match="31 readable images: an audit needs at least 32; name more"):
        hold_out(clean_images(31), stage_generator(0, "test"))


def test_an_encoder_that_cannot_tell_images_apart_is_refused():
    encoder = toy()
    encoder.network.strength.data.fill_(0)
    encoder.network.forward = lambda images: torch.ones(len(images), 3)
    with pytest.raises(NoVerdictError, match=r"toy gives nearly the same features .* \(mean cosine 1.0000\)"):
        own_collapse(encoder, IMAGES)
    encoder.network.forward = lambda images: torch.full((len(images), 3), float("nan"))
    with pytest.raises(NoVerdictError, match="mean cosine nan"):
        own_collapse(encoder, IMAGES)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gain": 1.0}, r"gain=1.0: expected a share in \(0, 1\)"),
        ({"relaxed_gain": 0.995}, r"relaxed_gain=0.995: expected a share in \(0, gain\], gain is 0.9"),
        ({"restarts": 0}, "restarts=0: expected at least 1"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"patience": 0}, "patience=0: expected at least 1"),
        ({"batch_size": 1}, "batch_size=1: expected at least 2"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0: expected a number in \(0, 10\]"),
        ({"faithful": True, "steps": 10}, "steps=10: the published schedule has its own; leave it out"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        DecreeConfig(**setting)


def test_a_handful_of_images_defines_no_mask():
    batches = [
        len(rows)
        for rows in decree._batches(132, 64, torch.Generator(), least=decree._least(DecreeConfig(), 132))
    ]
    assert batches == [64, 64]
    assert decree._least(DecreeConfig(), 40) == 20 and decree._least(DecreeConfig(batch_size=2), 40) == 2
