"""The confirmation: exact tests, patterns that recur, and a false-alarm rate that holds whatever the search did."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from toys import SIZE, planted_encoder, planted_images, planted_pattern, planted_patterns
from unpoison.encoders.encoder import Encoder
from unpoison.functional.clustering import kmeans
from unpoison.functional.matching import patch_similarity
from unpoison.functional.windows import crop_windows, paste_windows
from unpoison.records import Clusters, ImageSet
from unpoison.scan import confirm as module
from unpoison.scan.candidates import Candidates
from unpoison.scan.confirm import (
    MIN_SOURCES,
    Confirmation,
    Finalist,
    _show_part,
    binomial_tail,
    confirm,
    find_benign_patterns,
    find_finalists,
    holm,
)
from unpoison.scan.flip_test import Flips, FlipTest

WINDOW = 8

# --- Tests of numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trials", "rate"), [(1, 0.3), (7, 0.03), (20, 0.5), (60, 0.9)])
def test_the_tail_is_the_sum_of_its_terms(trials: int, rate: float) -> None:
    for hits in range(trials + 1):
        naive = sum(
            math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(hits, trials + 1)
        )
        assert binomial_tail(hits, trials, rate) == pytest.approx(naive, rel=1e-9)


def test_the_tail_is_that_of_a_statistics_library() -> None:
    stats = pytest.importorskip("scipy.stats")
    for hits, trials, rate in [(23, 500, 0.02), (1000, 1000, 0.03), (600, 1000, 0.5), (3, 10_000, 1e-4)]:
        assert binomial_tail(hits, trials, rate) == pytest.approx(
            stats.binom.sf(hits - 1, trials, rate), rel=1e-8
        )


def test_the_tail_at_its_ends() -> None:
    assert binomial_tail(0, 0, 0.1) == binomial_tail(-1, 5, 0.1) == 1
    assert binomial_tail(6, 5, 0.1) == 0
    assert binomial_tail(1, 5, 0.0) == 0 and binomial_tail(0, 5, 0.0) == 1
    assert binomial_tail(5, 5, 1.0) == 1 and binomial_tail(6, 5, 1.0) == 0
    assert 0 <= binomial_tail(5000, 5000, 0.01) < 1e-300  # too small for a float, and no error


def naive_holm(p_values: list[float]) -> list[float]:
    """Directly from the definition: the largest of the scaled values up to the own rank."""
    ranked = sorted(p_values)
    m = len(ranked)
    by_rank = [max(min(1.0, (m - j) * ranked[j]) for j in range(i + 1)) for i in range(m)]
    return [by_rank[ranked.index(p)] for p in p_values]


def test_holm_is_what_its_definition_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 7):
        p_values = (torch.rand(count, generator=generator) ** 3).tolist()
        assert holm(p_values) == pytest.approx(naive_holm(p_values))
    assert holm([]) == [] and holm([0.2]) == [0.2]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


# --- Finalists -------------------------------------------------------------------------------------------------------


def noise(n: int, side: int, seed: int) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def windows(patches: Tensor, *, gain: float = 0.5, control: float = 0.0) -> tuple[Candidates, ImageSet]:
    """A candidate for each patch, every one from its own noise image; all push to cluster 2 of 5."""
    n = len(patches)
    gains, controls = torch.zeros(n, 5), torch.zeros(n, 5)
    gains[:, 2], controls[:, 2] = gain, control
    flips = Flips(torch.full((n,), gain), gains, controls, torch.zeros(n, 4))
    found = Candidates(
        torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n, 2).long(), patches, flips
    )
    return found, ImageSet(tuple(map(str, range(n))), noise(n, 32, seed=9))


def finalist_of(members: Tensor, cluster: int) -> Finalist:
    """That leads to one cluster."""
    return Finalist(members, members, cluster, torch.tensor([cluster]))


def nowhere(candidates: Candidates) -> Tensor:
    """No direction to look along."""
    return candidates.flips.shift[:0]


def descending(n: int) -> Tensor:
    return torch.linspace(1, 0.1, n)


def test_a_pattern_cut_from_different_pictures_recurs() -> None:
    patches = noise(12, WINDOW, seed=0)
    patches[[1, 4, 5, 9, 11]] = planted_pattern()
    found, images = windows(patches)
    (finalist,) = find_finalists(found, descending(12), images, nowhere(found))
    assert finalist.members.tolist() == finalist.core.tolist() == [1, 4, 5, 9, 11]  # strongest first
    assert finalist.target_cluster == 2 and finalist.attractors.tolist() == [0, 2]  # 0: where the images lie


def test_members_are_ordered_by_score_whatever_their_place() -> None:
    patches = noise(8, WINDOW, seed=0)
    patches[[0, 1, 3, 4, 6]] = planted_pattern()
    found, images = windows(patches)
    (finalist,) = find_finalists(found, descending(8).flip(0), images, nowhere(found))
    assert finalist.members.tolist() == [6, 4, 3, 1, 0]


@pytest.mark.parametrize("carriers", range(7))
def test_it_takes_five_pictures(carriers: int) -> None:
    patches = noise(10, WINDOW, seed=1)
    patches[:carriers] = planted_pattern()
    found, images = windows(patches)
    assert len(find_finalists(found, descending(10), images, nowhere(found))) == int(carriers >= MIN_SOURCES)


def test_copies_of_one_picture_are_one_source() -> None:
    patches = noise(10, WINDOW, seed=1)
    patches[:6] = planted_pattern()
    found, images = windows(patches)
    pixels = images.pixels.clone()
    pixels[1] = pixels[0]
    pixels[2] = (pixels[0].float() * 0.9).to(torch.uint8)  # darker, still the same picture
    assert find_finalists(found, descending(10), ImageSet(images.ids, pixels), nowhere(found)) == []
    pixels[2] = images.pixels[2]
    (finalist,) = find_finalists(found, descending(10), ImageSet(images.ids, pixels), nowhere(found))
    assert finalist.members.tolist() == [0, 2, 3, 4, 5]  # of the copies the stronger one


def test_windows_that_merely_look_alike_are_none() -> None:
    """Edges of many colours: each like the next, none with the very pixels of four others."""
    bright = torch.arange(80, 240, 16).view(-1, 1, 1, 1)
    patches = torch.where(torch.arange(WINDOW).view(1, 1, -1, 1) < WINDOW // 2, 0, bright)
    patches = patches.expand(-1, 3, -1, WINDOW) + noise(len(bright), WINDOW, seed=3) // 20
    found, images = windows(patches.to(torch.uint8))
    assert bool((patch_similarity(found.patches) > 0.6).all())
    assert find_finalists(found, descending(len(bright)), images, nowhere(found)) == []


@pytest.mark.parametrize(("exact", "found_any"), [(6, False), (8, True)])
def test_of_many_that_resemble_a_pattern_more_than_a_few_must_show_its_pixels(
    exact: int, found_any: bool
) -> None:
    """Of 112 windows a sixteenth is seven."""
    other = torch.rand(112, 1, WINDOW, WINDOW, generator=torch.Generator().manual_seed(4)) < 0.25
    other[:exact] = False
    patches = torch.where(other, noise(112, WINDOW, seed=5), planted_pattern())
    found, images = windows(patches)
    finalists = find_finalists(found, descending(112), images, nowhere(found))
    assert [len(f.members) for f in finalists] == [112] * found_any
    assert all(len(f.core) == exact for f in finalists)


def test_crops_of_one_picture_share_what_they_show() -> None:
    """The same pixels recur, and so does what is around them: nothing was pasted."""
    scene = F.interpolate(noise(1, 16, seed=6).float(), 64, mode="bilinear")[0].to(torch.uint8)
    places = torch.tensor([(y, x) for y in (4, 8, 12) for x in (5, 9, 13)])
    crops = torch.stack([scene[:, y : y + 32, x : x + 32] for y, x in places.tolist()])
    corners = 24 - places  # always the same part of the scene
    found, _ = windows(crop_windows(crops, corners, WINDOW))
    found = replace(found, corners=corners)
    assert bool((found.patches == found.patches[:1]).all())
    images = ImageSet(tuple(map(str, range(9))), crops)
    assert find_finalists(found, descending(9), images, nowhere(found)) == []
    pasted = paste_windows(noise(9, 32, seed=7), found.patches, corners)
    (finalist,) = find_finalists(found, descending(9), ImageSet(images.ids, pasted), nowhere(found))
    assert len(finalist.core) == 9


def test_flat_patches_are_no_pattern() -> None:
    patches = noise(10, WINDOW, seed=1)
    patches[:6] = torch.tensor([40, 80, 200], dtype=torch.uint8).view(3, 1, 1)
    found, images = windows(patches)
    assert find_finalists(found, descending(10), images, nowhere(found)) == []


@pytest.mark.parametrize(("gain", "control"), [(0.0, 0.0), (-0.1, 0.0), (0.4, 0.5)])
def test_a_pattern_that_gains_nothing_over_its_control_is_none(gain: float, control: float) -> None:
    found, images = windows(planted_pattern().repeat(5, 1, 1, 1), gain=gain, control=control)
    assert find_finalists(found, descending(5), images, nowhere(found)) == []


def test_a_pattern_behind_a_crowd_of_another_is_seen() -> None:
    """The strongest windows are all of one trigger, and all directions point its way."""
    patches = noise(200, WINDOW, seed=2)
    patches[:130] = planted_pattern(1)
    patches[[140, 150, 160, 170, 180, 190]] = planted_pattern(2)
    found, images = windows(patches)
    finalists = find_finalists(found, descending(200), images, torch.tensor([[1.0, 0, 0, 0]]))
    assert [len(f.members) for f in finalists] == [120, 6]
    assert finalists[1].members.tolist() == [140, 150, 160, 170, 180, 190]
    assert len(find_finalists(found, descending(200), images, nowhere(found), most=1)) == 1
    # Where no pattern crowds the others out, the strongest windows are all that is compared.
    patches[:130] = noise(130, WINDOW, seed=3)
    patches[:50] = planted_pattern(1)
    found, images = windows(patches)
    assert [len(f.members) for f in find_finalists(found, descending(200), images, nowhere(found))] == [50]


def test_a_pattern_that_shares_a_corner_with_the_crowd_is_another_one() -> None:
    first, second = planted_pattern(1), planted_pattern(2)
    corner = WINDOW // 2
    second[..., :corner, :corner] = first[..., -corner:, -corner:]
    patches = noise(200, WINDOW, seed=2)
    patches[:130] = first
    patches[[140, 150, 160, 170, 180, 190]] = second
    assert bool(_show_part(second[None], first[None]).all())  # by that corner alone
    found, images = windows(patches)
    finalists = find_finalists(found, descending(200), images, nowhere(found))
    assert [len(f.members) for f in finalists] == [120, 6]


def test_several_patterns_the_most_frequent_first_and_no_more_than_asked() -> None:
    patches = noise(14, WINDOW, seed=2)
    patches[[0, 2, 4, 6, 8]] = planted_pattern(1)
    patches[[1, 3, 5, 7, 9, 11, 13]] = planted_pattern(2)
    found, images = windows(patches)
    finalists = find_finalists(found, descending(14), images, nowhere(found))
    assert [f.members.tolist() for f in finalists] == [[1, 3, 5, 7, 9, 11, 13], [0, 2, 4, 6, 8]]
    assert len(find_finalists(found, descending(14), images, nowhere(found), most=1)) == 1


def test_a_strong_trigger_does_not_crowd_out_a_weaker_one() -> None:
    """140 images carry the one, more than are compared, and all of them outrank the 40 that carry the other."""
    generator = torch.Generator().manual_seed(0)
    which = (torch.arange(180) >= 140).long()
    pixels = F.interpolate(torch.rand(180, 3, 4, 4, generator=generator) * 255, SIZE, mode="bilinear")
    corners = torch.randint(0, SIZE - 10, (180, 2), generator=generator)
    stamped = paste_windows(pixels.to(torch.uint8), planted_patterns(2)[which], corners + 1)
    gain = torch.zeros(180, 12)
    gain[torch.arange(180), which] = torch.tensor([0.9, 0.4])[which]
    flips = Flips(gain.sum(dim=1), gain, torch.zeros_like(gain), gain)
    found = Candidates(
        torch.arange(180), torch.full((180,), 5), corners, crop_windows(stamped, corners, 10), flips
    )
    images = ImageSet(tuple(map(str, range(180))), stamped)
    for known in range(3):  # directions: none, the strong trigger's, both
        finalists = find_finalists(found, gain.sum(dim=1), images, torch.eye(12)[:known])
        assert [(f.target_cluster, len(f.members)) for f in finalists] == [(0, 120), (1, 40)]


def test_every_cluster_that_gains_a_quarter_attracts() -> None:
    found, images = windows(planted_pattern().repeat(5, 1, 1, 1), gain=0.4)
    found.flips.gain[:, 4] = 0.1
    found.flips.gain[:, 3] = 0.09
    (finalist,) = find_finalists(found, descending(5), images, nowhere(found))
    assert finalist.target_cluster == 2 and finalist.attractors.tolist() == [0, 2, 4]


def test_clusters_that_hold_a_tenth_of_the_sources_attract() -> None:
    """Flip images sit in the middle of their clusters; those that moved may show one of a trigger's clusters only."""
    found, images = windows(planted_pattern().repeat(20, 1, 1, 1))
    own = torch.tensor([2] * 17 + [1] * 2 + [3])
    (finalist,) = find_finalists(replace(found, own=own), descending(20), images, nowhere(found))
    assert finalist.target_cluster == 2 and finalist.attractors.tolist() == [1, 2]


