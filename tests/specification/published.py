"""PatchSearch and PoisonCAM as published, in loops over numbers: what the fast code has to agree with.

Slow and obvious on purpose. Nothing here imports the package or a tensor library, so that nothing can be wrong in both
for the same reason. Where the papers leave a choice open (ties, mostly), it is made here as docs/fidelity.md says.

A picture is a list of channels of rows of numbers, a map a list of rows, a corner (top, left).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Picture = list[list[list[float]]]
Map = list[list[float]]
Mask = list[list[bool]]
Corner = tuple[int, int]
Encode = Callable[[Picture], list[float]]

SAME = 1e-6
"""Cosines that differ by less are equal: more than float32 can tell apart reliably."""


# --- clusters


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths > 0 else 0.0


def nearest(features: Sequence[float], centroids: Sequence[Sequence[float]]) -> int:
    """The cluster with the largest cosine; of equal ones the first."""
    best = 0
    for k in range(len(centroids)):
        if cosine(features, centroids[k]) > cosine(features, centroids[best]):
            best = k
    return best


def flip_rows(cosines: Sequence[float], assignment: Sequence[int], n_clusters: int, each: int) -> list[int]:
    """The flip set: of every cluster the images nearest to its centroid."""
    rows = []
    for cluster in range(n_clusters):
        members = [row for row in range(len(assignment)) if assignment[row] == cluster]
        members.sort(key=lambda row: -cosines[row])
        rows += members[:each]
    return rows


# --- PoisonCAM: where in a picture?


def cyclic_window(size: int, side: int, corner: Corner) -> Mask:
    """A mask: a square whose parts beyond the border come in again on the other side."""
    mask = [[False] * size for _ in range(size)]
    for y in range(side):
        for x in range(side):
            mask[(corner[0] + y) % size][(corner[1] + x) % size] = True
    return mask


def hidden(picture: Picture, mask: Mask, colour: Sequence[float]) -> Picture:
    copy = [[list(row) for row in channel] for channel in picture]
    for c in range(len(copy)):
        for y in range(len(mask)):
            for x in range(len(mask)):
                if mask[y][x]:
                    copy[c][y][x] = colour[c]
    return copy


def activation_scores(similarities: Sequence[Sequence[float]], own: int) -> list[float]:
    """Equation 2: 1 for a view that leaves the cluster, else its distance, scaled over the views that stay.

    The cluster is the one of most views; of equally many the image's own, else the first.
    """
    views = []
    for view in similarities:
        best = 0
        for k in range(len(view)):
            if view[k] > view[best]:
                best = k
        views.append(best)
    counts = [views.count(k) for k in range(len(similarities[0]))]
    mode = own if counts[own] == max(counts) else counts.index(max(counts))
    distances = [1 - view[mode] for view in similarities]
    staying = [d for d, view in zip(distances, views, strict=True) if view == mode]
    low, high = min(staying), max(staying)
    scores = []
    for distance, view in zip(distances, views, strict=True):
        if view != mode:
            scores.append(1.0)
        elif high - low < SAME:
            scores.append(0.0)
        else:
            scores.append((distance - low) / (high - low))
    return scores


def attention(scores: Sequence[float], masks: Sequence[Mask]) -> Map:
    """Equation 3: the sum of the scores of the masks over each pixel."""
    size = len(masks[0])
    heat = [[0.0] * size for _ in range(size)]
    for y in range(size):
        for x in range(size):
            for score, mask in zip(scores, masks, strict=True):
                if mask[y][x]:
                    heat[y][x] += score
    return heat


def mean_attention(scores: Sequence[float], masks: Sequence[Mask]) -> Map:
    """Equation 3 divided by the number of masks over each pixel; 0 where there is none."""
    size = len(masks[0])
    heat = attention(scores, masks)
    cover = attention([1.0] * len(masks), masks)
    return [[heat[y][x] / cover[y][x] if cover[y][x] else 0.0 for x in range(size)] for y in range(size)]


def poisoncam_heat(
    picture: Picture,
    masks: Sequence[Mask],
    colour: Sequence[float],
    encode: Encode,
    centroids: Sequence[Sequence[float]],
) -> Map:
    """Hide, encode, compare with every centroid, score, add up."""
    similarities = []
    for mask in masks:
        features = encode(hidden(picture, mask, colour))
        similarities.append([cosine(features, centroid) for centroid in centroids])
    return attention(activation_scores(similarities, nearest(encode(picture), centroids)), masks)


# --- PatchSearch: where in a picture?


def slopes(function: Callable[[list[Map]], float], channels: list[Map], step: float = 1e-4) -> list[Map]:
    """How fast a function of a layer's channels changes with each of their cells, by central differences."""
    result = [[[0.0] * len(row) for row in channel] for channel in channels]
    for c in range(len(channels)):
        for y in range(len(channels[c])):
            for x in range(len(channels[c][y])):
                values = []
                for sign in (1, -1):
                    moved = [[list(row) for row in channel] for channel in channels]
                    moved[c][y][x] += sign * step
                    values.append(function(moved))
                result[c][y][x] = (values[0] - values[1]) / (2 * step)
    return result


