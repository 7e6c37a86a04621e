"""BYOL: from one view, the online network predicts what its moving average, the target, sees in the other.

There are no negatives. What keeps the features apart is the predictor, the slow target and the batch normalisation in
the heads; without them all features fall together, so that the loop watches for it.

Paper: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.pretrain.heads import projection_head
from unpoison.pretrain.i_cutmix import UNMIXED, Mixtures
from unpoison.pretrain.moving_average import follow, follower, rising_momentum
from unpoison.pretrain.recipe import Recipe

__all__ = ["BYOL", "prediction_error"]


def prediction_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of the unit vectors, which is 2 - 2 cos.

    Args:
        prediction: (N, D) float, any length.
        target: likewise; row i of both shows the same image.

    Returns:
        Scalar float32 in [0, 4].

    Source:
        BYOL, equation 2.
    """
    prediction, target = (F.normalize(v.float(), dim=1) for v in (prediction, target))
    return 2 - 2 * (prediction * target).sum(dim=1).mean()


class BYOL(nn.Module):
    """The trained module of BYOL; `backbone` (the online network's) is what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`).
        feature_size: D of the backbone.
        recipe: momentum of the moving average that makes the target network, at the start (it rises to 1); sizes of
            projection and prediction head.
    """

    RECIPE: ClassVar[Recipe] = Recipe(key_momentum=0.99)
    MIXES: ClassVar[bool] = True

    def __init__(self, backbone: nn.Module, feature_size: int, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.key_momentum is not None, "BYOL's own recipe has it"
        self.backbone = backbone
        self.projector = projection_head(feature_size, recipe.head_hidden, recipe.head_out)
        self.predictor = projection_head(recipe.head_out, recipe.head_hidden, recipe.head_out)
        self.target_backbone = follower(backbone)
        self.target_projector = follower(self.projector)
        self.momentum = recipe.key_momentum

    def forward(self, first: Tensor, second: Tensor, mixtures: Mixtures = UNMIXED) -> Tensor:
        """The symmetric loss of a batch of two normalised views, (N, 3, S, S) each."""
        mixture_one, mixture_two = mixtures
        one, two = (
            self.predictor(self.projector(self.backbone(mixture.mix(view))))
            for view, mixture in ((first, mixture_one), (second, mixture_two))
        )
        with torch.no_grad():
            to_one, to_two = (self.target_projector(self.target_backbone(view)) for view in (second, first))
        return mixture_one.loss(lambda target: prediction_error(one, target), to_one) + mixture_two.loss(
            lambda target: prediction_error(two, target), to_two
        )

    def after_step(self, done: float) -> None:
        """Move the target network towards the online network."""
        momentum = rising_momentum(self.momentum, done)
        follow(self.target_backbone, self.backbone, momentum)
        follow(self.target_projector, self.projector, momentum)
