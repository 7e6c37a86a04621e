"""Is the best candidate a trigger? Fixed before, tested on images that the search never saw.

The search picks the strongest of hundreds of candidates, so its own numbers are too good. Here each finalist (one
patch, one set of target clusters) is fixed on the search half and tested once on the confirmation half, by two exact
tests that must both reject: the patch moves more than a rate tau of the images that its shuffled control leaves where
they are, and it moves more images than its control does at the same places. Counting only what the control does not
move takes plain colour and occlusion out of the effect size, not just out of the comparison. A finalist must also
recur: the same pixels in at least five pictures that differ around them, and in more than a few of those that resemble
it. Edges resemble edges, and crops of one photograph share what they show; a pasted pattern brings the same pixels to
different pictures.

Whatever the search did, the claim "some patch steers more than tau of the images to these clusters, by its pattern" is
false with probability at most alpha: everything was fixed before the confirmation half was touched.

That a patch steers does not make it an attack: an encoder also learns a watermark that lies on images of all kinds, and
obeys it. An attacker needs the patch on one kind of image, which is what other images are to be taken for. So a
finalist must also be aimed (scan/aim.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.functional.clustering import assign
from unpoison.functional.matching import (
    duplicate_images,
    patch_similarity,
    surroundings_similarity,
    without_copies,
)
from unpoison.functional.windows import crop_windows, paste_windows
from unpoison.records import Clusters, ImageSet
from unpoison.scan.aim import Aim, aim_of
from unpoison.scan.candidates import Candidates
from unpoison.scan.config import MOST_BENIGN, MOST_DIRECTIONS, MOST_FINALISTS
from unpoison.scan.flip_test import Flips, FlipTest, draw_corners, shuffle_blocks
from unpoison.scan.search import SAME_PATTERN

__all__ = [
    "MANY_SOURCES",
    "MIN_SOURCES",
    "MOST_COMPARED",
    "SMALLEST_RATE",
    "BenignFinding",
    "Confirmation",
    "Finalist",
    "binomial_tail",
    "confirm",
    "find_benign_patterns",
    "find_finalists",
    "holm",
]

MIN_SOURCES = 5
"""Different pictures that must carry the same pattern, pixel for pixel, to be named; an attack needs hundreds."""

MANY_SOURCES = 10
"""Pictures with the same pattern from which a pattern that steers by colour alone is worth a person's look."""

_COMPARED = 120
"""Strongest candidates that are compared with each other."""

_COMPARED_ALONG = 40
"""Strongest candidates along each direction that are compared, too."""

MOST_COMPARED = _COMPARED + _COMPARED_ALONG * MOST_DIRECTIONS
"""Of both together, and so of the images that one finalist can have."""

SMALLEST_RATE = 0.05
"""Below this share of steered images no attack is worth while.

Nor would less be far from what clean data does, where the same pixels recur, as in overlapping crops of one photograph.
"""

_KNOWN = 24
"""Members of a finalist whose pattern an innocent window must not show."""

_AT_ONCE = 256
"""Windows that are compared with a pattern at once, which bounds memory."""

_PART_OF_PATTERN = 0.5
"""Normalised cross-correlation, at shifts of up to 0.6 of the side, from which a window shows a part of a pattern."""

_ORDINARY = 0.15
"""Share of random windows that show a part of a pattern, from which it belongs to ordinary pictures.

Were every second image poisoned, a trigger of a quarter of the side would show in less.
"""

_HOME = 0.1
"""Share of a pattern's images from which a cluster counts as one that the pattern leads to."""

_STRIKING_RATE = 0.2
"""Share of steered images that no innocent window was seen to reach."""

_SAME_PIXELS, _SAME_PIXELS_AGREEING = 0.95, 0.6
"""Correlation, and share of agreeing pixels, from which two windows show the same pixels.

Stricter than what gathers windows of one pattern, which may lie differently in them. Of 600 random windows of clean
CIFAR-10 and of clean Tiny-ImageNet no four are alike at 0.9; but those that a search thinks strongest are not random:
of 58 windows of dark over bright six were. Three were at 0.95, and of a trigger's windows, also where it is soft, nine
in ten are; fewer where JPEG took the detail. Crops that overlap, and strokes of digits, are alike, too: there the
pixels do recur.
"""

_ALIKE_BY_CHANCE = 1 / 16
"""Share of a pattern's windows that may show the same pixels and be no more than alike; see `_SAME_PIXELS`."""

_SAME_SURROUNDINGS = 0.6
"""Correlation from which what lies around two such windows is one picture, and the pixels were not pasted."""