def grad_cam(channels: list[Map], gradients: list[Map], size: int) -> Map:
    """Channels weighted by their mean slope, what is negative dropped, scaled to [0, 1], enlarged to the picture."""
    rows, columns = len(channels[0]), len(channels[0][0])
    heat = [[0.0] * columns for _ in range(rows)]
    for channel, gradient in zip(channels, gradients, strict=True):
        weight = sum(sum(row) for row in gradient) / (rows * columns)
        for y in range(rows):
            for x in range(columns):
                heat[y][x] += weight * channel[y][x]
    heat = [[max(0.0, value) for value in row] for row in heat]
    low, high = min(min(row) for row in heat), max(max(row) for row in heat)
    for y in range(rows):
        for x in range(columns):
            heat[y][x] = (heat[y][x] - low) / (high - low) if high > low else 0.0
    return enlarged(heat, size)


def enlarged(heat: Map, size: int) -> Map:
    """Bilinear: cell centres stay where they are, beyond the outermost ones the edge goes on."""

    def neighbours(place: int, cells: int) -> tuple[int, int, float]:
        at = max(0.0, (place + 0.5) * cells / size - 0.5)
        first = min(int(at), cells - 1)
        return first, min(first + 1, cells - 1), at - first

    result = [[0.0] * size for _ in range(size)]
    for y in range(size):
        above, below, down = neighbours(y, len(heat))
        for x in range(size):
            left, right, along = neighbours(x, len(heat[0]))
            upper = (1 - along) * heat[above][left] + along * heat[above][right]
            lower = (1 - along) * heat[below][left] + along * heat[below][right]
            result[y][x] = (1 - down) * upper + down * lower
    return result


# --- both: the window, the flip test, the search


def hottest_window(heat: Map, side: int) -> Corner:
    """The square with the most heat; of several the one nearest to the middle of them all, of those the first."""
    totals: dict[Corner, float] = {}
    for top in range(len(heat) - side + 1):
        for left in range(len(heat[0]) - side + 1):
            totals[top, left] = sum(heat[top + y][left + x] for y in range(side) for x in range(side))
    everything = sum(sum(row) for row in heat)
    most = max(totals.values())
    tied = [corner for corner, total in totals.items() if total >= most - 1e-9 * max(everything, 1e-12)]
    middle = [sum(corner[axis] for corner in tied) / len(tied) for axis in (0, 1)]
    chosen = tied[0]
    for corner in tied:
        if _distance(corner, middle) < _distance(chosen, middle):
            chosen = corner
    return chosen


def _distance(corner: Corner, place: Sequence[float]) -> float:
    # Rounded, for two corners on either side of the middle are equally near.
    return round((corner[0] - place[0]) ** 2 + (corner[1] - place[1]) ** 2, 9)


