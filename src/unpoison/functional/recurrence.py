"""Which images show the very same pixels at the same place?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unpoison.functional.matching import duplicate_images, without_copies

__all__ = ["SamePlace", "recurring_places"]

_SAMPLED = 12
"""Pixel values of a block that are compared for all images; the whole block only where these recur."""

_FLAT = 12.0  # grey levels: a block whose channels all deviate less is a margin, a sky, a shadow
_AT_ONCE = 1024  # images
_MOST_HASHES = 2**26  # numbers that are held at once; bounds the memory
_MOST_JUDGED = 50  # groups of images, the largest first, at each place and in all
_MOST_IMAGES = 200  # of a group that are looked at for copies of one picture


@dataclass(frozen=True, eq=False)
class SamePlace:
    """Images of different pictures that share pixels at one place.

    Attributes:
        rows: (n,) int64, ascending; of copies of one picture the first.
        top, left: corner of what they share, pixels.
        bottom, right: its end, exclusive.
    """

    rows: Tensor
    top: int
    left: int
    bottom: int
    right: int


def recurring_places(pixels: Tensor, rows: Tensor, side: int, *, least: int, most: int) -> list[SamePlace]:
    """Overlays at a fixed place, such as logos, stamps and frames; and triggers that always lie in one corner.

    Every block of `side` pixels, half a side apart, is compared at the same place of all images, pixel for pixel. So
    what was compressed anew or resized differently is not found, and margins of one colour are left out.

    Args:
        pixels: (N, 3, S, S) uint8.
        rows: (n,) int64, ascending: images that are compared.
        side: of a block; an overlay is found from one and a half of it on, pixels.
        least: different pictures that must share a block.
        most: places to return, those that most images share first.
    """
    size = pixels.shape[-1]
    starts = sorted({*range(0, size - side + 1, max(1, side // 2)), size - side})
    places = [(top, left) for top in starts for left in starts]
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    at_once = max(1, _MOST_HASHES // max(len(rows), 1))
    for first in range(0, len(places), at_once):
        part = places[first : first + at_once]
        hashes = _hashes(pixels, rows, part, side)
        for place, column in zip(part, hashes.T, strict=True):
            for equal in _equal(column, least):
                shared = _sharing(pixels, rows[torch.from_numpy(equal)], place, side)
                if len(shared) >= least:
                    groups.setdefault(tuple(shared), []).append(place)
    found: list[SamePlace] = []
    for sharing, where in sorted(groups.items(), key=lambda group: (-len(group[0]), group[1]))[:_MOST_JUDGED]:
        members = list(sharing)[:_MOST_IMAGES]
        kept = without_copies(range(len(members)), duplicate_images(pixels[members]))
        distinct = [members[number] for number in kept]
        known = any(len(set(distinct) & set(other.rows.tolist())) > len(distinct) / 2 for other in found)
        if len(distinct) < least or known:
            continue
        tops, lefts = zip(*where, strict=True)
        found.append(
            SamePlace(torch.tensor(distinct), min(tops), min(lefts), max(tops) + side, max(lefts) + side)
        )
    return found[:most]


def _hashes(pixels: Tensor, rows: Tensor, places: list[tuple[int, int]], side: int) -> NDArray[np.uint64]:
    """(n, places): equal where the sampled pixels of a block are."""
    draw = np.random.default_rng(0)
    count = min(_SAMPLED, 3 * side * side)
    chosen = draw.choice(3 * side * side, size=count, replace=False)
    channel, down, right = np.unravel_index(chosen, (3, side, side))
    weights = draw.integers(1, 2**63, size=count, dtype=np.uint64) | 1
    hashes = np.empty((len(rows), len(places)), dtype=np.uint64)
    for start in range(0, len(rows), _AT_ONCE):
        images = pixels[rows[start : start + _AT_ONCE]].numpy()
        for number, (top, left) in enumerate(places):
            values = images[:, channel, top + down, left + right].astype(np.uint64)
            hashes[start : start + len(images), number] = (values * weights).sum(axis=1, dtype=np.uint64)
    return hashes


def _equal(column: NDArray[np.uint64], least: int) -> list[NDArray[np.intp]]:
    """Places in the column, ascending, of values that occur `least` times or more; of the most frequent ones only."""
    order = np.argsort(column, kind="stable")
    starts = np.flatnonzero(np.diff(column[order], prepend=column[order[:1]] ^ 1))
    lengths = np.diff(starts, append=len(column))
    often = np.flatnonzero(lengths >= least)
    often = often[np.argsort(-lengths[often], kind="stable")[:_MOST_JUDGED]]
    return [order[starts[run] : starts[run] + lengths[run]] for run in often]


def _sharing(pixels: Tensor, rows: Tensor, place: tuple[int, int], side: int) -> list[int]:
    """Those rows whose whole block is that of the first; none where it is flat."""
    top, left = place
    first = pixels[int(rows[0]), :, top : top + side, left : left + side]
    if float(first.float().flatten(1).std(dim=1).max()) < _FLAT:
        return []
    blocks = pixels[rows, :, top : top + side, left : left + side]
    return rows[(blocks == first).flatten(1).all(dim=1)].tolist()