_COMPARED_FOR_OVERLAYS = 600
"""Candidates, evenly chosen from all, that are compared for overlays."""


@dataclass(frozen=True, eq=False)
class Finalist:
    """A pattern that recurs among the strongest candidates, and where it sends images.

    Attributes:
        members: candidates that carry it, strongest first.
        core: those of them that show the same pixels as one of them, on pictures that differ around it; the one that
            moves most is tested.
        target_cluster: the cluster that gains most.
        attractors: (c,) int64, all clusters that gain at least a quarter as much, and those in which a tenth or more
            of the members' images lie.
    """

    members: Tensor
    core: Tensor
    target_cluster: int
    attractors: Tensor


@dataclass(frozen=True)
class Confirmation:
    """What the confirmation half says of one finalist.

    Attributes:
        flip_rate, control_rate: share of the images that the patch, and its control, moved to the attractors.
        tau: share moved by the patch and not by its control that had to be exceeded.
        p_value: larger of the two tests' p-values, corrected for the number of finalists by Holm's method.
        n_images: images it was tested on.
        steering_p_value: of the patch alone, whatever its control does: does it move more than a rate that no window
            of innocent images comes near? A backdoor that fires at colour alone (colour patches on grey images) shows
            here only.
        concentration, aimed: see `scan.aim.Aim`. Where too few images carry the pattern, it counts as aimed, unless its
            windows show a part of a pattern that is not. What is not aimed is no attack.
    """

    flip_rate: float
    control_rate: float
    tau: float
    p_value: float
    n_images: int
    steering_p_value: float
    concentration: float | None = None
    aimed: bool = True


@dataclass(frozen=True, eq=False)
class BenignFinding:
    """A pattern that recurs in several pictures and is no attack: a watermark, a logo, a frame.

    Attributes:
        members: candidates that carry it; the first is the one that most of the others resemble.
        flip_rate: share of the search's flip images that its patches bring to the cluster that gains most, the mean
            over the members.
        control_rate: the same of their shuffled pixels.
        steers: whether it moves images all the same; its rates are those of the confirmation half then.
        concentration: see `Confirmation`; None where it steers nothing, too.
    """

    members: Tensor
    flip_rate: float
    control_rate: float
    steers: bool = False
    concentration: float | None = None


def find_finalists(
    candidates: Candidates,
    scores: Tensor,
    images: ImageSet,
    directions: Tensor,
    *,
    most: int = MOST_FINALISTS,
) -> list[Finalist]:
    """Patterns that recur among the strongest candidates, most frequent first.

    Args:
        candidates: all scored ones.
        scores: (n,) float32, higher is more suspicious.
        images: the data set, to tell copies of a picture apart from independent sources.
        directions: (m, D) unit length, m ≥ 0, that the search looked along. The strongest along each are compared as
            well, because one trigger's candidates may be more than all that are compared.
        most: finalists at the most; fewer lose less to the correction for many tests.
    """
    free = torch.arange(len(candidates))
    finalists: list[Finalist] = []
    while len(finalists) < most and len(free) >= MIN_SOURCES:
        found = _recurring(candidates, free, scores, images, directions)
        # Where one trigger's windows are most of those compared, another's stand behind them. The directions are of the
        # former, so that the others are ranked without.
        crowds = [f for f in found if 2 * len(f.members) >= _COMPARED]
        finalists += crowds or found
        if not crowds:
            break
        for crowd in crowds:
            known = candidates.patches[crowd.members[:_KNOWN]]
            # At the reach that gathers a group: another trigger may look like this one at a corner.
            free = free[~_show_part(candidates.patches[free], known, reach=1 / 3)]
        scores, directions = candidates.flips.score("concentrated", candidates.own), directions[:0]
    return finalists[:most]