# --- What recurs and steers nothing ----------------------------------------------------------------------------------


def overlaid(*, carriers: int = 6, gain: float = 0.02, control: float = 0.0) -> tuple[Candidates, ImageSet]:
    """20 windows of noise, of which so many, and not the strongest, show the same pixels."""
    patches = noise(20, WINDOW, seed=2)
    patches[20 - carriers :] = planted_pattern()
    return windows(patches, gain=gain, control=control)


def test_pixels_that_recur_and_steer_nothing_are_named() -> None:
    found, images = overlaid()
    (overlay,) = find_benign_patterns(found, images, [])
    assert sorted(overlay.members.tolist()) == list(range(14, 20))
    assert overlay.flip_rate == pytest.approx(0.02) and overlay.control_rate == 0


def test_windows_that_frame_an_overlay_each_in_its_own_way_are_one_pattern() -> None:
    picture = noise(1, 24, seed=5)[0]
    patches = noise(20, WINDOW, seed=2)
    for number, (top, left) in enumerate([(8, 8), (7, 8), (8, 9), (9, 8), (8, 7), (9, 9)]):
        patches[3 * number] = picture[:, top : top + WINDOW, left : left + WINDOW]
    (overlay,) = find_benign_patterns(*windows(patches, gain=0.0), [])
    assert sorted(overlay.members.tolist()) == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("steering", [{"gain": 0.06}, {"gain": 0.3, "control": 0.29}])
