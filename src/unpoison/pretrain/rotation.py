"""RotNet: by which quarter turn was the picture rotated? No two images are ever compared.

A control: a task that each image answers alone has no use for a patch that many images share.

Paper: Gidaris, Singh, Komodakis: "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.pretrain.recipe import Recipe

__all__ = ["Rotation", "four_turns"]


def four_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every image upright and turned left by 90, 180 and 270 degrees, and by how many quarters each was turned.

    Args:
        images: (N, C, S, S).

    Returns:
        (4N, C, S, S): all of them upright, then all turned once, and so on; (4N,) int64 in 0..3.

    >>> four_turns(torch.tensor([[[[1, 2], [3, 4]]]]))[0].flatten(1).tolist()
    [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]
    """
    turned = torch.cat([torch.rot90(images, quarters, (2, 3)) for quarters in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


class Rotation(nn.Module):
    """The trained module of RotNet; `backbone` is what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`).
        feature_size: D of the backbone.
        recipe: nothing of it concerns the module: its head is one linear layer.
    """

    RECIPE: ClassVar[Recipe] = Recipe()
    MIXES: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, feature_size: int, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(feature_size, 4)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Cross entropy of the turns of `first`, (N, 3, S, S) normalised views; `second` is not needed."""
        turned, quarters = four_turns(first)
        logits = self.head(self.backbone(turned.contiguous(memory_format=torch.channels_last)))
        return F.cross_entropy(logits.float(), quarters)

    def after_step(self, done: float) -> None:
        """RotNet has no state beside its weights."""
