"""SimSiam: each view predicts the other's projection, through which no gradient flows; there is no second network.

There are no negatives and no moving average. What keeps the features apart is the predictor and the stopped gradient;
without either all features fall together, so that the loop watches for it.

Paper: Chen, He: "Exploring Simple Siamese Representation Learning", CVPR 2021.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.pretrain.heads import normalised_head, projection_head
from unpoison.pretrain.recipe import Recipe

__all__ = ["SimSiam", "negative_cosine"]


def negative_cosine(prediction: Tensor, projection: Tensor) -> Tensor:
    """Mean of minus the cosine; the projections are taken as given, without gradient.

    Args:
        prediction: (N, D) float, any length.
        projection: likewise; row i of both shows the same image.

    Returns:
        Scalar float32 in [-1, 1].

    Source:
        SimSiam, equations 1 and 3.
    """
    prediction, projection = (F.normalize(v.float(), dim=1) for v in (prediction, projection.detach()))
    return -(prediction * projection).sum(dim=1).mean()


class SimSiam(nn.Module):
    """The trained module of SimSiam; `backbone` is what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`).
        feature_size: D of the backbone.
        recipe: sizes of the projection head (three layers); the prediction head (two) narrows to a quarter.
    """

    RECIPE: ClassVar[Recipe] = Recipe(head_out=512)
    MIXES: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, feature_size: int, recipe: Recipe) -> None:
        super().__init__()
        hidden, out = recipe.head_hidden, recipe.head_out
        self.backbone = backbone
        self.projector = normalised_head((feature_size, hidden, hidden, out))
        self.predictor = projection_head(out, max(1, out // 4), out)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The symmetric loss of a batch of two normalised views, (N, 3, S, S) each."""
        one, two = (self.projector(self.backbone(view)) for view in (first, second))
        return (negative_cosine(self.predictor(one), two) + negative_cosine(self.predictor(two), one)) / 2

    def after_step(self, done: float) -> None:
        """SimSiam has no state beside its weights."""
