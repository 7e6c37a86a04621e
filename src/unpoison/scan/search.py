"""Which windows of which images act like a trigger? Explore clusters, let candidates vote, look again.

The published search (PatchSearch, PoisonCAM) is `explore`: a few images of every cluster, one window each, clusters
with low scores dropped round by round. On real victims its weak point is the window: with the true box the score
separates perfectly, with the found one it does not. So three steps of our own follow, unless `faithful`:

vote      A trigger pushes every picture the same way in feature space, benign windows each their own way. The
          direction on which the strongest candidates agree is the trigger's (`vote`).
refine    Looking for what carries that direction, instead of what disturbs the cluster, finds the window, and
          moving it pixel by pixel frames the trigger (`refine`): docs/fidelity.md.
exploit   Clusters that hold such windows get more images examined (`exploit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.functional.matching import patch_similarity
from unpoison.functional.windows import crop_windows, hottest_windows
from unpoison.records import Clusters, ImageSet
from unpoison.runtime import Progress
from unpoison.scan.candidates import Candidates
from unpoison.scan.config import CARRIERS, MOST_DIRECTIONS, ScanConfig
from unpoison.scan.flip_test import FlipTest
from unpoison.scan.poisoncam import sharpen_windows

__all__ = [
    "FEWEST_SUPPORTERS",
    "SAME_PATTERN",
    "Attention",
    "Searcher",
    "directed_scores",
    "elect",
    "n_scored",
    "vote",
]

FEWEST_SUPPORTERS = 3
"""Images with one pattern that make the direction in which it pushes count for more than any of fewer."""

SAME_PATTERN = 0.6
"""Normalised cross-correlation from which two patches show the same pattern."""


class Attention(Protocol):
    """Where an image's suspicious pixels are; by masks or by Grad-CAM."""

    def heat(self, pixels: Tensor) -> Tensor:
        """What holds each image in its cluster, (N, S, S)."""

    def heat_along(self, pixels: Tensor, directions: Tensor) -> Tensor:
        """What carries each direction, (N, m, S, S)."""

    def windows(self, heat: Tensor) -> Tensor:
        """(N, 2) corners of the hottest windows of (N, S, S)."""


def n_scored(n_clusters: int, samples: int, prune: float) -> int:
    """Images that the iterative search scores when every cluster has enough of them.

    >>> n_scored(100, 2, 0.25), n_scored(1000, 2, 0.25)
    (826, 8054)
    """
    total, alive = 0, n_clusters
    while True:
        total += samples * alive
        dropped = int(prune * alive)
        if dropped == 0:
            return total
        alive -= dropped


def vote(
    candidates: Candidates, *, leaders: int = 15, agreement: float = 0.5, most: int = MOST_DIRECTIONS
) -> Tensor:
    """Directions in feature space on which strong candidates agree, strongest group first.

    The `leaders` strongest candidates by the concentrated score are grouped by the direction in which they push
    the flip set (less the mean push of all candidates, which is what any window does). A group needs three images.

    Args:
        candidates: explored ones.
        leaders: how many of the strongest may vote for each direction.
        agreement: cosine from which two candidates push the same way.
        most: directions at the most.

    Returns:
        (m, D) float32, unit length, 0 ≤ m ≤ `most`.
    """
    push = candidates.flips.shift - candidates.flips.shift.mean(dim=0)
    unit = F.normalize(push, dim=1)
    order = candidates.flips.score("concentrated", candidates.own).argsort(descending=True, stable=True)
    free = torch.ones(len(candidates), dtype=torch.bool)
    directions: list[Tensor] = []
    while len(directions) < most:
        voters = order[free[order]][:leaders]
        cosine = unit[voters] @ unit[voters].T
        friends = cosine >= agreement
        centre = int((cosine * friends).sum(dim=1).argmax()) if len(voters) else 0
        group = voters[friends[centre]] if len(voters) else voters
        if len(group) < 3:
            break
        direction = F.normalize(push[group].mean(dim=0), dim=0)
        # Less the mean, windows that do nothing push away from the trigger that others hold; that is no direction.
        if (
            float((candidates.flips.shift[group] @ direction).mean())
            >= float((push[group] @ direction).mean()) / 2
        ):
            directions.append(direction)
        # All that push this way, leaders or not, have had their say.
        free &= unit @ direction < agreement
        free[group] = False
    return torch.stack(directions) if directions else torch.empty(0, push.shape[1])


