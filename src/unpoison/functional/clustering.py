"""Spherical k-means and the one `assign()` that every stage uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unpoison.errors import ConfigError, ShapeError
from unpoison.records import Clusters

__all__ = ["assign", "kmeans", "similarity"]

_BLOCK = 2048
"""Features whose cosines are worked out at once."""


def similarity(features: Tensor, centroids: Tensor) -> Tensor:
    """Cosine of every feature with every unit centroid, in float32 whatever the input's dtype.

    Args:
        features: (N, D) float, any positive scale; they are normalised here, so the scale cannot matter.
        centroids: (K, D) float32, unit length.

    Returns:
        (N, K) float32 in [-1, 1].

    Raises:
        ShapeError: the two do not have the same number of columns.
    """
    if features.ndim != 2 or centroids.ndim != 2 or features.shape[1] != centroids.shape[1]:
        raise ShapeError(
            f"features must be (N, D) and centroids (K, D), got {tuple(features.shape)} and {tuple(centroids.shape)}"
        )
    # Autocast would round the products to bfloat16 and so decide ties by noise.
    with torch.autocast(features.device.type, enabled=False):
        return torch.nn.functional.normalize(features.float(), dim=1) @ centroids.T


def assign(features: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each feature by cosine; ties go to the lowest index.

    The releases normalise on one side of the comparison only, so that pasting nothing already moves images
    (algorithms: "the metric mismatch to avoid"). Here one function serves training and patched images alike.

    Returns:
        (N,) int64.

    >>> assign(torch.tensor([[3.0, 0.1], [0.0, 0.5]]), torch.eye(2))
    tensor([0, 1])
    """
    return similarity(features, centroids).argmax(dim=1)


def kmeans(
    features: Tensor,
    n_clusters: int,
    *,
    generator: torch.Generator,
    iterations: int = 25,
    progress: Callable[[int, int], None] | None = None,
) -> Clusters:
    """Spherical k-means: centroids are renormalised means, distance is cosine.

    Args:
        features: (N, D) float32, rows of unit length.
        n_clusters: K, 1..N.
        generator: draws the k-means++ start.
        iterations: at most this many; it stops early when no assignment changes.
        progress: called with (done, total) iterations.

    Returns:
        Clusters with K unit centroids. A centroid that loses all its images is put on the image that is farthest
        from its own centroid, so that no cluster is empty unless images coincide.

    Raises:
        ConfigError: fewer images than clusters.
    """
    if not 1 <= n_clusters <= len(features):
        raise ConfigError(
            f"{n_clusters} clusters for {len(features)} images: expected 1 to {len(features)}; lower --clusters"
        )
    centroids = _plus_plus(features, n_clusters, generator)
    assignment = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
    for iteration in range(iterations):
        cosine, nearest = _nearest(features, centroids)
        if torch.equal(nearest, assignment):
            break
        assignment = nearest
        centroids = _update(features, assignment, cosine, centroids)
        if progress is not None:
            progress(iteration + 1, iterations)
    return Clusters(centroids, _nearest(features, centroids)[1])


def _nearest(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine with the nearest centroid, and its number: (N,) float32 and int64, as `assign` gives it.

    By blocks that stay in the processor's cache: all cosines at once would take N · K · 4 bytes, and more time.
    """
    found = [similarity(block, centroids).max(dim=1) for block in torch.split(features, _BLOCK)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def _plus_plus(features: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each further start is drawn with probability proportional to the squared chord distance."""
    draws = torch.rand(n_clusters, generator=generator, dtype=torch.float64)
    chosen = [int(draws[0] * len(features))]
    distance = torch.full((len(features),), torch.inf, dtype=torch.float64, device=features.device)
    for k in range(1, n_clusters):
        latest = (1 - features @ features[chosen[-1]]).clamp_min(0).double()
        distance = torch.minimum(distance, latest)
        distance[chosen[-1]] = 0
        cumulative = distance.cumsum(0)
        if cumulative[-1] > 0:
            row = int(
                torch.searchsorted(cumulative, draws[k].to(cumulative.device) * cumulative[-1], right=True)
            )
        else:  # every image coincides with a start already: any row will do
            row = int(draws[k] * len(features))
        chosen.append(min(row, len(features) - 1))
    return features[torch.tensor(chosen, device=features.device)].clone()


def _update(features: Tensor, assignment: Tensor, cosine: Tensor, previous: Tensor) -> Tensor:
    """Renormalised means; an empty cluster restarts on the worst-represented image."""
    sums = torch.zeros_like(previous).index_add_(0, assignment, features)
    counts = torch.bincount(assignment, minlength=len(previous))
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        farthest = cosine.argsort(stable=True)[: len(empty)]
        sums[empty] = features[farthest]
    # Opposite features can cancel to a zero sum; such a centroid stays where it was.
    norms = sums.norm(dim=1, keepdim=True)
    return torch.where(norms > 1e-12, sums / norms.clamp_min(1e-12), previous)
