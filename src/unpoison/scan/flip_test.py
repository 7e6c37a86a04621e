"""The flip test: paste a patch on images that have nothing to do with it, and see where they go.

Papers: PatchSearch (Tejankar et al., CVPR 2023) and PoisonCAM (Qian et al., 2023). Ours: every patch is tested
beside its own control, the same pixels shuffled in blocks and pasted at the same places. What the control moves as
well is occlusion or plain colour (blue water pulls any picture towards the jellyfish); what is left needs the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.functional.clustering import assign
from unpoison.functional.sequential import DROPPED, SequentialTest
from unpoison.functional.windows import paste_windows
from unpoison.records import Clusters, ImageSet

__all__ = ["RACE", "FlipSet", "FlipTest", "Flips", "draw_corners", "nearest_rows", "shuffle_blocks"]

RACE = SequentialTest(null_rate=0.04, rate=0.1, alpha=0.0, beta=0.05, batch=16)
"""A race drops a candidate whose score on the whole flip set is 0.1 or more with probability at most 0.05. No one is
kept early: whoever is not dropped needs the whole flip set for a score. The null rate decides how soon it drops."""


def shuffle_blocks(patches: Tensor, *, generator: torch.Generator) -> Tensor:
    """Each patch with its blocks in random order: same colours, no pattern.

    Blocks have a side of at most w/12, so that a 4×4 grid of colours is destroyed too.

    Args:
        patches: (N, 3, w, w), any dtype.
        generator: a CPU generator; one order per patch.

    Returns:
        (N, 3, w, w), a copy; a border that is no whole block stays as it is.
    """
    n, channels, side, _ = patches.shape
    block = max(1, side // 12)
    per_side = side // block
    used = per_side * block
    tiles = patches[:, :, :used, :used].reshape(n, channels, per_side, block, per_side, block)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(n, per_side**2, channels, block, block)
    order = torch.rand(n, per_side**2, generator=generator).argsort(dim=1).to(patches.device)
    tiles = tiles.gather(1, order[:, :, None, None, None].expand_as(tiles))
    tiles = tiles.reshape(n, per_side, per_side, channels, block, block).permute(0, 3, 1, 4, 2, 5)
    shuffled = patches.clone()
    shuffled[:, :, :used, :used] = tiles.reshape(n, channels, used, used)
    return shuffled


def draw_corners(count: int, size: int, side: int, *, generator: torch.Generator) -> Tensor:
    """(count, 2) int64 corners, uniform over every place where a window of `side` fits, the last one included."""
    return torch.randint(0, size - side + 1, (count, 2), generator=generator)


def nearest_rows(
    features: Tensor, clusters: Clusters, allowed: Tensor, count: int, *, generator: torch.Generator
) -> Tensor:
    """About `count` images, the nearest to their centroid of every cluster, or of randomly chosen clusters.

    Args:
        features: (N, D) unit length.
        clusters: of the same images.
        allowed: (N,) bool, images that may be taken.
        count: wanted number.
        generator: decides which clusters send one image more than others.

    Returns:
        (n,) int64 rows, n ≤ count.
    """
    n_clusters = len(clusters.centroids)
    cosine = (features * clusters.centroids[clusters.assignment]).sum(dim=1)
    cosine = torch.where(allowed, cosine, -torch.inf)
    order = cosine.argsort(descending=True, stable=True)
    order = order[allowed[order]]
    within = torch.zeros(len(order), dtype=torch.int64)
    own = clusters.assignment[order]
    for cluster in range(n_clusters):
        members = (own == cluster).nonzero().flatten()
        within[members] = torch.arange(len(members))
    # Clusters in random order decide who is left out when not every cluster can send the same number.
    turn = torch.randperm(n_clusters, generator=generator)[own]
    return order[(within * n_clusters + turn).argsort(stable=True)][:count]


@dataclass(frozen=True, eq=False)
class FlipSet:
    """The images on which every candidate is pasted, always at the same places, so that candidates compare in pairs.

    Attributes:
        pixels: (F, 3, S, S) uint8 on the encoder's device.
        corners: (F, 2) int64, where the patch goes.
        features: (F, D) unit length, unpatched.
        assignment: (F,) int64, unpatched.
    """

    pixels: Tensor
    corners: Tensor
    features: Tensor
    assignment: Tensor


@dataclass(frozen=True, eq=False)
class Flips:
    """What n patches did to the flip set; shares of F, so that no number depends on the set's size.

    Attributes:
        changed: (n,) share whose cluster changed.
        gain: (n, K) net share that came into each cluster.
        control_gain: (n, K) the same for the control; zero where none was run.
        shift: (n, D) mean feature after the patch, minus mean feature after the control.
    """

    changed: Tensor
    gain: Tensor
    control_gain: Tensor
    shift: Tensor

    def score(self, kind: str, own: Tensor) -> Tensor:
        """A named poison score, (n,) float32 in [-1, 1].

        Args:
            kind: `any` (share of changed clusters, PoisonCAM), `source` (net gain of the candidate's own cluster,
                PatchSearch) or `concentrated` (largest net gain of any cluster, less what the control gains).
            own: (n,) int64, cluster of each candidate's image.
        """
        if kind == "any":
            return self.changed
        if kind == "source":
            return self.gain.gather(1, own[:, None])[:, 0]
        return torch.minimum(self.gain, self.gain - self.control_gain).amax(dim=1)

    @staticmethod
    def concatenate(parts: list[Flips]) -> Flips:
        """All patches of all parts, in order."""
        return Flips(
            *(
                torch.cat([getattr(p, name) for p in parts])
                for name in ("changed", "gain", "control_gain", "shift")
            )
        )


class FlipTest:
    """Pastes patches on a flip set and counts.

    Args:
        encoder: the encoder under suspicion.
        clusters: fixed before.
        flip_set: see `FlipSet`.
        window: side of the patches, in pixels.
        with_control: run the shuffled control of every patch too; costs as many passes again.
        batch_size: images per pass.
    """

    def __init__(
        self,
        encoder: Encoder,
        clusters: Clusters,
        flip_set: FlipSet,
        window: int,
        *,
        with_control: bool,
        batch_size: int,
    ) -> None:
        self.encoder = encoder
        self.centroids = clusters.centroids.to(encoder.device)
        self.flip_set = flip_set
        self.with_control = with_control
        self.batch_size = batch_size
        self.window = window
        self.baseline = self._counts(flip_set.assignment[None])

    @classmethod
    def draw(
        cls,
        encoder: Encoder,
        images: ImageSet,
        clusters: Clusters,
        rows: Tensor,
        window: int,
        *,
        generator: torch.Generator,
        with_control: bool,
        batch_size: int,
    ) -> FlipTest:
        """A flip test on these rows of the images, with paste positions drawn once."""
        pixels = images.pixels[rows].to(encoder.device)
        corners = draw_corners(len(rows), images.size, window, generator=generator).to(encoder.device)
        # The baseline goes through the same precision and batches as the patched images; otherwise rounding near
        # a border between clusters would count as a flip.
        features = torch.cat([encoder.features(part) for part in torch.split(pixels, batch_size)])
        centroids = clusters.centroids.to(encoder.device)
        flip_set = FlipSet(pixels, corners, F.normalize(features, dim=1), assign(features, centroids))
        return cls(encoder, clusters, flip_set, window, with_control=with_control, batch_size=batch_size)

    def run(self, patches: Tensor, *, generator: torch.Generator) -> Flips:
        """Paste each of the (n, 3, w, w) uint8 patches on every flip image."""
        n_flips = len(self.flip_set.pixels)
        patches = patches.to(self.encoder.device)
        controls = shuffle_blocks(patches, generator=generator) if self.with_control else None
        parts = []
        step = max(1, self.batch_size // n_flips)
        for start in range(0, len(patches), step):
            chunk = slice(start, start + step)
            control = None if controls is None else self._pasted(controls[chunk])
            parts.append(self._compare(self._pasted(patches[chunk]), control))
        return Flips.concatenate(parts)

    def race(
        self,
        patches: Tensor,
        *,
        kind: str,
        order: Tensor,
        generator: torch.Generator,
        test: SequentialTest = RACE,
    ) -> Flips:
        """Like `run`, but whoever is clearly no trigger is pasted on the first of the flip images only.

        A score of `test.rate` needs that share of the flip set to lie in one cluster with the patch and outside it
        with the control (without one, and for `source`, to come into one cluster; for `any`, to change its cluster).
        Looks count such images, so that a candidate whose score on the whole flip set would reach the rate is
        dropped with probability at most `test.beta` over the orders.

        Args:
            patches: (n, 3, w, w) uint8.
            kind: the score that counts, see `Flips.score`.
            order: (F,) int64, a random order of the flip images, the same for all candidates.
            generator: as in `run`; survivors get the same controls as there.
            test: says when to look, and whom to drop; it keeps no one early.

        Returns:
            Survivors have the flips that `run` gives, dropped candidates those of the images they were pasted on.
        """
        n_flips = len(self.flip_set.pixels)
        patches = patches.to(self.encoder.device)
        controls = shuffle_blocks(patches, generator=generator) if self.with_control else None
        order = order.to(self.encoder.device)
        stops = [*test.looks(n_flips), n_flips]
        parts = []
        step = max(1, self.batch_size // n_flips)
        for start in range(0, len(patches), step):
            chunk = patches[start : start + step]
            others = None if controls is None else controls[start : start + step]
            parts.append(self._race(chunk, others, kind, order, stops, test))
        return Flips.concatenate(parts)

    def _race(
        self,
        patches: Tensor,
        controls: Tensor | None,
        kind: str,
        order: Tensor,
        stops: list[int],
        test: SequentialTest,
    ) -> Flips:
        """One chunk of a race, to its end."""
        n_flips = len(order)
        alive = torch.arange(len(patches), device=order.device)
        shape = (len(patches), n_flips, self.flip_set.features.shape[1])
        features = torch.empty(shape, device=order.device)
        control = None if controls is None else torch.empty_like(features)
        finished: list[Flips] = []
        places: list[Tensor] = []
        for begin, end in zip([0, *stops], stops, strict=False):
            rows, seen = order[begin:end], order[:end]
            features[alive[:, None], rows] = self._pasted(patches[alive], rows)
            if control is not None and controls is not None:
                control[alive[:, None], rows] = self._pasted(controls[alive], rows)
            if end == n_flips:
                leaving, kept = alive, alive[:0]
                index: Tensor | None = None
            else:
                pick = (alive[:, None], seen)
                hits = self._hits(features[pick], None if control is None else control[pick], seen, kind)
                dropped = test.decide(hits, end, n_flips) == DROPPED
                leaving, kept, index = alive[dropped], alive[~dropped], seen
            if len(leaving):
                at = (leaving,) if index is None else (leaving[:, None], index)
                finished.append(self._compare(features[at], None if control is None else control[at], index))
                places.append(leaving)
            alive = kept
            if len(alive) == 0:
                break
        back = torch.cat(places).argsort().cpu()
        every = Flips.concatenate(finished)
        return Flips(*(getattr(every, f.name)[back] for f in fields(Flips)))

    def _hits(self, features: Tensor, control: Tensor | None, rows: Tensor, kind: str) -> Tensor:
        """(n,) int64: images that speak for each candidate; no score, times F, is above their number."""
        assignment = assign(features.flatten(0, 1), self.centroids).view(len(features), len(rows))
        before = self.flip_set.assignment[rows].expand_as(assignment)
        if kind == "any":
            return (assignment != before).sum(dim=1)
        if control is not None and kind != "source":
            before = assign(control.flatten(0, 1), self.centroids).view_as(assignment)
        counts = torch.zeros(len(assignment), len(self.centroids), device=assignment.device)
        return counts.scatter_add_(1, assignment, (assignment != before).float()).amax(dim=1).long()

    def _compare(self, features: Tensor, control: Tensor | None, rows: Tensor | None = None) -> Flips:
        """What (n, f, D) features of patched images say beside their controls'; `rows` None is the whole set."""
        flip_set = self.flip_set
        before, unpatched, baseline = flip_set.assignment, flip_set.features, self.baseline
        if rows is not None:
            before, unpatched = before[rows], unpatched[rows]
            baseline = self._counts(before[None])
        n_flips = len(before)
        assignment = assign(features.flatten(0, 1), self.centroids).view(-1, n_flips)
        changed = (assignment != before).float().mean(dim=1)
        gain = (self._counts(assignment) - baseline) / n_flips
        if control is None:
            control_gain = torch.zeros_like(gain)
            shift = features.mean(dim=1) - unpatched.mean(dim=0)
        else:
            control_assignment = assign(control.flatten(0, 1), self.centroids).view(-1, n_flips)
            control_gain = (self._counts(control_assignment) - baseline) / n_flips
            shift = features.mean(dim=1) - control.mean(dim=1)
        return Flips(changed.cpu(), gain.cpu(), control_gain.cpu(), shift.cpu())

    def _pasted(self, patches: Tensor, rows: Tensor | None = None) -> Tensor:
        """(n, f, D) unit-length features of every flip image, or of these rows, with every patch."""
        pixels, corners = self.flip_set.pixels, self.flip_set.corners
        if rows is not None:
            pixels, corners = pixels[rows], corners[rows]
        n, n_flips = len(patches), len(pixels)
        pasted = paste_windows(
            pixels.repeat(n, 1, 1, 1), patches.repeat_interleave(n_flips, dim=0), corners.repeat(n, 1)
        )
        features = torch.cat([self.encoder.features(part) for part in torch.split(pasted, self.batch_size)])
        return F.normalize(features, dim=1).view(n, n_flips, -1)

    def _counts(self, assignment: Tensor) -> Tensor:
        """(n, F) assignments to (n, K) counts; whole numbers in float32, so that equal counts stay equal."""
        counts = torch.zeros(len(assignment), len(self.centroids), device=assignment.device)
        return counts.scatter_add_(1, assignment, torch.ones(assignment.shape, device=assignment.device))