def elect(trials: list[Candidates], directions: Tensor) -> Tensor:
    """The directions that hold when one looks along them, each re-estimated from the windows so found.

    A trigger's windows show one pattern: of the ten that push hardest along its direction at least three must look
    alike, and the push must be no less than a third of the strongest one's. When no direction passes, the one that
    pushes hardest is kept, so that a ranking still exists. A trigger that leads to several clusters comes up along
    several directions; each costs as much as the first and shows the same windows, so that the hardest push is enough.

    Args:
        trials: one set of refined candidates per direction.
        directions: (m, D), m ≥ 1.

    Returns:
        (m', D) float32, unit length, 1 ≤ m' ≤ m, hardest push first.
    """
    elected: list[tuple[bool, float, Tensor, Tensor]] = []
    for found, direction in zip(trials, directions, strict=True):
        push = found.flips.shift - found.flips.shift.mean(dim=0)
        along = found.flips.shift @ direction
        leaders = along.argsort(descending=True, stable=True)[:10]
        alike = patch_similarity(found.patches[leaders], least=SAME_PATTERN) >= SAME_PATTERN
        supporters = leaders[alike[int(alike.sum(dim=1).argmax())]]
        recurs = len(supporters) >= FEWEST_SUPPORTERS
        better = F.normalize(push[supporters if recurs else leaders].mean(dim=0), dim=0)
        elected.append((recurs, float(along[leaders].mean()), better, found.patches[supporters]))
    elected.sort(key=lambda e: e[:2], reverse=True)
    strongest = elected[0][1]
    kept: list[Tensor] = []
    patterns: list[Tensor] = []
    for recurs, along_it, better, pattern in elected:
        if recurs and along_it >= strongest / 3 and not any(_one_pattern(pattern, p) for p in patterns):
            kept.append(better)
            patterns.append(pattern)
    return torch.stack(kept or [elected[0][2]])


def _one_pattern(windows: Tensor, others: Tensor) -> bool:
    """Whether most of these windows show what some of the others show."""
    alike = patch_similarity(torch.cat((windows, others)), least=SAME_PATTERN) >= SAME_PATTERN
    return bool(alike[: len(windows), len(windows) :].any(dim=1).float().mean() > 0.5)


def directed_scores(candidates: Candidates, directions: Tensor) -> Tensor:
    """How far each patch pushes other images along the best of the directions, net of its control, (n,) float32."""
    if len(directions) == 0:
        return candidates.flips.score("concentrated", candidates.own)
    return (candidates.flips.shift @ directions.T).amax(dim=1)


