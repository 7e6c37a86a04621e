"""Is a pattern that the encoder obeys an attack, or a watermark? Where its images lie once it is hidden.

Finds: patterns on images of all kinds. In training, such images become a cluster of their own, so that the pattern
moves whatever it is pasted on, as a trigger does. But an attacker needs the pattern on one kind of image, which is what
others are to be taken for; without it, those images lie together, and those of a watermark scatter like any others.
Assumes that the kinds of images lie in different places of feature space, and that there are several.
Doubt is decided against the pattern: what is more than chance counts as aimed.
Misses: a watermark on one kind of image only, which nothing tells from an attack; an attack on the kind of most of
the images, which looks like a watermark; and one whose captions or labels, instead of its images, say the target. An
encoder that is known to have learned from captions is therefore not asked.

Ours; the papers ask only whether a patch steers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.functional.clustering import assign, kmeans
from unpoison.functional.windows import paste_windows
from unpoison.records import Clusters, ImageSet
from unpoison.scan.candidates import Candidates
from unpoison.scan.config import MOST_OTHERS

__all__ = ["Aim", "aim_of", "concentration"]

_GROUPS = 50
"""Groups of clusters in which images are counted, at most: more would need more images with the pattern."""

_DRAWS = 200
"""Samples of those, as many images as carry the pattern, that show what chance does."""

_LIMIT = 1.4
"""Where chance alone reaches this concentration, too few images carry the pattern for a decision.

benchmarks/aim.py shows what attacks and an overlay reach on real victims.
"""


@dataclass(frozen=True)
class Aim:
    """Do the images of a pattern lie together without it?

    Attributes:
        concentration: how much more often two of them share a group of clusters, once the pattern is hidden, than two
            other images do; 1 is like any images. None where fewer than two are left.
        aimed: whether that is more than chance (99 %); None where there are too few images to tell.
    """

    concentration: float | None
    aimed: bool | None


def aim_of(
    encoder: Encoder,
    images: ImageSet,
    clusters: Clusters,
    carriers: Candidates,
    attractors: Tensor,
    *,
    generator: torch.Generator,
    batch_size: int,
) -> Aim:
    """Hide a pattern where it lies, and see where its images go.

    Args:
        encoder: any.
        images: the data set.
        clusters: of its features.
        carriers: the pattern's candidates, one per image.
        attractors: (c,) int64, clusters that it leads to. Images that lie there without it, too, say nothing of where
            they come from, and are left out.
        generator: on the CPU; groups, other images, and samples of them.
        batch_size: images per pass.
    """
    group = kmeans(
        clusters.centroids, min(_GROUPS, len(clusters.centroids)), generator=generator
    ).assignment.cpu()
    group = group.masked_fill(torch.isin(torch.arange(len(group)), attractors), -1)
    other = ~torch.isin(clusters.assignment, attractors)
    other[carriers.rows] = False
    rows = other.nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=generator)[:MOST_OTHERS]]
    corners = carriers.corners[torch.randint(len(carriers), (len(rows),), generator=generator)]

    def groups_without(rows: Tensor, corners: Tensor) -> Tensor:
        where = [torch.empty(0, dtype=torch.int64)]
        for part in torch.split(torch.arange(len(rows)), batch_size):
            hidden = _hide(images.pixels[rows[part]], corners[part], carriers.patches.shape[-1])
            features = F.normalize(encoder.features(hidden.to(encoder.device)), dim=1)
            where.append(assign(features, clusters.centroids.to(features.device)).cpu())
        found = group[torch.cat(where)]
        return found[found >= 0]

    own, usual = groups_without(carriers.rows, carriers.corners), groups_without(rows, corners)
    if len(own) < 2 or len(usual) < 2:
        return Aim(None, None)
    share = (torch.bincount(usual, minlength=_GROUPS) + 0.5) / (len(usual) + 0.5 * _GROUPS)
    samples = usual[torch.randint(len(usual), (_DRAWS, len(own)), generator=generator)]
    by_chance = float(torch.tensor([concentration(sample, share) for sample in samples]).quantile(0.99))
    value = concentration(own, share)
    if value > by_chance:
        return Aim(value, True)
    return Aim(value, None if by_chance > _LIMIT else False)


def concentration(groups: Tensor, share: Tensor) -> float:
    """How often two of these lie in one group, in units of what the shares of the groups let expect.

    Args:
        groups: (n,) int64, n of at least 2.
        share: (G,) positive, of any images in each group.

    >>> concentration(torch.tensor([0, 0, 0]), torch.tensor([0.25, 0.75]))
    4.0
    """
    counts = torch.bincount(groups, minlength=len(share)).double()
    return float((counts * (counts - 1) / share).sum() / (len(groups) * (len(groups) - 1)))


def _hide(pixels: Tensor, corners: Tensor, side: int) -> Tensor:
    """Each (N, 3, S, S) uint8 image with the window at its corner in the image's mean colour."""
    colour = pixels.float().mean(dim=(2, 3)).round().to(torch.uint8)
    return paste_windows(pixels, colour[:, :, None, None].expand(-1, -1, side, side), corners)