def _recurring(
    candidates: Candidates, free: Tensor, scores: Tensor, images: ImageSet, directions: Tensor
) -> list[Finalist]:
    """Patterns that recur among the strongest of these candidates, (m,) int64, most frequent first."""
    order = free[scores[free].argsort(descending=True, stable=True)]
    strongest = torch.zeros(len(candidates), dtype=torch.bool)
    strongest[order[:_COMPARED]] = True
    for push in (candidates.flips.shift[free] @ directions.T).T:
        strongest[free[push.argsort(descending=True, stable=True)[:_COMPARED_ALONG]]] = True
    order = order[strongest[order]]
    alike = patch_similarity(candidates.patches[order], least=SAME_PATTERN) >= SAME_PATTERN
    copies = duplicate_images(images.pixels[candidates.rows[order]])
    finalists: list[Finalist] = []
    for members in _groups(alike):
        distinct = without_copies(members, copies)
        if len(distinct) < MIN_SOURCES:
            continue
        chosen = order[torch.tensor(distinct)]
        core = chosen[_core(candidates.take(chosen), images)]
        if len(core) < max(MIN_SOURCES, _ALIKE_BY_CHANCE * len(chosen)):
            continue
        flips = candidates.take(chosen).flips
        gain = torch.minimum(flips.gain, flips.gain - flips.control_gain).mean(dim=0)
        if float(gain.max()) <= 0:
            continue
        # Where the patch leads flip images, and where the images that carry it lie. Flip images sit in the middle of
        # their clusters and are hard to move: of a trigger that led to four clusters they showed one.
        homes = torch.bincount(candidates.own[chosen], minlength=len(gain)) >= _HOME * len(chosen)
        attractors = ((gain >= 0.25 * gain.max()) | homes).nonzero().flatten()
        finalists.append(Finalist(chosen, core, int(gain.argmax()), attractors))
    return finalists


def find_benign_patterns(
    candidates: Candidates, images: ImageSet, triggers: list[Finalist], places: Sequence[Tensor] = ()
) -> list[BenignFinding]:
    """Overlays that recur among all candidates, not only the strongest, and steer nothing; most frequent first.

    No alarm, and no part of the verdict: poison and watermarks alike recur, and only steering tells them apart. What
    the search took no window of is not found, so that few images with an overlay at changing places often go unnoticed.

    Args:
        candidates: all scored ones.
        images: the data set, to tell copies of a picture apart from independent sources.
        triggers: those that steer; windows that show a part of their patterns are no overlay.
        places: per place, the candidates that are known to share its pixels.
    """
    others = torch.ones(len(candidates), dtype=torch.bool)
    for members in places:
        others[members] = False
    rest = others.nonzero().flatten()
    sample = rest[torch.linspace(0, len(rest) - 1, min(len(rest), _COMPARED_FOR_OVERLAYS)).round().long()]
    chosen = torch.cat([*places, sample])
    similarity = patch_similarity(
        candidates.patches[chosen], least=_SAME_PIXELS, agreeing=_SAME_PIXELS_AGREEING
    )
    alike = similarity >= _SAME_PIXELS
    copies = duplicate_images(images.pixels[candidates.rows[chosen]])
    known = [candidates.patches[trigger.members[:_KNOWN]] for trigger in triggers]
    found: list[BenignFinding] = []
    free = torch.ones(len(chosen), dtype=torch.bool)

    def take(members: list[int]) -> None:
        free[alike[members].any(dim=0)] = False
        distinct = without_copies(members, copies)
        if len(distinct) >= MIN_SOURCES:
            finding = _if_harmless(candidates, chosen[torch.tensor(distinct)], known)
            found.extend([finding] if finding else [])

    first = 0
    for members in places:
        sharing = list(range(first, first + len(members)))
        first += len(members)
        same = alike[sharing].any(dim=0) & free
        take(sharing + [place for place in same.nonzero().flatten().tolist() if place not in sharing])
    while True:
        # Around one centre, not in chains: these windows must show the same pixels, not pass them on.
        counts = (alike & free).sum(dim=1) * free
        if len(counts) == 0 or int(counts.max()) < MIN_SOURCES:
            return found
        centre = int(counts.argmax())
        group = alike[centre] & free
        nearest = similarity[centre].masked_fill(~group, -1).argsort(descending=True, stable=True)
        take(nearest[: int(group.sum())].tolist())


def _if_harmless(candidates: Candidates, members: Tensor, known: list[Tensor]) -> BenignFinding | None:
    """The finding, unless the patches steer or show a part of a pattern that is known to."""
    flips = candidates.take(members).flips
    gain, control = flips.gain.mean(dim=0), flips.control_gain.mean(dim=0)
    target = int(gain.argmax())
    if bool((gain - control).max() >= SMALLEST_RATE or gain.max() >= _STRIKING_RATE):
        return None
    if any(bool(_show_part(candidates.patches[members[:_KNOWN]], pattern).any()) for pattern in known):
        return None
    return BenignFinding(members, max(0.0, float(gain[target])), max(0.0, float(control[target])))


