"""MoCo v2: a query attracts the key of its own image and repels a queue of old keys of other images.

Keys are made by a slowly moving copy of the network.

Paper: He et al., "Momentum Contrast", CVPR 2020; Chen et al., "Improved Baselines with Momentum Contrastive
Learning", 2020. Batch shuffling is left out: on one device it cannot change any statistic of the batch.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.pretrain.heads import projection_head
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
        temperature: T of the loss.
        momentum: m of the moving average that makes the key network.
        queue_size: number of old keys; rounded down to a multiple of the batch while training.
        hidden, out: sizes of the projection head.
    """

    RECIPE: ClassVar[Recipe] = Recipe(temperature=0.2, key_momentum=0.99)

    queue: Tensor
    position: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_size: int,
        *,
        temperature: float,
        momentum: float,
        queue_size: int,
        hidden: int,
        out: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_size, hidden, out)
        self.key_backbone = follower(backbone)
        self.key_projector = follower(self.projector)
        self.temperature = temperature
        self.momentum = momentum
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, out), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self._newest: Tensor | None = None

    @classmethod
    def from_recipe(cls, backbone: nn.Module, feature_size: int, recipe: Recipe) -> Self:
        """The module as `recipe` asks for it."""
        assert recipe.temperature is not None and recipe.key_momentum is not None, "its own recipe has both"
        return cls(
            backbone,
            feature_size,
            temperature=recipe.temperature,
            momentum=recipe.key_momentum,
            queue_size=recipe.queue_size,
            hidden=recipe.head_hidden,
            out=recipe.head_out,
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of a batch: `first` gives the queries, `second` the keys; (N, 3, S, S) normalised views."""
        query = F.normalize(self.projector(self.backbone(first)).float(), dim=1)
        with torch.no_grad():
            key = F.normalize(self.key_projector(self.key_backbone(second)).float(), dim=1)
        loss = info_nce(query, key, self.queue.clone(), self.temperature)
        self._newest = key
        return loss

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """Move the key network towards the query network, and put the newest keys over the oldest."""
        follow(self.key_backbone, self.backbone, self.momentum)
        follow(self.key_projector, self.projector, self.momentum)
        assert self._newest is not None, "after_step follows a forward pass"
        n = min(len(self._newest), len(self.queue))
        start = int(self.position)
        rows = torch.arange(start, start + n, device=self.queue.device) % len(self.queue)
        self.queue[rows] = self._newest[:n]
        self.position.fill_((start + n) % len(self.queue))
        self._newest = None