def test_what_steers_by_its_pattern_or_its_colours_is_no_overlay(steering: dict[str, float]) -> None:
    assert find_benign_patterns(*overlaid(**steering), []) == []


@pytest.mark.parametrize("carriers", range(7))
def test_an_overlay_needs_five_pictures(carriers: int) -> None:
    assert len(find_benign_patterns(*overlaid(carriers=carriers), [])) == int(carriers >= 5)


def test_an_overlay_on_copies_of_one_picture_is_none() -> None:
    found, images = overlaid()
    images.pixels[14:] = images.pixels[14]
    assert find_benign_patterns(found, images, []) == []


def test_windows_that_show_a_part_of_a_confirmed_trigger_are_no_overlay() -> None:
    """They steer less than the trigger, and would else be listed beside it as harmless."""
    patches = noise(20, WINDOW, seed=2)
    patches[:3] = planted_pattern()
    patches[12:18] = planted_pattern().roll(3, dims=2)
    patches[12:18, :, :3] = noise(1, WINDOW, seed=8)[:, :, :3]
    found, images = windows(patches, gain=0.02)
    assert len(find_benign_patterns(found, images, [])) == 1
    trigger = finalist_of(torch.arange(3), 2)
    assert find_benign_patterns(found, images, [trigger]) == []