def _core(members: Candidates, images: ImageSet) -> Tensor:
    """Numbers of the members that show the very pixels of one of them, and whose pictures differ around these."""
    alike = (
        patch_similarity(members.patches, least=_SAME_PIXELS, agreeing=_SAME_PIXELS_AGREEING) >= _SAME_PIXELS
    )
    centre = int(alike.sum(dim=1).argmax())
    around = surroundings_similarity(
        images.pixels[members.rows], members.corners, members.patches.shape[-1], centre
    )
    pasted = alike[centre] & (around < _SAME_SURROUNDINGS)
    pasted[centre] = True
    return pasted.nonzero().flatten()


def _show_part(windows: Tensor, known: Tensor, *, reach: float = 0.6) -> Tensor:
    """(n,) bool: which of (n, 3, w, w) windows show a part of a pattern, of which (m, 3, w, w) are known.

    At a reach of 0.6 a corner is enough, and two grids of colours that share one are taken for each other.
    """
    found = [torch.empty(0, dtype=torch.bool)]
    for part in torch.split(windows, _AT_ONCE):
        both = patch_similarity(torch.cat((known, part)), reach=reach, least=_PART_OF_PATTERN)
        found.append(both[: len(known), len(known) :].amax(dim=0) >= _PART_OF_PATTERN)
    return torch.cat(found)


def _groups(alike: Tensor) -> list[list[int]]:
    """Connected components of a symmetric (n, n) bool relation, largest first, members in order.

    Chains count: two windows that hold opposite edges of one trigger need not look alike themselves.
    """
    label = torch.arange(len(alike))
    while True:
        lowest = torch.where(alike, label, len(alike)).amin(dim=1)
        if torch.equal(lowest, label):
            break
        label = lowest
    groups = [(label == value).nonzero().flatten().tolist() for value in sorted(set(label.tolist()))]
    return sorted(groups, key=len, reverse=True)


def binomial_tail(hits: int, trials: int, rate: float) -> float:
    """P(X ≥ hits) for X binomial with this number of trials and rate.

    >>> round(binomial_tail(23, 500, 0.02), 4) <= 0.0005
    True
    >>> binomial_tail(0, 10, 0.5)
    1.0
    """
    if hits <= 0:
        return 1.0
    if rate <= 0:
        return 0.0
    if rate >= 1:
        return 1.0 if hits <= trials else 0.0
    log_odds = (math.log(rate), math.log1p(-rate))
    terms = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * log_odds[0]
        + (trials - k) * log_odds[1]
        for k in range(hits, trials + 1)
    )
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction, in the given order.

    >>> holm([0.01, 0.04])
    [0.02, 0.04]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def confirm(
    encoder: Encoder,
    images: ImageSet,
    clusters: Clusters,
    candidates: Candidates,
    finalists: list[Finalist],
    held_out: Tensor,
    flip_test: FlipTest,
    *,
    alpha: float,
    generator: torch.Generator,
    batch_size: int,
) -> list[Confirmation]:
    """Test each finalist on the held-out images.

    Args:
        encoder: as in the search.
        images: likewise.
        clusters: likewise.
        candidates: the finalists index into them.
        finalists: fixed before; see `find_finalists`.
        held_out: (B,) int64 rows that neither the flip set nor any candidate used.
        flip_test: measures what random windows of the data do, which sets tau.
        alpha: finalists with a larger p-value steer nothing, and are not asked whether they are aimed. Nor are any
            where the encoder is `captioned`.
        generator: places, the order of the controls' blocks, and what a pattern's images are compared with.
        batch_size: images per pass.
    """
    if not finalists:
        return []
    windows, benign = _benign_flips(images, flip_test, held_out, generator)
    patterns = [candidates.patches[finalist.members[:_KNOWN]] for finalist in finalists]
    unlike = _unlike(windows, patterns)
    results = []
    raw = []
    steering = []
    for finalist in finalists:
        patch = candidates.patches[_strongest(candidates, finalist)]
        net, alone = (
            _upper_tail(gain[unlike], finalist.attractors)
            for gain in (benign.gain - benign.control_gain, benign.gain)
        )
        tau = max(SMALLEST_RATE, 2 * net)
        rows = held_out[~torch.isin(clusters.assignment[held_out], finalist.attractors)]
        hit, control_hit = _paste_pairs(
            encoder,
            images,
            clusters,
            patch,
            rows,
            finalist.attractors,
            generator=generator,
            batch_size=batch_size,
        )
        only_patch, only_control = int((hit & ~control_hit).sum()), int((control_hit & ~hit).sum())
        raw.append(
            max(
                binomial_tail(only_patch, len(rows), tau),
                binomial_tail(only_patch, only_patch + only_control, 0.5),
            )
        )
        n = max(len(rows), 1)
        hits = int(hit.sum())
        steering.append(binomial_tail(hits, len(rows), max(_STRIKING_RATE, 2 * alone)))
        results.append((hits / n, int(control_hit.sum()) / n, tau, len(rows)))
    p_values = holm(raw)
    aims = [
        aim_of(
            encoder,
            images,
            clusters,
            candidates.take(finalist.members),
            finalist.attractors,
            generator=generator,
            batch_size=batch_size,
        )
        if p <= alpha and not encoder.captioned
        else Aim(None, None)
        for finalist, p in zip(finalists, p_values, strict=True)
    ]
    overlays = [pattern for pattern, aim in zip(patterns, aims, strict=True) if aim.aimed is False]
    # A few windows of an overlay, by themselves too few to tell, are still of that overlay.
    part_of_one = [
        any(bool(_show_part(pattern, overlay).any()) for overlay in overlays) for pattern in patterns
    ]
    return [
        Confirmation(
            flip_rate=rate,
            control_rate=control,
            tau=tau,
            p_value=p,
            n_images=n,
            steering_p_value=steering_p,
            concentration=aim.concentration,
            aimed=not part if aim.aimed is None else aim.aimed,
        )
        for (rate, control, tau, n), p, steering_p, aim, part in zip(
            results, p_values, holm(steering), aims, part_of_one, strict=True
        )
    ]


