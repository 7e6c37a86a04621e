"""A network that follows another as its moving average: the keys of MoCo, the targets of BYOL."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["follow", "follower", "rising_momentum"]

_M = TypeVar("_M", bound=nn.Module)


def follower(module: _M) -> _M:
    """A copy without gradients; only `follow` moves it."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(moving: nn.Module, trained: nn.Module, momentum: float) -> None:
    """Each weight of `moving` becomes momentum times itself plus (1 - momentum) times its original, in place.

    Statistics of batch normalisation are left alone: the moving network measures its own.
    """
    to: list[Tensor] = list(moving.parameters())
    torch._foreach_lerp_(to, [p.detach() for p in trained.parameters()], 1 - momentum)


def rising_momentum(start: float, done: float) -> float:
    """Half a cosine from `start` to 1 while the share `done` of the training goes from 0 to 1.

    Source:
        BYOL, section 3.3 ("target decay rate"); MoCo v3, appendix A.

    >>> rising_momentum(0.5, 0), rising_momentum(0.5, 0.5), rising_momentum(0.5, 1)
    (0.5, 0.75, 1.0)
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * done)) / 2
