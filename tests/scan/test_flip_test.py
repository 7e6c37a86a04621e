"""The flip test: a twin that pastes one patch on one image at a time, and what must come out exactly zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from toys import SIZE, planted_encoder, planted_images, planted_pattern
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import extract_features
from unpoison.functional.clustering import assign, kmeans
from unpoison.functional.sequential import DROPPED, SequentialTest
from unpoison.functional.windows import crop_windows, paste_windows
from unpoison.records import Clusters, ImageSet
from unpoison.scan.flip_test import Flips, FlipTest, draw_corners, nearest_rows, shuffle_blocks

WINDOW = 9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy() -> tuple[Encoder, ImageSet, Tensor, Clusters, Tensor]:
    """Encoder, images, features, clusters, and which images carry the trigger."""
    images, boxes = planted_images(160, 20, generator(3))
    encoder = planted_encoder()
    features = extract_features(encoder, images).values
    poisoned = torch.tensor([i in boxes for i in images.ids])
    return encoder, images, features, kmeans(features, 12, generator=generator()), poisoned


def flip_test(toy, rows: Tensor, *, with_control: bool = False, batch_size: int = 50) -> FlipTest:
    encoder, images, _, clusters, _ = toy
    return FlipTest.draw(
        encoder,
        images,
        clusters,
        rows,
        WINDOW,
        generator=generator(1),
        with_control=with_control,
        batch_size=batch_size,
    )


def some_patches(images: ImageSet, n: int = 5) -> Tensor:
    corners = draw_corners(n, SIZE, WINDOW, generator=generator(2))
    return crop_windows(images.pixels[:n], corners, WINDOW)


def trigger_patch() -> Tensor:
    patch = torch.full((1, 3, WINDOW, WINDOW), 128, dtype=torch.uint8)
    patch[0, :, :8, :8] = planted_pattern()
    return patch


def test_it_agrees_with_its_twin(toy) -> None:
    encoder, images, _, clusters, poisoned = toy
    rows = (~poisoned).nonzero().flatten()[:14]
    test = flip_test(toy, rows, with_control=True)
    patches = torch.cat((some_patches(images), trigger_patch()))
    seen = test.run(patches, generator=generator(4))
    controls = shuffle_blocks(patches, generator=generator(4))

    def one(picture: Tensor, patch: Tensor | None, corner: tuple[int, int]) -> tuple[Tensor, int]:
        picture = picture.clone()
        if patch is not None:
            for y in range(WINDOW):
                for x in range(WINDOW):
                    picture[:, corner[0] + y, corner[1] + x] = patch[:, y, x]
        feature = F.normalize(encoder.features(picture[None])[0], dim=0)
        return feature, max(range(12), key=lambda k: float(feature @ clusters.centroids[k]))

    corners = [(int(y), int(x)) for y, x in test.flip_set.corners]
    for p, (patch, control) in enumerate(zip(patches, controls, strict=True)):
        plain = [one(images.pixels[r], None, c) for r, c in zip(rows, corners, strict=True)]
        pasted = [one(images.pixels[r], patch, c) for r, c in zip(rows, corners, strict=True)]
        shuffled = [one(images.pixels[r], control, c) for r, c in zip(rows, corners, strict=True)]
        changed = sum(a[1] != b[1] for a, b in zip(plain, pasted, strict=True))
        assert float(seen.changed[p]) == pytest.approx(changed / 14, abs=1e-6)
        for cluster in range(12):
            before = sum(a[1] == cluster for a in plain)
            gain = sum(a[1] == cluster for a in pasted) - before
            control_gain = sum(a[1] == cluster for a in shuffled) - before
            assert float(seen.gain[p, cluster]) == pytest.approx(gain / 14, abs=1e-6)
            assert float(seen.control_gain[p, cluster]) == pytest.approx(control_gain / 14, abs=1e-6)
        difference = [a[0] - b[0] for a, b in zip(pasted, shuffled, strict=True)]
        torch.testing.assert_close(seen.shift[p], torch.stack(difference).mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_control", [False, True])
def test_a_patch_equal_to_the_pixels_below_it_changes_nothing(toy, with_control) -> None:
    encoder, images, _, clusters, _ = toy
    test = flip_test(toy, torch.arange(30), with_control=with_control)
    patch = some_patches(images, 1)
    below = paste_windows(test.flip_set.pixels, patch.expand(30, -1, -1, -1), test.flip_set.corners)
    pasted = ImageSet(tuple(map(str, range(30))), below)
    same = FlipTest.draw(
        encoder,
        pasted,
        clusters,
        torch.arange(30),
        WINDOW,
        generator=generator(1),  # the same corners again
        with_control=with_control,
        batch_size=64,
    )
    flips = same.run(patch, generator=generator())
    own = torch.tensor([3])
    assert float(flips.score("any", own)) == 0 and float(flips.score("source", own)) == 0
    assert (flips.gain == 0).all()
    # A control can only take away from what the patch itself gained, which is nothing.
    assert float(flips.score("concentrated", own)) <= 0
    if not with_control:
        assert float(flips.score("concentrated", own)) == 0
        torch.testing.assert_close(flips.shift, torch.zeros_like(flips.shift), atol=1e-6, rtol=0)


def test_the_planted_trigger_moves_all_and_its_control_none(toy) -> None:
    _, _, _, clusters, poisoned = toy
    attractor = int(clusters.assignment[poisoned].mode().values)
    rows = torch.arange(48)
    members = float(
        (clusters.assignment[rows][:, None] == clusters.assignment[poisoned].unique()).any(1).float().mean()
    )
    flips = flip_test(toy, rows, with_control=True).run(trigger_patch(), generator=generator())
    assert float(flips.changed) == pytest.approx(1 - members, abs=1e-6)
    assert float(flips.score("concentrated", torch.tensor([0]))) > 0.5
    assert int(flips.gain.argmax()) == attractor
    assert float(flips.control_gain[0, attractor]) <= 0.1
    assert int(flips.shift.abs().argmax()) == 0  # e_0, the planted feature


@pytest.mark.parametrize("batch_size", [1, 30, 31, 400])
def test_the_batch_size_is_no_matter(toy, batch_size) -> None:
    patches = torch.cat((some_patches(toy[1], 4), trigger_patch()))
    usual = flip_test(toy, torch.arange(30), with_control=True).run(patches, generator=generator())
    other = flip_test(toy, torch.arange(30), with_control=True, batch_size=batch_size)
    seen = other.run(patches, generator=generator())
    for name in ("changed", "gain", "control_gain"):
        assert torch.equal(getattr(seen, name), getattr(usual, name))
    torch.testing.assert_close(seen.shift, usual.shift, atol=1e-5, rtol=0)


def test_it_leaves_everything_as_it_was_and_needs_no_global_draws(toy) -> None:
    patches, state = some_patches(toy[1]), torch.get_rng_state()
    before, pixels = patches.clone(), toy[1].pixels.clone()
    flip_test(toy, torch.arange(10), with_control=True).run(patches, generator=generator())
    assert torch.equal(patches, before) and torch.equal(toy[1].pixels, pixels)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_three_scores() -> None:
    gain = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.3, -0.3]])
    control = torch.tensor([[0.4, 0.0, -0.2], [0.0, -0.1, 0.0]])
    flips = Flips(torch.tensor([0.6, 0.3]), gain, control, torch.zeros(2, 4))
    own = torch.tensor([1, 1])
    torch.testing.assert_close(flips.score("any", own), torch.tensor([0.6, 0.3]))
    torch.testing.assert_close(flips.score("source", own), torch.tensor([-0.2, 0.3]))
    # Net of the control, which can only lower a gain: 0.5 - 0.4 and 0.1; 0.3.
    torch.testing.assert_close(flips.score("concentrated", own), torch.tensor([0.1, 0.3]))


def test_corners_reach_both_borders_and_no_further() -> None:
    corners = draw_corners(2000, 12, 9, generator=generator())
    assert corners.unique().tolist() == [0, 1, 2, 3]
    assert draw_corners(3, 9, 9, generator=generator()).unique().tolist() == [0]


@pytest.mark.parametrize(("side", "block"), [(9, 1), (17, 1), (26, 2), (60, 5)])
def test_shuffling_keeps_the_blocks_and_loses_the_pattern(side: int, block: int) -> None:
    patches = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator(5))
    before = patches.clone()
    shuffled = shuffle_blocks(patches, generator=generator(6))
    assert torch.equal(patches, before) and not torch.equal(shuffled, patches)

    def blocks(patch: Tensor) -> list[tuple[int, ...]]:
        used = side // block * block
        return sorted(
            tuple(patch[:, y : y + block, x : x + block].flatten().tolist())
            for y in range(0, used, block)
            for x in range(0, used, block)
        )

    for old, new in zip(patches, shuffled, strict=True):
        assert blocks(old) == blocks(new)
        used = side // block * block
        assert torch.equal(old[:, used:], new[:, used:]) and torch.equal(old[:, :, used:], new[:, :, used:])
    assert block <= max(1, side // 12)


def naive_nearest(features: Tensor, clusters: Clusters, allowed: Tensor) -> dict[int, list[int]]:
    best: dict[int, list[int]] = {}
    for cluster in range(len(clusters.centroids)):
        members = [i for i in range(len(features)) if allowed[i] and int(clusters.assignment[i]) == cluster]
        best[cluster] = sorted(members, key=lambda i: -float(features[i] @ clusters.centroids[cluster]))
    return best


@pytest.mark.parametrize("count", [3, 12, 24, 30])
def test_nearest_rows_take_the_same_number_of_every_cluster(toy, count) -> None:
    _, _, features, clusters, _ = toy
    allowed = torch.rand(160, generator=generator(7)) < 0.8
    rows = nearest_rows(features, clusters, allowed, count, generator=generator())
    assert len(rows) == count == len(set(rows.tolist())) and allowed[rows].all()
    expected = naive_nearest(features, clusters, allowed)
    taken = {c: [r for r in rows.tolist() if int(clusters.assignment[r]) == c] for c in range(12)}
    most = max(map(len, taken.values()))
    assert most >= math.ceil(count / 12)
    for cluster, own in taken.items():
        assert own == expected[cluster][: len(own)]
        assert len(own) >= min(len(expected[cluster]), most - 1)


def test_nearest_rows_end_with_the_images_there_are(toy) -> None:
    _, _, features, clusters, _ = toy
    allowed = torch.zeros(160, dtype=torch.bool)
    allowed[[4, 9, 11]] = True
    rows = nearest_rows(features, clusters, allowed, 50, generator=generator())
    assert sorted(rows.tolist()) == [4, 9, 11]


def test_the_baseline_is_the_images_own_clusters(toy) -> None:
    _, _, features, clusters, _ = toy
    rows = torch.arange(20)
    test = flip_test(toy, rows)
    assert torch.equal(test.flip_set.assignment, assign(features[:20], clusters.centroids))
    shares = torch.bincount(clusters.assignment[:20], minlength=12) / 20
    torch.testing.assert_close(test.baseline[0] / len(rows), shares)


# --- the race


def race_of(
    toy, test: SequentialTest, patches: Tensor, kind: str = "concentrated"
) -> tuple[Flips, Flips, int, int]:
    """Flips of a race and of the whole flip set, and the passes of each."""
    poisoned = toy[4]
    rows = (~poisoned).nonzero().flatten()[:48]
    racing = flip_test(toy, rows, with_control=True, batch_size=1000)
    start = toy[0].images_shown
    order = torch.randperm(48, generator=generator(7))
    raced = racing.race(patches, kind=kind, order=order, generator=generator(4), test=test)
    middle = toy[0].images_shown
    whole = racing.run(patches, generator=generator(4))
    return raced, whole, middle - start, toy[0].images_shown - middle


@pytest.mark.parametrize("kind", ["concentrated", "any", "source"])
def test_survivors_of_a_race_have_the_flips_of_the_whole_set(toy, kind: str) -> None:
    patches = torch.cat((some_patches(toy[1], 20), trigger_patch()))
    test = SequentialTest(null_rate=0.0, rate=0.5, alpha=0.0, beta=0.05, batch=8)
    raced, whole, passes, exhaustive = race_of(toy, test, patches, kind)
    own = torch.zeros(21, dtype=torch.int64)
    mine, theirs = (f.score(kind, own) for f in (raced, whole))
    assert passes < 0.6 * exhaustive
    for name in ("changed", "gain", "control_gain", "shift"):  # of the trigger, which comes last
        torch.testing.assert_close(getattr(raced, name)[-1], getattr(whole, name)[-1], atol=1e-6, rtol=0)
    strong = theirs >= test.rate
    torch.testing.assert_close(mine[strong], theirs[strong], atol=1e-6, rtol=0)
    if kind != "source":
        assert int(mine.argmax()) == 20 and bool(strong[20])


def test_a_race_without_errors_is_the_whole_flip_test(toy) -> None:  # invariant 9
    patches = torch.cat((some_patches(toy[1]), trigger_patch()))
    raced, whole, passes, exhaustive = race_of(toy, SequentialTest(alpha=0.0, beta=0.0), patches)
    assert passes == exhaustive
    for name in ("changed", "gain", "control_gain", "shift"):
        torch.testing.assert_close(getattr(raced, name), getattr(whole, name), atol=1e-6, rtol=0)


def test_misses_of_a_race_stay_below_beta_over_the_orders(toy) -> None:
    """A patch that moves just the rate, over many orders of the same flip images."""
    racing = flip_test(toy, (~toy[4]).nonzero().flatten()[:48], with_control=True)
    base = racing.flip_set.assignment
    target = int(base.mode().values) ^ 1
    away = (base != target).nonzero().flatten()[:10]  # a fifth of 48 images, and no image less
    after = racing.flip_set.features.clone()
    after[away] = racing.centroids[target]
    test = SequentialTest(null_rate=0.0, rate=0.2, alpha=0.0, beta=0.05, batch=8)
    missed = 0
    for seed in range(1000):
        order = torch.randperm(48, generator=generator(seed))
        for look in test.looks(48):
            hits = racing._hits(after[order[:look]][None], None, order[:look], "concentrated")
            if int(test.decide(hits, look, 48)) == DROPPED:
                missed += 1
                break
    assert missed <= 1000 * 0.05 + 3 * math.sqrt(1000 * 0.05 * 0.95)