def test_of_very_many_candidates_evenly_chosen_ones_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMPARED_FOR_OVERLAYS", 10)
    patches = planted_pattern().expand(40, -1, -1, -1).clone()
    (overlay,) = find_benign_patterns(*windows(patches, gain=0.0), [])
    assert len(overlay.members) == 10 and {0, 39} <= set(overlay.members.tolist())


# --- Confirmation ----------------------------------------------------------------------------------------------------


class Scene:
    """A toy data set, its clusters, and the windows that hold the trigger."""

    def __init__(self, *, planted: bool = True) -> None:
        self.images, boxes = planted_images(240, 24, torch.Generator().manual_seed(3))
        self.encoder: Encoder = planted_encoder(planted=planted)
        features = F.normalize(self.encoder.features(self.images.pixels), dim=1)
        found = kmeans(features, 12, generator=torch.Generator().manual_seed(0))
        self.clusters = Clusters(found.centroids, found.assignment)
        carriers = torch.tensor([self.images.ids.index(name) for name in boxes])
        order = torch.randperm(240, generator=torch.Generator().manual_seed(1))
        self.held_out, rest = order[:80], order[80:]
        self.flip_test = FlipTest.draw(
            self.encoder,
            self.images,
            self.clusters,
            rest[:32],
            WINDOW,
            generator=torch.Generator().manual_seed(2),
            with_control=True,
            batch_size=256,
        )
        self.rows = carriers[torch.isin(carriers, rest)]
        corners = torch.tensor(
            [(boxes[self.images.ids[r]].y, boxes[self.images.ids[r]].x) for r in self.rows]
        )
        patches = crop_windows(self.images.pixels[self.rows], corners, WINDOW)
        flips = self.flip_test.run(patches, generator=torch.Generator().manual_seed(4))
        own = self.clusters.assignment[self.rows]
        self.candidates = Candidates(self.rows, own, corners, patches, flips)

    def confirm(self, finalists: list[Finalist], *, batch_size: int = 256) -> list[Confirmation]:
        return confirm(
            self.encoder,
            self.images,
            self.clusters,
            self.candidates,
            finalists,
            self.held_out,
            self.flip_test,
            alpha=0.01,
            generator=torch.Generator().manual_seed(5),
            batch_size=batch_size,
        )


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


