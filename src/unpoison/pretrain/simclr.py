"""SimCLR: two views of one image attract, all other images in the batch repel.

Paper: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.pretrain.heads import projection_head
from unpoison.pretrain.i_cutmix import UNMIXED, Mixtures
from unpoison.pretrain.recipe import Recipe

__all__ = ["SimCLR", "nt_xent"]


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy over the 2N views of a batch.

    Args:
        first: (N, D) float, embeddings of the first views.
        second: of the second views; row i of both shows the same image.
        temperature: T > 0.

    Returns:
        Scalar float32.

    Source:
        SimCLR, equation 1.
    """
    views = F.normalize(torch.cat((first, second)).float(), dim=1)
    with torch.autocast(views.device.type, enabled=False):  # differences of logits drown in bfloat16
        logits = views @ views.T / temperature
    logits.fill_diagonal_(-torch.inf)  # a view is no negative of itself
    n = len(first)
    partner = torch.arange(2 * n, device=views.device).roll(n)
    return F.cross_entropy(logits, partner)


class SimCLR(nn.Module):
    """The trained module of SimCLR; `backbone` is what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`).
        feature_size: D of the backbone.
        recipe: T of the loss, sizes of the projection head.
    """

    RECIPE: ClassVar[Recipe] = Recipe(temperature=0.5)
    MIXES: ClassVar[bool] = True

    def __init__(self, backbone: nn.Module, feature_size: int, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.temperature is not None, "SimCLR's own recipe has it"
        self.backbone = backbone
        self.projector = projection_head(feature_size, recipe.head_hidden, recipe.head_out)
        self.temperature = recipe.temperature

    def forward(self, first: Tensor, second: Tensor, mixtures: Mixtures = UNMIXED) -> Tensor:
        """The loss of a batch of two normalised views, (N, 3, S, S) each; of a mixture, `first` alone is mixed."""
        mixture, _ = mixtures
        both = self.projector(self.backbone(torch.cat((mixture.mix(first), second))))
        one, two = both.chunk(2)
        return mixture.loss(lambda partner: nt_xent(one, partner, self.temperature), two)

    def after_step(self, done: float) -> None:
        """SimCLR has no state beside its weights."""