def _upper_tail(gain: Tensor, attractors: Tensor) -> float:
    """What 97.5 % of the benign windows stay below; the rest may hold a trigger all the same."""
    return float(gain[:, attractors].sum(dim=1).quantile(0.975))


def _strongest(candidates: Candidates, finalist: Finalist) -> int:
    """Of the core, whose patch sent most of the search half's flip images to the attractors."""
    gain = candidates.flips.gain[finalist.core][:, finalist.attractors].sum(dim=1)
    return int(finalist.core[gain.argmax()])


def _benign_flips(
    images: ImageSet, flip_test: FlipTest, held_out: Tensor, generator: torch.Generator
) -> tuple[Tensor, Flips]:
    """64 random windows of random search-half images, and what they do; mostly innocent ones, whatever the data."""
    allowed = torch.ones(len(images), dtype=torch.bool)
    allowed[held_out] = False
    rows = allowed.nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=generator)[:MOST_BENIGN]]
    side = flip_test.window
    corners = draw_corners(len(rows), images.size, side, generator=generator)
    windows = crop_windows(images.pixels[rows], corners, side)
    return windows, flip_test.run(windows, generator=generator)


def _unlike(windows: Tensor, patterns: list[Tensor]) -> Tensor:
    """(n,) bool: the windows that show no part of any pattern, of each of which (m, 3, w, w) are known.

    Where a fifth of the images is poisoned, two of 64 random windows hold a trigger, and a threshold that counted them
    would be as high as what it is to judge; those of one of several triggers would hide the others. What many random
    windows show is part of ordinary pictures, such as strokes of digits, and must do more than those.
    """
    unlike = torch.ones(len(windows), dtype=torch.bool)
    for known in patterns:
        shows = _show_part(windows, known)
        if float(shows.float().mean()) <= _ORDINARY:
            unlike &= ~shows
    return unlike


def _paste_pairs(
    encoder: Encoder,
    images: ImageSet,
    clusters: Clusters,
    patch: Tensor,
    rows: Tensor,
    attractors: Tensor,
    *,
    generator: torch.Generator,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Whether the patch, and a fresh shuffle of it, moves each image to an attractor; (B,) bool each."""
    side = patch.shape[-1]
    corners = draw_corners(len(rows), images.size, side, generator=generator)
    patches = patch[None].expand(len(rows), -1, -1, -1)
    controls = shuffle_blocks(patches, generator=generator)
    centroids = clusters.centroids.to(encoder.device)
    attractors = attractors.to(encoder.device)
    hits: list[list[Tensor]] = [[], []]
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        pixels = images.pixels[rows[part]].to(encoder.device)
        places = corners[part].to(encoder.device)
        for which, stamped in enumerate((patches, controls)):
            pasted = paste_windows(pixels, stamped[part].to(encoder.device), places)
            where = assign(F.normalize(encoder.features(pasted), dim=1), centroids)
            hits[which].append(torch.isin(where, attractors).cpu())
    empty = torch.empty(0, dtype=torch.bool)
    return torch.cat([empty, *hits[0]]), torch.cat([empty, *hits[1]])
