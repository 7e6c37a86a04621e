"""Trigger candidates: a window of an image, and what it did to the flip set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from unpoison.scan.flip_test import Flips

__all__ = ["Candidates"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """n scored images, one window each.

    Attributes:
        rows: (n,) int64, which image.
        own: (n,) int64, its cluster.
        corners: (n, 2) int64, (top, left) of the window.
        patches: (n, 3, w, w) uint8, the window's pixels.
        flips: what the patches did.
    """

    rows: Tensor
    own: Tensor
    corners: Tensor
    patches: Tensor
    flips: Flips

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Candidates:
        """These candidates, in this order."""
        flips = Flips(*(getattr(self.flips, f.name)[index] for f in fields(Flips)))
        return Candidates(self.rows[index], self.own[index], self.corners[index], self.patches[index], flips)

    def better_of(self, other: Candidates, scores: Tensor, other_scores: Tensor) -> Candidates:
        """For each image the window with the higher score; both must hold the same images in the same order."""
        both = Candidates.concatenate([self, other])
        index = torch.arange(len(self))
        return both.take(torch.where(other_scores > scores, index + len(self), index))

    @staticmethod
    def concatenate(parts: Sequence[Candidates]) -> Candidates:
        """All candidates of all parts, in order."""
        tensors = {
            name: torch.cat([getattr(p, name) for p in parts])
            for name in ("rows", "own", "corners", "patches")
        }
        return Candidates(**tensors, flips=Flips.concatenate([p.flips for p in parts]))

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat named tensors, for the stage cache."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "flips"}
        return own | {f"flips.{f.name}": getattr(self.flips, f.name) for f in fields(Flips)}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Candidates:
        """The inverse of `to_tensors`."""
        flips = Flips(**{f.name: tensors[f"flips.{f.name}"] for f in fields(Flips)})
        return Candidates(
            **{f.name: tensors[f.name] for f in fields(Candidates) if f.name != "flips"}, flips=flips
        )