def cut(picture: Picture, corner: Corner, side: int) -> Picture:
    top, left = corner
    return [[row[left : left + side] for row in channel[top : top + side]] for channel in picture]


def pasted(picture: Picture, patch: Picture, corner: Corner) -> Picture:
    copy = [[list(row) for row in channel] for channel in picture]
    for c in range(len(patch)):
        for y in range(len(patch[c])):
            for x in range(len(patch[c][y])):
                copy[c][corner[0] + y][corner[1] + x] = patch[c][y][x]
    return copy


def flips(
    patch: Picture,
    flip_set: Sequence[tuple[Picture, Corner]],
    encode: Encode,
    centroids: Sequence[Sequence[float]],
) -> tuple[list[int], list[int]]:
    """Clusters of the flip images before and after the patch is pasted on them."""
    before = [nearest(encode(picture), centroids) for picture, _ in flip_set]
    after = [nearest(encode(pasted(picture, patch, corner)), centroids) for picture, corner in flip_set]
    return before, after


def any_score(before: Sequence[int], after: Sequence[int]) -> int:
    """PoisonCAM: how many images changed their cluster."""
    return sum(1 for old, new in zip(before, after, strict=True) if old != new)


def source_score(before: Sequence[int], after: Sequence[int], own: int) -> int:
    """PatchSearch: how many images more than before are in the cluster of the patch's own image."""
    return sum(1 for new in after if new == own) - sum(1 for old in before if old == own)


def concentrated_score(before: Sequence[int], after: Sequence[int], n_clusters: int) -> int:
    """The largest gain of any cluster."""
    return max(source_score(before, after, cluster) for cluster in range(n_clusters))


def search(
    queues: Sequence[Sequence[int]],
    order: Sequence[int],
    samples: int,
    prune: float,
    score_of: Callable[[int], float],
    rating: str,
) -> list[tuple[int, float]]:
    """The iterative search: (row, score) in the order in which images are scored.

    Args:
        queues: the images of every cluster, in the order in which they are drawn.
        order: of the clusters; of equally rated ones the first stay.
        samples: images per surviving cluster and round.
        prune: share of the surviving clusters that a round drops, rounded down; the round that would drop none is
            the last.
        score_of: the poison score of one image.
        rating: "sum" of the scores of the round (PoisonCAM; a cluster that could send no image comes last),
            "maximum" of all scores of the cluster so far, an image without one counting 0 (PatchSearch), or
            "maximum of the scored".
    """
    left = [list(queue) for queue in queues]
    scores: dict[int, float] = {}
    scored: list[tuple[int, float]] = []
    alive = list(order)
    while True:
        latest: dict[int, list[float]] = {cluster: [] for cluster in alive}
        for cluster in alive:
            for _ in range(samples):
                if left[cluster]:
                    row = left[cluster].pop(0)
                    scores[row] = score_of(row)
                    scored.append((row, scores[row]))
                    latest[cluster].append(scores[row])
        n_dropped = math.floor(prune * len(alive))
        if n_dropped == 0:
            return scored
        ratings = {}
        for cluster in alive:
            if rating == "sum":
                values = latest[cluster]
                ratings[cluster] = sum(values) if values else -math.inf
            elif rating == "maximum":
                ratings[cluster] = max((scores.get(row, 0.0) for row in queues[cluster]), default=-math.inf)
            else:
                ratings[cluster] = max(
                    (scores[row] for row in queues[cluster] if row in scores), default=-math.inf
                )
        for _ in range(n_dropped):
            worst = alive[0]
            for cluster in alive:
                if ratings[cluster] <= ratings[worst]:
                    worst = cluster
            alive.remove(worst)
        # The best come first in the next round, which decides later ties.
        ranked: list[int] = []
        for cluster in alive:
            place = 0
            while place < len(ranked) and ratings[ranked[place]] >= ratings[cluster]:
                place += 1
            ranked.insert(place, cluster)
        alive = ranked
