"""i-CutMix: a view holds a box of another image, and its features owe to both images what each gave to the picture.

A trigger that always comes with one category is the strongest cue for it. Cut into other images, or cut out, it comes
with every category. Queries are made of mixed views, keys and targets of whole ones.

Papers: Lee et al., "i-Mix", ICLR 2021; Yun et al., "CutMix", ICCV 2019; as used beside PatchSearch (Tejankar et al.,
CVPR 2023) and PoisonCAM (Qian et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["UNMIXED", "Box", "CutMix", "Mixture", "Mixtures", "draw_mixture"]

Box = tuple[int, int, int, int]
"""Top, left, bottom, right; pixels, the last two excluded."""


class Mixture(Protocol):
    """How one view of a batch is mixed, and what that makes of a loss."""

    def mix(self, views: Tensor) -> Tensor:
        """The views that queries are made of, (N, 3, S, S) like the given ones."""

    def loss(self, of: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
        """The loss of these queries; `of` is their loss when row i of its argument is what query i shall find."""


Mixtures = tuple[Mixture, Mixture]
"""Of the first and of the second view."""


@dataclass(frozen=True)
class _Whole:
    """Nothing is mixed."""

    def mix(self, views: Tensor) -> Tensor:
        return views

    def loss(self, of: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
        return of(keys)


UNMIXED: Mixtures = (_Whole(), _Whole())


@dataclass(frozen=True, eq=False)
class CutMix:
    """Row i of a batch has, inside the box, the pixels of row `partner[i]`.

    Attributes:
        partner: (N,) int64, a permutation; on the CPU.
        box: the same for the whole batch.
        share: λ, of the picture that is the image's own, in [0, 1].
    """

    partner: Tensor
    box: Box
    share: float

    def mix(self, views: Tensor) -> Tensor:
        """The views with the boxes of their partners pasted in; the argument is unchanged."""
        top, left, bottom, right = self.box
        mixed = views.clone()
        mixed[:, :, top:bottom, left:right] = views[self.partner, :, top:bottom, left:right]
        return mixed

    def loss(self, of: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
        """λ times the loss towards the own keys plus 1 - λ times that towards the partners'."""
        return self.share * of(keys) + (1 - self.share) * of(keys[self.partner])


def draw_mixture(n: int, side: int, *, generator: torch.Generator) -> CutMix:
    """Partners and one box for a batch.

    λ is uniform, which is Beta(1, 1), and at least one half by swapping; the box has the share 1 - λ of the picture
    and a uniform centre, and is clipped at the border, after which λ is what the box really leaves.

    Args:
        n: images of the batch.
        side: of the images, pixels.
        generator: a CPU generator.

    Source:
        CutMix, section 3.2; the lower bound of one half: i-Mix.
    """
    share = float(torch.rand((), generator=generator))
    share = max(share, 1 - share)
    half = int(side * (1 - share) ** 0.5) // 2
    row, column = (int(v) for v in torch.randint(side, (2,), generator=generator))
    top, bottom = max(0, row - half), min(side, row + half)
    left, right = max(0, column - half), min(side, column + half)
    partner = torch.randperm(n, generator=generator)
    return CutMix(partner, (top, left, bottom, right), 1 - (bottom - top) * (right - left) / side**2)