def test_a_planted_trigger_is_confirmed(scene: Scene) -> None:
    finalists = find_finalists(
        scene.candidates, descending(len(scene.rows)), scene.images, nowhere(scene.candidates)
    )
    assert len(finalists) == 1 and len(finalists[0].members) >= MIN_SOURCES
    (said,) = scene.confirm(finalists)
    assert said.flip_rate == 1 and said.control_rate == 0
    assert said.p_value < 1e-12 and said.tau == module.SMALLEST_RATE
    own = torch.isin(scene.clusters.assignment[scene.held_out], finalists[0].attractors)
    assert said.n_images == 80 - int(own.sum())  # images that live there already cannot be moved there


def test_the_same_pattern_means_nothing_to_an_encoder_without_the_backdoor() -> None:
    scene = Scene(planted=False)
    everyone = torch.arange(len(scene.rows))
    for cluster in (0, 5, 11):
        (said,) = scene.confirm([finalist_of(everyone, cluster)])
        assert said.p_value > 0.05 and said.flip_rate < 0.2


def test_many_finalists_are_corrected_for(scene: Scene) -> None:
    (finalist,) = find_finalists(
        scene.candidates, descending(len(scene.rows)), scene.images, nowhere(scene.candidates)
    )
    other = next(k for k in range(12) if k not in finalist.attractors.tolist())
    useless = finalist_of(finalist.members, other)
    said = scene.confirm([useless, finalist, useless])
    assert said[0].p_value == said[2].p_value == 1 and said[1].p_value < 1e-10
    assert said[1].p_value == pytest.approx(3 * binomial_tail(said[1].n_images, said[1].n_images, 0.05))


def test_batches_do_not_matter(scene: Scene) -> None:
    finalists = find_finalists(
        scene.candidates, descending(len(scene.rows)), scene.images, nowhere(scene.candidates)
    )
    assert scene.confirm(finalists) == scene.confirm(finalists, batch_size=7)


def test_nothing_to_confirm_costs_nothing(scene: Scene) -> None:
    before = scene.encoder.images_shown
    assert scene.confirm([]) == [] and scene.encoder.images_shown == before


def test_where_everyone_lives_at_the_target_nothing_is_claimed(scene: Scene) -> None:
    (said,) = scene.confirm([replace(finalist_of(torch.tensor([0]), 0), attractors=torch.arange(12))])
    assert (said.n_images, said.flip_rate, said.p_value) == (0, 0, 1)


