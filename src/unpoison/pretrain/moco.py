"""MoCo v2: a query attracts the key of its own image and repels a queue of old keys of other images.

Keys are made by a slowly moving copy of the network.

Paper: He et al., "Momentum Contrast", CVPR 2020; Chen et al., "Improved Baselines with Momentum Contrastive
Learning", 2020. Batch shuffling is left out: on one device it cannot change any statistic of the batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.pretrain.heads import projection_head
from unpoison.pretrain.i_cutmix import UNMIXED, Mixtures
from unpoison.pretrain.memory import Queue
from unpoison.pretrain.moving_average import follow, follower
from unpoison.pretrain.recipe import Recipe

__all__ = ["MoCoV2", "info_nce"]


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding one's own key among the keys of the queue.

    Args:
        query: (N, D) float32, unit length.
        key: likewise; row i of both shows the same image.
        queue: (Q, D) float32, unit length, keys of earlier images.
        temperature: T > 0.

    Returns:
        Scalar float32.

    Source:
        MoCo, equation 1.
    """
    positive = (query * key).sum(dim=1, keepdim=True)
    with torch.autocast(query.device.type, enabled=False):  # differences of logits drown in bfloat16
        logits = torch.cat((positive, query @ queue.T), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


class MoCoV2(nn.Module):
    """The trained module of MoCo v2; `backbone` (the query's) is what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`).
        feature_size: D of the backbone.
        recipe: T of the loss, m of the moving average that makes the key network, number of old keys, sizes of the
            projection head.
    """

    RECIPE: ClassVar[Recipe] = Recipe(temperature=0.2, key_momentum=0.99)
    MIXES: ClassVar[bool] = True

    def __init__(self, backbone: nn.Module, feature_size: int, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.temperature is not None and recipe.key_momentum is not None, "its own recipe has both"
        self.backbone = backbone
        self.projector = projection_head(feature_size, recipe.head_hidden, recipe.head_out)
        self.key_backbone = follower(backbone)
        self.key_projector = follower(self.projector)
        self.temperature = recipe.temperature
        self.momentum = recipe.key_momentum
        self.queue = Queue(recipe.queue_size, recipe.head_out)
        self._newest: Tensor | None = None

    def forward(self, first: Tensor, second: Tensor, mixtures: Mixtures = UNMIXED) -> Tensor:
        """The loss of a batch: `first` gives the queries, `second` the keys; (N, 3, S, S) normalised views."""
        mixture, _ = mixtures
        query = F.normalize(self.projector(self.backbone(mixture.mix(first))).float(), dim=1)
        with torch.no_grad():
            key = F.normalize(self.key_projector(self.key_backbone(second)).float(), dim=1)
        self._newest = key
        old = self.queue.rows.clone()
        return mixture.loss(lambda own: info_nce(query, own, old, self.temperature), key)

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """Move the key network towards the query network, and put the newest keys over the oldest."""
        follow(self.key_backbone, self.backbone, self.momentum)
        follow(self.key_projector, self.projector, self.momentum)
        assert self._newest is not None, "after_step follows a forward pass"
        self.queue.push(self._newest)
        self._newest = None
