"""The search: how many images it looks at, whom it drops, how it votes, and the planted poison first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from toys import planted_encoder, planted_images
from unpoison.encoders.extract import extract_features
from unpoison.functional.clustering import kmeans
from unpoison.records import Box, Clusters, ImageSet
from unpoison.runtime import silent, stage_generator
from unpoison.scan.candidates import Candidates
from unpoison.scan.config import ScanConfig
from unpoison.scan.flip_test import RACE, Flips, FlipTest, nearest_rows
from unpoison.scan.poisoncam import MaskAttention
from unpoison.scan.search import Searcher, directed_scores, elect, n_scored, vote

WINDOW = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plainly(_name: str, compute: Callable[[], Candidates]) -> Candidates:
    return compute()


# --- the schedule, with an attention and a flip test that know nothing


class NoAttention:
    def heat(self, pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels), 8, 8)

    def heat_along(self, pixels: Tensor, directions: Tensor) -> Tensor:
        return torch.zeros(len(pixels), len(directions), 8, 8)

    def windows(self, heat: Tensor) -> Tensor:
        return torch.zeros(len(heat), 2, dtype=torch.int64)


class ByColour:
    """A flip test whose every score is the first pixel of the patch, as a share."""

    def __init__(self, n_clusters: int) -> None:
        self.n_clusters = n_clusters

    def run(self, patches: Tensor, *, generator: torch.Generator) -> Flips:
        score = patches[:, 0, 0, 0].float() / 255
        gain = score[:, None].expand(-1, self.n_clusters)
        return Flips(score, gain, torch.zeros_like(gain), score[:, None] * torch.eye(4)[:1])


def plain_searcher(n_clusters: int, per_cluster: int, colours: Tensor, **settings: object) -> Searcher:
    """`colours` (N,) uint8 is the score of each image; images take turns through the clusters."""
    n = n_clusters * per_cluster
    pixels = colours.view(n, 1, 1, 1).expand(n, 3, 8, 8).contiguous()
    images = ImageSet(tuple(map(str, range(n))), pixels)
    clusters = Clusters(torch.zeros(n_clusters, 4), torch.arange(n) % n_clusters)
    config = ScanConfig(window=3, clusters=n_clusters, **settings).resolve(n, 8)  # type: ignore[arg-type]
    return Searcher(
        images,
        clusters,
        NoAttention(),
        ByColour(n_clusters),  # type: ignore[arg-type]
        config,
        torch.ones(n, dtype=torch.bool),
        lambda step: stage_generator(0, step),
        silent,
    )


@pytest.mark.parametrize(("n_clusters", "scored"), [(100, 826), (500, 4052), (1000, 8054), (2000, 16032)])
def test_the_published_schedule(n_clusters: int, scored: int) -> None:
    assert n_scored(n_clusters, 2, 0.25) == scored


@pytest.mark.parametrize("settings", [{}, {"faithful": True}, {"faithful": True, "method": "patchsearch"}])
@pytest.mark.parametrize(
    ("n_clusters", "rounds", "scored"),
    [(100, 15, 826), (1000, 23, 8054)],  # invariant 6
)
def test_a_search_scores_as_many_images_as_announced_and_none_twice(
    settings, n_clusters: int, rounds: int, scored: int
) -> None:
    per_cluster = 2 * rounds
    colours = torch.randint(0, 256, (n_clusters * per_cluster,), dtype=torch.uint8, generator=generator())
    searcher = plain_searcher(n_clusters, per_cluster, colours, **settings)
    names: list[str] = []
    told: list[tuple[int, int]] = []

    def run_round(name: str, compute: Callable[[], Candidates]) -> Candidates:
        names.append(name)
        return compute()

    searcher = Searcher(**{**vars(searcher), "progress": lambda _s, done, total: told.append((done, total))})
    found = searcher.explore(run_round)
    assert len(found) == scored == len(set(found.rows.tolist()))
    assert len(names) == rounds == len(set(names))
    assert torch.bincount(found.own).max() == per_cluster  # of no cluster more: 46 of 1 000 clusters
    assert told[-1] == (scored, scored) and [done for done, _ in told] == sorted(done for done, _ in told)
    assert torch.equal(found.own, searcher.clusters.assignment[found.rows])


@pytest.mark.parametrize("settings", [{}, {"faithful": True}])
def test_the_clusters_with_the_highest_scores_survive(settings) -> None:
    colours = torch.zeros(40, 10, dtype=torch.uint8)  # (image of the cluster, cluster)
    colours[:, 7] = 200
    colours[:, 2] = 100
    found = plain_searcher(10, 40, colours.flatten(), **settings).explore(plainly)
    counts = torch.bincount(found.own, minlength=10)
    assert counts[7] == counts.max() and counts[2] == counts.max()
    assert counts.min() == 2  # two lowest clusters go after the first round


def first_of_its_queue(searcher: Searcher, cluster: int) -> int:
    return searcher.queues()[cluster][0]


@pytest.mark.parametrize(
    ("settings", "stays"),
    [
        ({}, True),
        ({"faithful": True, "method": "patchsearch"}, True),
        ({"faithful": True, "method": "poisoncam"}, False),
    ],
)
def test_one_hit_keeps_a_cluster_by_the_running_maximum_but_not_by_the_sum_of_the_round(
    settings, stays
) -> None:
    colours = torch.full((400,), 10, dtype=torch.uint8)
    members = torch.arange(400) % 10 == 6
    colours[members] = 0
    colours[first_of_its_queue(plain_searcher(10, 40, colours), 6)] = 250
    found = plain_searcher(10, 40, colours, **settings).explore(plainly)
    counts = torch.bincount(found.own, minlength=10)
    assert counts[6] == (counts.max() if stays else 4)  # the sum drops it after its second round


class Centred(ByColour):
    """The same, but a dark patch has a negative score: it drives images out of the cluster."""

    def run(self, patches: Tensor, *, generator: torch.Generator) -> Flips:
        flips = super().run(patches, generator=generator)
        return Flips(
            *(value - 0.5 if name != "control_gain" else value for name, value in vars(flips).items())
        )


def test_the_release_rates_no_cluster_below_zero_while_it_has_images_left() -> None:
    def counts(colours: Tensor, **settings: object) -> list[int]:
        searcher = plain_searcher(10, 40, colours, **settings)
        searcher = Searcher(**{**vars(searcher), "flip_test": Centred(10)})
        return torch.bincount(searcher.explore(plainly).own, minlength=10).tolist()

    all_negative = (torch.arange(400) % 10).to(torch.uint8) * 10  # cluster 9 is the least negative
    alike = torch.full((400,), 50, dtype=torch.uint8)
    release = {"faithful": True, "method": "patchsearch"}
    assert counts(all_negative, **release) == counts(alike, **release)
    assert counts(all_negative) == sorted(counts(all_negative))


def test_published_ties_are_broken_by_the_seed_not_by_the_number_of_the_cluster() -> None:
    def survivors(seed: int) -> list[int]:
        searcher = plain_searcher(12, 40, torch.zeros(480, dtype=torch.uint8), faithful=True)
        searcher = Searcher(**{**vars(searcher), "generator": lambda step: stage_generator(seed, step)})
        return torch.bincount(searcher.explore(plainly).own, minlength=12).tolist()

    assert survivors(0) == survivors(0)
    assert len({tuple(survivors(seed)) for seed in range(4)}) == 4


class TwoSpots(NoAttention):
    """Hottest at the upper left corner, second hottest at the lower right one."""

    def heat(self, pixels: Tensor) -> Tensor:
        heat = torch.zeros(len(pixels), 8, 8)
        heat[:, :3, :3], heat[:, 5:, 5:] = 2, 1
        return heat


@pytest.mark.parametrize(("patches", "bright", "corner"), [(1, 5, 0), (2, 5, 5), (2, 0, 0), (3, 5, 5)])
def test_of_several_windows_of_an_image_the_best_counts(patches: int, bright: int, corner: int) -> None:
    searcher = plain_searcher(4, 10, torch.zeros(40, dtype=torch.uint8), patches=patches)
    searcher.images.pixels[:, :, bright : bright + 3, bright : bright + 3] = 200
    searcher = Searcher(**{**vars(searcher), "attention": TwoSpots()})
    found = searcher.explore(plainly)
    assert (found.corners == corner).all() and len(set(found.rows.tolist())) == len(found)
    assert (found.flips.changed == (200 / 255 if bright == corner else 0)).all()


def test_every_further_window_costs_one_more_flip_test() -> None:
    shown = []
    for patches in (1, 3):
        searcher, _ = toy_searcher(0, patches=patches)
        before = searcher.flip_test.encoder.images_shown
        found = searcher.score(list(range(4)), "some")
        shown.append(searcher.flip_test.encoder.images_shown - before)
        assert len(found) == 4
    assert shown[1] - shown[0] == 4 * 2 * 2 * 24  # images, windows, patch and control, flip images


def test_small_clusters_run_dry_without_a_fault() -> None:
    searcher = plain_searcher(8, 3, torch.arange(24, dtype=torch.uint8))
    found = searcher.explore(plainly)
    assert len(found) == len(set(found.rows.tolist())) <= 24


def test_images_that_are_not_allowed_are_never_scored() -> None:
    searcher = plain_searcher(8, 10, torch.zeros(80, dtype=torch.uint8))
    allowed = torch.rand(80, generator=generator(1)) < 0.5
    searcher = Searcher(**{**vars(searcher), "allowed": allowed})
    assert allowed[searcher.explore(plainly).rows].all()
    assert sorted(row for queue in searcher.queues() for row in queue) == allowed.nonzero().flatten().tolist()


def test_more_images_of_promising_clusters_are_drawn_in_turn_scored_ones_first() -> None:
    colours = torch.zeros(12, 6, dtype=torch.uint8)
    colours[:, 1], colours[:, 4] = 250, 200
    searcher = plain_searcher(6, 12, colours.flatten())
    found = searcher.explore(plainly)
    rows = searcher.exploit_rows(found, torch.eye(4)[:1], 10)
    assert searcher.clusters.assignment[rows].tolist() in ([1, 4] * 5, [4, 1] * 5)
    known = set(found.rows.tolist())
    for cluster in (1, 4):
        own = [row in known for row in rows.tolist() if int(searcher.clusters.assignment[row]) == cluster]
        assert own == sorted(own, reverse=True)
    every = searcher.exploit_rows(found, torch.eye(4)[:1], 1000)
    assert len(every) == len(set(every.tolist())) == 24


# --- voting


def pushing(shifts: Tensor, scores: Tensor, patches: Tensor | None = None) -> Candidates:
    """Candidates with these pushes and concentrated scores."""
    n = len(shifts)
    gain = torch.stack((scores, torch.zeros(n)), dim=1)
    flips = Flips(scores, gain, torch.zeros(n, 2), shifts)
    if patches is None:
        patches = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator(n))
    zeros = torch.zeros(n, dtype=torch.int64)
    return Candidates(torch.arange(n), zeros, torch.zeros(n, 2, dtype=torch.int64), patches, flips)


def test_candidates_that_push_the_same_way_elect_their_direction() -> None:
    noise = 0.05 * torch.randn(60, 16, generator=generator(2))
    noise[:6, 3] += 0.5
    noise[6:11, 9] += 0.4
    scores = torch.cat(
        (torch.full((6,), 0.9), torch.full((5,), 0.7), torch.rand(49, generator=generator(3)) * 0.2)
    )
    directions = vote(pushing(noise, scores))
    assert directions.shape[1] == 16 and 2 <= len(directions) <= 3
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(len(directions)))
    assert directions[0, 3] > 0.9 and directions[1, 9] > 0.9


def test_what_every_window_does_is_no_direction() -> None:
    shifts = 0.3 * torch.randn(50, 64, generator=generator(4))
    shifts[:, 5] += 2.0
    for direction in vote(pushing(shifts, torch.rand(50, generator=generator(5)))):
        assert abs(float(direction[5])) < 0.5


@pytest.mark.parametrize("n", [1, 2, 12])
def test_no_agreement_gives_no_direction(n: int) -> None:
    shifts = torch.eye(16)[:n]
    directions = vote(pushing(shifts, torch.rand(n, generator=generator(6))))
    assert directions.shape == (0, 16)


def test_the_direction_whose_windows_look_alike_is_elected() -> None:
    trigger = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=generator(7))
    alike = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator(8))
    alike[:5] = trigger
    shifts = 0.01 * torch.randn(20, 6, generator=generator(9))
    shifts[:5, 2] += 1.0
    different = pushing(0.01 * torch.randn(20, 6, generator=generator(10)), torch.zeros(20))
    different.flips.shift[:5, 4] += 1.2  # pushes harder, but its windows show five different things
    directions = torch.eye(6)[[4, 2]]
    elected = elect([different, pushing(shifts, torch.zeros(20), alike)], directions)
    assert elected.shape == (1, 6) and elected[0, 2] > 0.9
    torch.testing.assert_close(elected.norm(dim=1), torch.ones(1))


@pytest.mark.parametrize(("one_trigger", "elected"), [(True, [4]), (False, [4, 2])])
def test_of_the_directions_of_one_trigger_the_hardest_push_is_enough(
    one_trigger: bool, elected: list[int]
) -> None:
    triggers = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator(7))
    trials = []
    for number, (push, axis) in enumerate(((1.0, 2), (1.2, 4))):
        patches = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator(8 + number))
        patches[:5] = triggers[0 if one_trigger else number]
        shifts = 0.01 * torch.randn(20, 6, generator=generator(10 + number))
        shifts[:5, axis] += push
        trials.append(pushing(shifts, torch.zeros(20), patches))
    assert elect(trials, torch.eye(6)[[2, 4]]).argmax(dim=1).tolist() == elected


def test_when_nothing_recurs_the_hardest_push_stays() -> None:
    weak, strong = (
        pushing(0.01 * torch.randn(20, 6, generator=generator(s)), torch.zeros(20)) for s in (11, 12)
    )
    weak.flips.shift[:5, 0] += 0.3
    strong.flips.shift[:5, 1] += 0.9
    elected = elect([weak, strong], torch.eye(6)[:2])
    assert elected.shape == (1, 6) and elected[0, 1] > 0.9


def test_directed_scores_take_the_best_direction() -> None:
    shifts = torch.tensor([[0.5, 0.1, 0.0], [0.0, 0.4, 0.9], [-0.2, -0.3, 0.0]])
    found = pushing(shifts, torch.tensor([0.3, 0.2, 0.1]))
    assert directed_scores(found, torch.eye(3)[:2]).tolist() == pytest.approx([0.5, 0.4, -0.2])
    assert directed_scores(found, torch.empty(0, 3)).tolist() == pytest.approx([0.3, 0.2, 0.1])


# --- the toy with a planted backdoor


def toy_searcher(
    seed: int, *, batch_size: int = 256, patches: int = 1, n_flips: int = 24
) -> tuple[Searcher, dict[str, Box]]:
    images, boxes = planted_images(240, 30, generator(seed))
    encoder = planted_encoder()
    features = extract_features(encoder, images).values
    clusters = kmeans(features, 12, generator=generator(seed))
    config = ScanConfig(window=WINDOW, n_flips=n_flips, clusters=12, patches=patches).resolve(240, 32)

    def drawn(step: str) -> torch.Generator:
        return stage_generator(seed, step)

    flips = nearest_rows(
        features, clusters, torch.ones(240, dtype=torch.bool), n_flips, generator=drawn("flips")
    )
    allowed = torch.ones(240, dtype=torch.bool)
    allowed[flips] = False
    attention = MaskAttention(encoder, clusters, config, generator=drawn("masks"), batch_size=batch_size)
    test = FlipTest.draw(
        encoder,
        images,
        clusters,
        flips,
        WINDOW,
        generator=drawn("places"),
        with_control=True,
        batch_size=batch_size,
    )
    return Searcher(images, clusters, attention, test, config, allowed, drawn, silent), boxes


@pytest.fixture(scope="module")
def explored() -> tuple[Searcher, dict[str, Box], Candidates]:
    searcher, boxes = toy_searcher(0)
    return searcher, boxes, searcher.explore(plainly)


def is_planted(searcher: Searcher, boxes: dict[str, Box], found: Candidates) -> Tensor:
    return torch.tensor([searcher.images.ids[row] in boxes for row in found.rows])


def test_exploring_ranks_all_planted_images_first(explored) -> None:
    searcher, boxes, found = explored
    planted = is_planted(searcher, boxes, found)
    order = found.flips.score("concentrated", found.own).argsort(descending=True, stable=True)
    assert planted.sum() >= 10
    assert planted[order[: int(planted.sum())]].all()


def test_the_vote_finds_the_planted_feature_and_the_second_look_only_planted_images(explored) -> None:
    searcher, boxes, found = explored
    order = found.flips.score("concentrated", found.own).argsort(descending=True, stable=True)
    directions = vote(found)
    directions = elect(searcher.refine(found.rows[order[:20]], directions, "trial"), directions)
    assert len(directions) == 1 and directions[0, 0] > 0.8
    rows = searcher.exploit_rows(found, directions, 60)
    again = searcher.look_again(rows, directions, "exploit")
    planted = is_planted(searcher, boxes, again)
    assert planted.sum() >= 20
    ranking = directed_scores(again, directions).argsort(descending=True, stable=True)
    assert planted[ranking[:20]].all()
    for row, (top, left) in zip(
        again.rows[ranking[:10]].tolist(), again.corners[ranking[:10]].tolist(), strict=True
    ):
        box = boxes[searcher.images.ids[row]]
        assert Box(left, top, WINDOW, WINDOW).intersection(box) == box.area


def test_the_same_seed_gives_the_same_ranking_whatever_the_batch_size(explored) -> None:
    _, _, found = explored
    other = toy_searcher(0, batch_size=37)[0].explore(plainly)
    assert torch.equal(other.rows, found.rows) and torch.equal(other.corners, found.corners)
    for kind in ("any", "source", "concentrated"):
        mine, theirs = (c.flips.score(kind, c.own) for c in (found, other))
        assert torch.equal(
            mine.argsort(descending=True, stable=True), theirs.argsort(descending=True, stable=True)
        )
    direction = F.normalize(found.flips.shift[:1], dim=1)
    mine, theirs = (directed_scores(c, direction) for c in (found, other))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_another_seed_looks_at_other_images(explored) -> None:
    searcher, _, found = explored
    other = Searcher(**{**vars(searcher), "generator": lambda step: stage_generator(1, step)})
    assert not torch.equal(other.explore(plainly).rows, found.rows)


def test_a_race_finds_the_survivors_of_the_whole_search_with_fewer_passes() -> None:
    searcher, boxes = toy_searcher(0, batch_size=1024, n_flips=96)
    encoder, rows = searcher.flip_test.encoder, list(range(0, 48))
    start = encoder.images_shown
    whole = searcher.score(rows, "some")
    middle = encoder.images_shown
    racing = Searcher(**{**vars(searcher), "config": dataclasses.replace(searcher.config, race=True)})
    raced = racing.score(rows, "some")
    assert torch.equal(raced.corners, whole.corners)
    mine, theirs = (c.flips.score("concentrated", c.own) for c in (raced, whole))
    strong = theirs >= RACE.rate
    planted = is_planted(searcher, boxes, whole)
    assert strong.sum() >= 3 and bool(planted[strong].all())
    torch.testing.assert_close(mine[strong], theirs[strong], atol=1e-6, rtol=0)
    torch.testing.assert_close(raced.flips.shift[strong], whole.flips.shift[strong], atol=1e-6, rtol=0)
    assert float(mine[~strong].max()) < float(mine[strong].min())
    masks = 48 * (1 + len(searcher.attention.masks))  # type: ignore[attr-defined]
    assert encoder.images_shown - middle - masks < 0.7 * (middle - start - masks)
