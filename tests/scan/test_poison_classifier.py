"""The poison classifier: the toy's poison flagged, its draws, its threshold, its mended stops, and its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from toys import SIZE, planted_images
from unpoison.errors import ConfigError, NoVerdictError, ShapeError
from unpoison.functional.windows import crop_windows
from unpoison.records import Box, ImageSet
from unpoison.scan import poison_classifier as module
from unpoison.scan.poison_classifier import (
    ClassifierConfig,
    PoisonClassifier,
    paste_resized,
    train_poison_classifier,
)

WINDOW = 9
# Sides near the trigger's own, and whole images only: learned in a second.
EASY = {"whole_images": 1.0, "smallest_side": 0.2, "largest_side": 0.32}
SMALL = ClassifierConfig(networks=2, iterations=120, batch_size=32, width=8, **EASY)
BRIEF = ClassifierConfig(networks=2, iterations=3, batch_size=8, width=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Material:
    """A toy data set, and what a perfect search would hand over: ten windows with their sources."""

    def __init__(self) -> None:
        self.images, boxes = planted_images(400, 40, generator(3))
        self.poisoned = torch.tensor([i in boxes for i in self.images.ids])
        self.positives = self.poisoned.nonzero().flatten()[:10]
        corners = []
        for row in self.positives.tolist():
            box: Box = boxes[self.images.ids[row]]
            corners.append((min(box.y, SIZE - WINDOW), min(box.x, SIZE - WINDOW)))
        self.patches = crop_windows(self.images.pixels[self.positives], torch.tensor(corners), WINDOW)
        # Ten poisoned images were missed, and are among those that nobody suspects.
        self.base = torch.cat(((~self.poisoned).nonzero().flatten(), self.poisoned.nonzero().flatten()[-10:]))
        places = torch.randint(0, SIZE - WINDOW + 1, (20, 2), generator=generator(4))
        self.benign = crop_windows(self.images.pixels[self.base[:20]], places, WINDOW)

    def train(self, config: ClassifierConfig, **changes: object) -> PoisonClassifier:
        given = {
            "base_rows": self.base,
            "benign_patches": self.benign,
            "positives": self.positives,
            "config": config,
            "device": "cpu",
            "precision": "fp32",
        } | changes
        images, patches = given.pop("images", self.images), given.pop("patches", self.patches)
        return train_poison_classifier(images, patches, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def material() -> Material:
    return Material()


@pytest.fixture(scope="module")
def trained(material: Material) -> PoisonClassifier:
    return material.train(SMALL)


def test_it_flags_the_planted_images_and_hardly_any_other(material, trained) -> None:
    probability = trained.probability(material.images.pixels)
    assert probability.shape == (400,) and probability.dtype == torch.float32
    assert probability.min() >= 0 and probability.max() <= 1
    flagged = probability > trained.threshold
    assert flagged[material.poisoned].float().mean() >= 0.95
    assert (flagged & material.poisoned).sum() / flagged.sum() >= 0.9
    assert 0.5 <= trained.threshold < 1 and trained.source_recall == 1


def test_every_member_is_in_the_ensemble_once_and_differs(trained) -> None:
    assert len(trained.networks) == 2 and trained.iterations == (120, 120)
    first, second = (torch.cat([p.flatten() for p in n.parameters()]) for n in trained.networks)
    assert not torch.equal(first, second)
    assert all(not n.training and not p.requires_grad for n in trained.networks for p in n.parameters())


def test_the_batch_size_and_the_order_of_the_images_are_no_matter(material, trained) -> None:
    pixels = material.images.pixels[:50]
    usual = trained.probability(pixels)
    torch.testing.assert_close(trained.probability(pixels, 7), usual, atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.probability(pixels.flip(0)).flip(0), usual, atol=1e-5, rtol=0)
    assert trained.probability(pixels[:0]).shape == (0,)


def test_the_same_seed_gives_the_same_classifier_and_nothing_else_changes(material) -> None:
    state = torch.get_rng_state()
    before = material.images.pixels.clone(), material.patches.clone(), material.base.clone()
    one, again, other = (material.train(BRIEF, seed=seed) for seed in (0, 0, 1))
    torch.rand(5)
    pixels = material.images.pixels[:40]
    assert torch.equal(one.probability(pixels), again.probability(pixels))
    assert one.threshold == again.threshold
    assert not torch.equal(one.probability(pixels), other.probability(pixels))
    torch.set_rng_state(state)
    material.train(BRIEF)
    assert torch.equal(torch.get_rng_state(), state)
    after = material.images.pixels, material.patches, material.base
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_member_is_half_a_network_and_a_published_one_whole(material) -> None:
    ours = material.train(BRIEF).networks[0]
    published = material.train(replace(BRIEF, faithful=True)).networks[0]
    count = [sum(isinstance(part, nn.Conv2d) for part in network.modules()) for network in (ours, published)]
    assert count == [1 + 2 + 3, 1 + 2 + 3 * 3]
    # The most suspicious place decides, not the mean over all.
    image = torch.randn(1, 3, SIZE, SIZE, generator=generator())
    assert torch.equal(ours[:-1](image), ours[:-3](image).amax(dim=(2, 3)))


def test_it_works_without_innocent_patches_and_without_sources(material) -> None:
    nothing = torch.empty(0, 3, WINDOW, WINDOW, dtype=torch.uint8)
    found = material.train(BRIEF, benign_patches=nothing, positives=torch.empty(0, dtype=torch.int64))
    assert found.source_recall == 0 and found.threshold >= 0.5


def test_progress_counts_every_step(material) -> None:
    told: list[tuple[str, int, int]] = []
    material.train(BRIEF, progress=lambda *step: told.append(step))
    assert told == [("classifier", done, 6) for done in (1, 2, 3, 4, 5, 6, 6)]


# --- training images


def trainer(material: Material, **settings: object) -> module._Trainer:
    config = ClassifierConfig(batch_size=200, **settings)  # type: ignore[arg-type]
    return module._Trainer(
        material.images,
        material.base,
        material.patches,
        material.benign,
        config,
        torch.full((3,), 0.5),
        torch.full((3,), 0.25),
        torch.device("cpu"),
        torch.float32,
    )


def test_half_of_the_training_images_carry_the_trigger(material) -> None:
    batches = trainer(material)._batches(generator())
    views, labels = next(batches)
    assert views.shape == (200, 3, SIZE, SIZE) and views.min() >= 0 and views.max() <= 1
    assert labels.dtype == torch.int64 and 0.35 < labels.float().mean() < 0.65
    second, _ = next(batches)
    assert not torch.equal(views, second)


def test_hard_negatives_are_pasted_unless_faithful(material, monkeypatch) -> None:
    counts: list[int] = []

    def count(views: Tensor, *args: object, **kwargs: object) -> Tensor:
        counts.append(len(views))
        return views

    monkeypatch.setattr(module, "paste_resized", count)
    _, labels = next(trainer(material)._batches(generator()))
    assert 0.65 * 200 < counts.pop() < 0.85 * 200
    _, labels = next(trainer(material, faithful=True)._batches(generator()))
    assert counts.pop() == labels.sum()


def test_innocent_patches_are_of_three_kinds(material) -> None:
    triggers = material.patches[torch.arange(90) % 10]
    innocent = trainer(material)._innocent(triggers, WINDOW, generator())
    assert innocent.shape == triggers.shape and innocent.dtype == torch.uint8
    same_colours = (innocent.flatten(2).sort().values == triggers.flatten(2).sort().values).all(2).all(1)
    known = {tuple(p.flatten().tolist()) for p in material.benign}
    harmless = torch.tensor([tuple(p.flatten().tolist()) in known for p in innocent])
    assert not (same_colours & harmless).any()
    for kind in (same_colours, harmless, ~same_colours & ~harmless):
        assert 15 <= kind.sum() <= 45
    assert not (innocent == triggers).flatten(1).all(dim=1).any()


# --- pasting


def test_pasted_patches_keep_the_margin_and_reach_every_size_and_place() -> None:
    views, patches = torch.zeros(4000, 3, 16, 16), torch.ones(4000, 3, 5, 5)
    pasted = paste_resized(views, patches, (3, 7), 2, generator=generator())
    assert (views == 0).all() and pasted.shape == views.shape
    inside = pasted[:, 0] > 0
    area = inside.flatten(1).sum(1)
    assert sorted(set(area.tolist())) == [9, 16, 25, 36, 49]
    columns, rows = inside.any(1), inside.any(2)
    for axis in (columns, rows):
        assert not axis[:, :2].any() and not axis[:, -2:].any()
        assert axis[area == 9, 2].any() and axis[area == 49, 13].any()  # first and last place, inclusive
        assert torch.equal(axis.sum(1) ** 2, area)  # a whole square, not cut off


def test_a_patch_of_the_drawn_size_is_pasted_unchanged_upright_and_unmirrored() -> None:
    patches = torch.rand(50, 3, 6, 6, generator=generator(1))
    views = torch.rand(50, 3, 20, 20, generator=generator(2))
    pasted = paste_resized(views, patches, (6, 6), 1, generator=generator(3))
    for view, patch, result in zip(views, patches, pasted, strict=True):
        places = [
            (y, x)
            for y in range(1, 14)
            for x in range(1, 14)
            if torch.equal(result[:, y : y + 6, x : x + 6], patch)
        ]
        assert len(places) == 1
        (y, x) = places[0]
        restored = result.clone()
        restored[:, y : y + 6, x : x + 6] = view[:, y : y + 6, x : x + 6]
        assert torch.equal(restored, view)


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    board = ((torch.arange(12)[:, None] + torch.arange(12)) % 2).float().expand(20, 3, 12, 12)
    pasted = paste_resized(torch.full((20, 3, 12, 12), -1.0), board, (4, 4), 0, generator=generator())
    values = pasted[pasted >= 0]
    assert len(values) == 20 * 3 * 16 and values.min() > 0.25 and values.max() < 0.75


def test_a_patch_as_large_as_the_view_leaves_no_margin() -> None:
    pasted = paste_resized(torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 4, 4), (8, 30), 2, generator=generator())
    assert (pasted == 1).all()


# --- decisions


def test_f1_agrees_with_its_definition_and_is_no_nan() -> None:
    for seed in range(20):
        flagged = torch.rand(30, generator=generator(seed)) < 0.4
        truth = torch.rand(30, generator=generator(seed + 100)) < 0.3
        hits = int((flagged & truth).sum())
        precision, recall = hits / max(1, int(flagged.sum())), hits / max(1, int(truth.sum()))
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        assert module._f1(flagged, truth) == int(100 * f1 + 1e-9)
    nobody = torch.zeros(5, dtype=torch.bool)
    assert module._f1(nobody, nobody) == 0


def test_ten_equal_looks_end_the_training_but_never_at_zero() -> None:
    assert not module._is_steady([100] * 10)
    assert module._is_steady([100] * 11) and module._is_steady([3, *[90] * 10])
    assert not module._is_steady([0] * 30)
    assert not module._is_steady([100] * 9 + [99, 100])


def test_a_converged_member_stops_early(material, monkeypatch) -> None:
    looks = iter([0] * 15 + [7] + [80] * 10)
    monkeypatch.setattr(module, "_f1", lambda *_: next(looks))
    config = ClassifierConfig(networks=1, iterations=60, batch_size=8, width=4, evaluate_every=2)
    assert material.train(config).iterations == (2 * 26,)


def test_the_threshold_lets_the_allowed_share_of_innocent_images_pass() -> None:
    unpasted = torch.randn(1000, generator=generator(5)) + 1
    pasted = torch.full((1000,), 100.0)
    for rate in (0.0, 0.005, 0.05):
        threshold = module._choose_threshold(unpasted, pasted, rate)
        assert int((torch.sigmoid(unpasted) > threshold).sum()) <= rate * 1000
        assert threshold >= 0.5
    # Halfway between the sixth highest innocent image, five of a thousand being allowed, and the poisoned ones.
    sixth = float(unpasted.sort(descending=True).values[5])
    expected = torch.sigmoid(torch.tensor((sixth + 5) / 2))
    assert module._choose_threshold(unpasted, pasted / 2.5, 0.005) == pytest.approx(float(expected))
    assert module._choose_threshold(unpasted, -pasted, 0.005) == 0.5


def test_poison_among_the_held_out_images_does_not_lift_the_threshold_above_all_poison() -> None:
    clean, poison = torch.full((900,), -5.0), torch.full((100,), 8.0)
    pasted = torch.cat((torch.full((800,), 8.0), torch.full((200,), -2.0)))  # a fifth of the patches is wrong
    threshold = module._choose_threshold(torch.cat((clean, poison)), pasted, 0.005)
    assert threshold == pytest.approx(float(torch.sigmoid(torch.tensor(0.5))))
    assert module._choose_threshold(poison, pasted, 0.005) == pytest.approx(threshold)  # all of them


def test_faithful_decides_by_arg_max(material) -> None:
    config = ClassifierConfig(networks=1, iterations=2, batch_size=8, width=4, faithful=True)
    found = material.train(config)
    assert found.threshold == 0.5
    logits = found.networks[0](
        (material.images.pixels[:20] / 255 - found.mean.view(3, 1, 1)) / found.std.view(3, 1, 1)
    )
    assert torch.equal(found.probability(material.images.pixels[:20]) > 0.5, logits.argmax(dim=1) == 1)


def test_the_mean_of_the_logits_decides() -> None:
    class Fixed(nn.Module):
        def __init__(self, *logits: float) -> None:
            super().__init__()
            self.logits = torch.tensor(logits)

        def forward(self, images: Tensor) -> Tensor:
            return self.logits.expand(len(images), 2)

    found = PoisonClassifier(
        (Fixed(0.0, 3.0), Fixed(1.0, 0.0)),
        0.5,
        1.0,
        (1, 1),
        torch.zeros(3),
        torch.ones(3),
        torch.device("cpu"),
        torch.float32,
    )
    seen = found.probability(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    torch.testing.assert_close(seen, torch.tensor([0.5, 1.5]).softmax(0)[1].expand(2))


# --- settings and refusals


@pytest.mark.parametrize(
    ("size", "sides", "margin"), [(224, (20, 79), 10), (96, (9, 34), 4), (64, (6, 23), 3), (32, (3, 11), 1)]
)
def test_lengths_scale_with_the_image(size: int, sides: tuple[int, int], margin: int) -> None:
    assert ClassifierConfig().sides(size) == sides
    assert round(ClassifierConfig().margin * size) == margin


def test_the_published_settings() -> None:
    config = ClassifierConfig.published()
    assert (config.networks, config.iterations, config.batch_size, config.width) == (5, 2000, 32, 64)
    assert config.faithful and config.whole_images == 0 and config.learning_rate == 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": 0}, "networks=0: expected at least 1"),
        ({"iterations": 0}, "iterations=0: expected at least 1"),
        ({"batch_size": 1}, "batch_size=1: expected at least 2"),
        ({"evaluate_every": 0}, "evaluate_every=0: expected at least 1"),
        ({"whole_images": -0.1}, r"whole_images=-0.1: expected a share in \[0, 1\]"),
        ({"false_positive_rate": 2}, r"false_positive_rate=2: expected a share in \[0, 1\]"),
        ({"learning_rate": 0}, "learning_rate=0: expected a positive number"),
        ({"smallest_side": 0.5}, r"smallest_side=0.5, largest_side=0.35.*the smallest not above the largest"),
        ({"margin": 0.5}, r"margin=0.5: expected a share of the image's side in \[0, 0.5\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassifierConfig(**settings)  # type: ignore[arg-type]


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patches": bytes_of(2, 3, 8, 9)}, r"patches must be \(k, 3, w, w\) uint8, got \(2, 3, 8, 9\)"),
        ({"patches": torch.zeros(2, 3, 8, 8)}, r"patches must be \(k, 3, w, w\) uint8, got .* torch.float32"),
        ({"patches": bytes_of(0, 3, 9, 9)}, "patches are empty; the classifier needs at least one"),
        ({"patches": bytes_of(2, 3, 40, 40)}, "patches of 40 pixels do not fit images of 32 pixels"),
        ({"benign_patches": bytes_of(2, 1, 9, 9)}, r"benign_patches must be \(k, 3, w, w\) uint8"),
        ({"benign_patches": bytes_of(2, 3, 8, 8)}, "must have the side of the patches, 9, got 8"),
        ({"base_rows": torch.zeros(20)}, r"base_rows must be \(n,\) int64, got \(20,\) torch.float32"),
        ({"base_rows": torch.arange(395, 415)}, r"base_rows must lie in 0..399, got 395..414"),
        ({"positives": torch.tensor([-1])}, r"positives must lie in 0..399, got -1..-1"),
    ],
)
def test_what_does_not_fit_is_refused(material, changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        material.train(BRIEF, **changes)


def test_too_few_innocent_images_give_no_verdict(material) -> None:
    with pytest.raises(NoVerdictError, match="needs at least 10 images that are not suspected, got 9"):
        material.train(BRIEF, base_rows=torch.arange(9))


def test_a_loss_that_is_no_number_gives_no_verdict(material) -> None:
    config = ClassifierConfig(networks=1, iterations=8, batch_size=8, width=4, learning_rate=1e30)
    with pytest.raises(NoVerdictError, match="loss became (nan|inf); lower its learning rate"):
        material.train(config)


def test_images_of_another_shape_are_refused(trained) -> None:
    with pytest.raises(
        ShapeError, match=r"pixels must be \(N, 3, S, S\) uint8, got \(2, 3, 32, 32\) torch.float32"
    ):
        trained.probability(torch.zeros(2, 3, 32, 32))


def test_images_may_be_a_view_of_more(material) -> None:
    half = ImageSet(material.images.ids[:200], material.images.pixels[:200])
    base = (~material.poisoned[:200]).nonzero().flatten()
    assert material.train(BRIEF, images=half, base_rows=base, positives=base[:3]).threshold >= 0.5
