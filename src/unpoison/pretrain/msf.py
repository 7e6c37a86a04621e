"""MSF, mean shift: the prediction from one view comes closer to the nearest neighbours of the other view's target.

BYOL pulls a view to its own image; here it is pulled to the mean of a small neighbourhood among recent targets, which
its own image belongs to. Like BYOL it has no negatives.

Paper: Koohpayegani, Tejankar, Pirsiavash: "Mean Shift for Self-Supervised Learning", ICCV 2021.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.pretrain.heads import projection_head
from unpoison.pretrain.memory import Queue
from unpoison.pretrain.moving_average import follow, follower
from unpoison.pretrain.recipe import Recipe

__all__ = ["MSF", "neighbour_error"]

NEIGHBOURS = 5


def neighbour_error(prediction: Tensor, target: Tensor, memory: Tensor, neighbours: int) -> Tensor:
    """Mean squared distance, 2 - 2 cos, of each prediction to the rows of the memory that are nearest to its target.

    Args:
        prediction: (N, D) float, any length.
        target: (N, D) float32, unit length; row i of both shows the same image.
        memory: (Q, D) float32, unit length; holds the targets themselves too.
        neighbours: how many; all rows when there are fewer.

    Returns:
        Scalar float32 in [0, 4].

    Source:
        Mean Shift, section 3.
    """
    with torch.autocast(prediction.device.type, enabled=False):  # bfloat16 would confuse close neighbours
        prediction = F.normalize(prediction.float(), dim=1)
        nearest = (target @ memory.T).topk(min(neighbours, len(memory)), dim=1).indices
        return 2 - 2 * (prediction[:, None] * memory[nearest]).sum(dim=2).mean()


class MSF(nn.Module):
    """The trained module of mean shift; `backbone` (the online network's) is what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`).
        feature_size: D of the backbone.
        recipe: momentum of the moving average that makes the target network, number of recent targets, sizes of
            projection and prediction head.
    """

    RECIPE: ClassVar[Recipe] = Recipe(key_momentum=0.99)
    MIXES: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, feature_size: int, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.key_momentum is not None, "its own recipe has it"
        self.backbone = backbone
        self.projector = projection_head(feature_size, recipe.head_hidden, recipe.head_out)
        self.predictor = projection_head(recipe.head_out, recipe.head_hidden, recipe.head_out)
        self.target_backbone = follower(backbone)
        self.target_projector = follower(self.projector)
        self.momentum = recipe.key_momentum
        self.memory = Queue(recipe.queue_size, recipe.head_out)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of a batch: `first` gives predictions, `second` targets; (N, 3, S, S) normalised views."""
        prediction = self.predictor(self.projector(self.backbone(first)))
        with torch.no_grad():
            target = F.normalize(self.target_projector(self.target_backbone(second)).float(), dim=1)
        self.memory.push(target)  # before the search, so that a target is its own nearest neighbour
        return neighbour_error(prediction, target, self.memory.rows, NEIGHBOURS)

    def after_step(self, done: float) -> None:
        """Move the target network towards the online network."""
        follow(self.target_backbone, self.backbone, self.momentum)
        follow(self.target_projector, self.projector, self.momentum)