def benign_flips(net: float) -> tuple[Tensor, Flips]:
    """64 windows that each bring this share of the images to every one of 12 clusters, over their controls."""
    gain = torch.full((64, 12), net)
    windows = torch.zeros(64, 3, WINDOW, WINDOW, dtype=torch.uint8)
    return windows, Flips(torch.zeros(64), gain, torch.zeros_like(gain), torch.zeros(64, 2))


@pytest.mark.parametrize(("benign", "tau"), [(0.0, 0.05), (0.01, 0.05), (0.1, 0.2), (-0.1, 0.05)])
def test_what_has_to_be_exceeded_is_twice_what_benign_windows_do_and_never_less_than_the_floor(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, benign: float, tau: float
) -> None:
    monkeypatch.setattr(module, "_benign_flips", lambda *_: benign_flips(benign))
    (said,) = scene.confirm([finalist_of(torch.tensor([0]), 0)])
    assert said.tau == pytest.approx(tau)


@pytest.mark.parametrize("null", ["moves tau of the images", "moves as many as its control"])
def test_false_alarms_stay_below_alpha(scene: Scene, monkeypatch: pytest.MonkeyPatch, null: str) -> None:
    """Invariant 10, through the code that decides; only the encoder's answers are simulated, at the null's edge."""
    runs, alpha, tau, n_finalists = 2000, 0.05, 0.1, 3
    generator = torch.Generator().manual_seed(7)

    def answers(
        encoder: Encoder, images: ImageSet, clusters: Clusters, patch: Tensor, rows: Tensor, *_, **__
    ):
        draw = torch.rand(2, len(rows), generator=generator)
        if null == "moves tau of the images":
            return draw[0] < tau, torch.zeros(len(rows), dtype=torch.bool)
        return draw[0] < 0.4, draw[1] < 0.4

    monkeypatch.setattr(module, "_paste_pairs", answers)
    monkeypatch.setattr(module, "_benign_flips", lambda *_: benign_flips(tau / 2))
    monkeypatch.setattr(module, "_unlike", lambda windows, _: torch.ones(len(windows), dtype=torch.bool))
    finalists = [finalist_of(torch.tensor([0]), k) for k in range(n_finalists)]
    alarms = sum(min(said.p_value for said in scene.confirm(finalists)) <= alpha for _ in range(runs))
    margin = 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert 0 < alarms / runs <= alpha + margin


def test_a_patch_that_steers_by_colour_alone_is_told_apart(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patch and control both move most images: no pattern is confirmed, but the steering is striking."""

    def answers(
        encoder: Encoder,
        images: ImageSet,
        clusters: Clusters,
        patch: Tensor,
        rows: Tensor,
        *_: object,
        **__: object,
    ) -> tuple[Tensor, Tensor]:
        moved = torch.arange(len(rows)) % 3 > 0
        return moved, moved.flip(0)

    monkeypatch.setattr(module, "_paste_pairs", answers)
    monkeypatch.setattr(module, "_benign_flips", lambda *_: benign_flips(0.01))
    (said,) = scene.confirm([finalist_of(torch.tensor([0]), 0)])
    assert said.p_value > 0.1
    assert said.steering_p_value < 1e-6


def test_the_threshold_counts_no_window_that_shows_a_pattern() -> None:
    """Else a fifth of poisoned images lifts it to what the trigger does, and several triggers hide each other."""
    generator = torch.Generator().manual_seed(0)
    first = planted_pattern()[None]
    second = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=generator)
    innocent = torch.randint(0, 256, (14, 3, 8, 8), dtype=torch.uint8, generator=generator)
    windows = torch.cat((innocent, first, first.roll(3, dims=3)))
    assert module._unlike(windows, [first]).tolist() == [True] * 14 + [False] * 2
    both = torch.cat((windows, second))
    assert module._unlike(both, [first, second]).tolist() == [True] * 14 + [False] * 3
    # What many random windows show is part of ordinary pictures.
    assert module._unlike(windows[4:], [first]).tolist() == [True] * 12
    assert module._unlike(both[4:], [first, second]).tolist() == [True] * 12 + [False]