@dataclass(frozen=True, eq=False)
class Searcher:
    """The search on one data set; the parts that all its steps share.

    Attributes:
        images, clusters: what is searched.
        attention: finds windows.
        flip_test: scores them.
        config: resolved settings.
        allowed: (N,) bool, images that may become candidates (not those kept for the confirmation).
        generator: for a named step, so that steps do not shift each other's draws.
        progress: told the number of images scored.
    """

    images: ImageSet
    clusters: Clusters
    attention: Attention
    flip_test: FlipTest
    config: ScanConfig
    allowed: Tensor
    generator: Callable[[str], torch.Generator]
    progress: Progress

    def queues(self) -> list[list[int]]:
        """For every cluster its allowed images in random order."""
        order = torch.randperm(len(self.images), generator=self.generator("queues"))
        queues: list[list[int]] = [[] for _ in range(len(self.clusters.centroids))]
        for row in order[self.allowed[order]].tolist():
            queues[int(self.clusters.assignment[row])].append(row)
        return queues

    def explore(self, run_round: Callable[[str, Callable[[], Candidates]], Candidates]) -> Candidates:
        """The published search: rounds of a few images per surviving cluster.

        A cluster whose images are used up keeps its rating; PoisonCAM's, the sum of the round, then drops it first.

        Args:
            run_round: called as run_round(name, compute) for every round; may answer from a cache.
        """
        config = self.config
        queues = self.queues()
        alive = list(range(len(queues)))
        if (
            config.faithful
        ):  # published scores are counts, most of them 0, and the order given here decides ties
            alive = torch.randperm(len(queues), generator=self.generator("cluster order")).tolist()
        best = torch.full((len(queues),), -torch.inf)
        total = min(n_scored(len(queues), config.samples, config.prune), int(self.allowed.sum()))
        rounds: list[Candidates] = []
        done = 0
        while True:
            rows = [row for cluster in alive for row in queues[cluster][: config.samples]]
            for cluster in alive:
                del queues[cluster][: config.samples]
            if rows:
                step = f"explore-{len(rounds):02d}"
                scored = run_round(step, lambda rows=rows, step=step: self.score(rows, step))  # type: ignore[misc]
                rounds.append(scored)
                done += len(rows)
                self.progress("search", done, total)
                self._rate_clusters(best, scored)
            dropped = int(config.prune * len(alive))
            if dropped == 0:
                return Candidates.concatenate(rounds)
            rating = best
            if (
                config.faithful
            ):  # published ratings are counts of flip images; rounding must not decide their ties
                rating = (best * 1e5).round()
            if config.faithful and config.method == "patchsearch":
                # The release begins with a score of 0 for every image, scored or not.
                unscored = torch.tensor([len(queue) > 0 for queue in queues])
                rating = torch.where(unscored, rating.clamp_min(0), rating)
            # Published as a slice that keeps nothing when nothing is dropped; say how many stay instead.
            alive = sorted(alive, key=rating.tolist().__getitem__, reverse=True)[: len(alive) - dropped]

    def _rate_clusters(self, best: Tensor, scored: Candidates) -> None:
        """PoisonCAM rates a cluster by the sum of its last round, PatchSearch and we by its best image so far."""
        values = self._poison_scores(scored)
        if self.config.faithful and self.config.method == "poisoncam":
            best.fill_(-torch.inf)
            best[scored.own] = 0
            best.index_add_(0, scored.own, values)
        else:
            best.scatter_reduce_(0, scored.own, values, "amax")

    def _poison_scores(self, scored: Candidates) -> Tensor:
        """The configured score; `directed` needs directions, which the rounds do not have yet."""
        kind = self.config.score
        assert kind is not None, "the config is resolved before the search"
        return scored.flips.score("concentrated" if kind == "directed" else kind, scored.own)

    def score(self, rows: list[int], step: str) -> Candidates:
        """The hottest windows of these images, each with its flip test; of each image the best one stays."""
        config = self.config
        assert config.window is not None, "the config is resolved before the search"
        index = torch.tensor(rows)
        pixels = self.images.pixels[index]
        corners = hottest_windows(self.attention.heat(pixels), config.window, config.patches)
        best = self._test(index, pixels, corners[:, 0], step, race=config.race)
        for place in range(1, config.patches):
            other = self._test(index, pixels, corners[:, place], f"{step}/{place}", race=config.race)
            best = best.better_of(other, self._poison_scores(best), self._poison_scores(other))
        return best

    def refine(self, rows: Tensor, directions: Tensor, step: str) -> list[Candidates]:
        """For each direction, of each image the window that carries most of it, and that window's flip test."""
        assert self.config.window is not None, "the config is resolved before the search"
        pixels = self.images.pixels[rows]
        heat = self.attention.heat_along(pixels, directions)
        found = []
        for number, direction in enumerate(directions):
            corners = sharpen_windows(
                self.flip_test.encoder,
                pixels,
                self.attention.windows(heat[:, number]),
                direction,
                self.config.window,
                carriers=self.flip_test.flip_set.pixels[:CARRIERS],
                batch_size=self.flip_test.batch_size,
            )
            found.append(self._test(rows, pixels, corners, f"{step}/{number}"))
        return found

    def look_again(self, rows: Tensor, directions: Tensor, step: str) -> Candidates:
        """For each image the better of the windows that the directions find."""
        best, *others = self.refine(rows, directions, step)
        for other in others:
            best = best.better_of(
                other, directed_scores(best, directions), directed_scores(other, directions)
            )
        return best

    def try_places(self, rows: Tensor, corners: Tensor, step: str) -> Candidates:
        """What given windows do: (n,) images and their (n, 2) corners, without a search for the place."""
        return self._test(rows, self.images.pixels[rows], corners, step)

    def exploit_rows(self, candidates: Candidates, directions: Tensor, budget: int) -> Tensor:
        """Images of the clusters whose candidates push along the directions, scored ones first, (n,), n ≤ budget."""
        if len(directions) == 0:
            return torch.empty(0, dtype=torch.int64)
        scores = directed_scores(candidates, directions)
        strength = torch.full((len(self.clusters.centroids),), -torch.inf)
        for cluster in sorted(set(candidates.own.tolist())):
            strength[cluster] = scores[candidates.own == cluster].amax()
        worthwhile = (strength > 0.5 * max(float(strength.max()), 0)).nonzero().flatten().tolist()
        order = {
            row: place for place, row in enumerate(candidates.rows[scores.argsort(descending=True)].tolist())
        }
        queues = [
            sorted(queue, key=lambda row: order.get(row, len(order)))
            for number, queue in enumerate(self.queues())
            if number in worthwhile
        ]
        return torch.tensor(list(_round_robin(queues, budget)), dtype=torch.int64)

    def _test(
        self, rows: Tensor, pixels: Tensor, corners: Tensor, step: str, *, race: bool = False
    ) -> Candidates:
        config = self.config
        assert config.window is not None and config.score is not None, (
            "the config is resolved before the search"
        )
        patches = crop_windows(pixels, corners, config.window)
        generator = self.generator(f"control/{step}")
        if race:
            order = torch.randperm(
                len(self.flip_test.flip_set.pixels), generator=self.generator("race order")
            )
            flips = self.flip_test.race(patches, kind=config.score, order=order, generator=generator)
        else:
            flips = self.flip_test.run(patches, generator=generator)
        return Candidates(rows, self.clusters.assignment[rows], corners, patches, flips)


def _round_robin(queues: list[list[int]], budget: int) -> Iterator[int]:
    """Items of all queues in turn, at most `budget` of them."""
    position, left = 0, budget
    while left > 0 and any(position < len(q) for q in queues):
        for queue in queues:
            if position < len(queue) and left > 0:
                yield queue[position]
                left -= 1
        position += 1
