"""BackdoorIDS: hide ever more of one image; a backdoor lets go at once, and the embedding jumps.

Finds: images whose trigger rules the embedding as long as it is seen. Under a growing mask the trigger holds the
embedding in one place until it breaks, then what is left of the picture takes over: two dense groups of embeddings. The
embedding of an innocent image drifts.
Needs: the encoder and nothing else, no training and no clean images; `steps` · `orders` passes per image.
Misses: triggers that give way little by little, and triggers that the mask never breaks.

Paper: Huang, Li, Gao, Yan, Shi, Gao: BackdoorIDS: Zero-shot Backdoor Detection for Pretrained Vision Encoder, 2026,
arXiv 2603.11664. Only its abstract was at hand: number of steps, ratios, fill and radius of DBSCAN are ours. Ours too
is the score: the largest radius at which DBSCAN still finds more than one cluster. The paper's yes or no at a radius is
this score compared with that radius; here the radius is the conformal threshold. Ours, too, are several orders of
hiding: in a single one the first few cells may break the trigger, and the sequence never shows it whole. Hidden cells
show the image's own pixels, shuffled: under one colour all images come to look alike, and where an attacker's target
lies close to that look nothing jumps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.errors import CheckpointError, ConfigError
from unpoison.runtime import stage_generator

__all__ = ["BackdoorIds", "BackdoorIdsConfig", "splitting_radius"]


@dataclass(frozen=True, kw_only=True)
class BackdoorIdsConfig:
    """Settings of BackdoorIDS.

    Attributes:
        steps: length of the sequence of embeddings, the whole image included; 4 to 200.
        most_hidden: share of the image that the last step hides, (0, 1].
        cells: the image is hidden in cells of a grid of so many per side.
        least: images that make a cluster (DBSCAN's minPts, the point itself included), at least 2.
        orders: sequences per image, each hiding the cells in another order; the largest score counts. 1 to 20.
        seed: decides the orders and where hidden pixels come from, which are the same for every image.
    """

    steps: int = 20
    most_hidden: float = 0.95
    cells: int = 8
    least: int = 3
    orders: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 4 <= self.steps <= 200:
            raise ConfigError(f"steps={self.steps}: expected 4 to 200 embeddings")
        if not 0 < self.most_hidden <= 1:
            raise ConfigError(f"most_hidden={self.most_hidden}: expected a share in (0, 1]")
        if not 2 <= self.cells <= 64:
            raise ConfigError(f"cells={self.cells}: expected 2 to 64 per side")
        if not 1 <= self.orders <= 20:
            raise ConfigError(f"orders={self.orders}: expected 1 to 20 sequences per image")
        if not 2 <= self.least <= self.steps // 2:
            raise ConfigError(f"least={self.least}: expected 2 to {self.steps // 2}, half of the steps")


@dataclass(frozen=True, eq=False)
class BackdoorIds:
    """The detector; see `scan.detector.Scorer`. Nothing is fitted."""

    config: BackdoorIdsConfig
    encoder: Encoder

    method: ClassVar[str] = "backdoor-ids"

    def score(self, images: Tensor) -> Tensor:
        """The largest radius at which the embeddings of the ever more hidden image are more than one cluster.

        Args:
            images: (N, 3, S, S) uint8, S as the encoder takes them.

        Returns:
            (N,) float32 in [0, 2]: a cosine distance; 0 where no radius gives two clusters.
        """
        pictures = images.to(self.encoder.device)
        side = images.shape[-1]
        shuffle = torch.randperm(
            side**2, generator=stage_generator(self.config.seed, "scan/backdoor-ids/cover")
        )
        cover = pictures.flatten(2)[:, :, shuffle].view_as(pictures)
        best = torch.zeros(len(images))
        for order in range(self.config.orders):
            hidden = self._masks(side, order).to(self.encoder.device)
            sequence = [self.encoder.features(torch.where(mask, cover, pictures)).cpu() for mask in hidden]
            best = torch.maximum(best, splitting_radius(torch.stack(sequence, dim=1), self.config.least))
        return best

    def _masks(self, side: int, number: int) -> Tensor:
        """(steps, 1, side, side) bool, growing from none; True = hidden."""
        config = self.config
        count = config.cells**2
        order = torch.randperm(count, generator=stage_generator(config.seed, f"scan/backdoor-ids/{number}"))
        turn = torch.empty(count, dtype=torch.int64)
        turn[order] = torch.arange(count)
        shares = torch.linspace(0, config.most_hidden, config.steps, dtype=torch.float64)
        how_many = (shares * count).round().long()
        masks = (turn[None] < how_many[:, None]).view(config.steps, 1, config.cells, config.cells)
        return F.interpolate(masks.float(), (side, side), mode="nearest") > 0.5

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the settings say all."""
        return {}

    @classmethod
    def restore(
        cls, config: BackdoorIdsConfig, tensors: Mapping[str, Tensor], encoder: Encoder
    ) -> BackdoorIds:
        """The detector of a file.

        Raises:
            CheckpointError: the file holds tensors.
        """
        if tensors:
            raise CheckpointError("a backdoor-ids detector holds no tensors: get another copy")
        return cls(config, encoder)


def splitting_radius(sequences: Tensor, least: int) -> Tensor:
    """The largest radius below which DBSCAN finds more than one cluster in each sequence.

    With a radius r, DBSCAN joins core points (those with `least` points, themselves included, within r) that lie within
    r of each other. Two points are cores of different clusters just below r exactly when both are cores there and every
    path between them has a step as long as r, or a point that becomes a core only at r.

    Args:
        sequences: (N, K, D) floating point; rows need no unit length.
        least: DBSCAN's minPts, 1..K.

    Returns:
        (N,) float32: for all radii from the returned value on, DBSCAN with cosine distance finds at most one cluster;
        just below it two or more; 0 if it never does.
    """
    units = F.normalize(sequences.float(), dim=2)
    distance = (1 - units @ units.transpose(1, 2)).clamp_min(0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    core = distance.sort(dim=2).values[:, :, least - 1]
    both = torch.maximum(core[:, :, None], core[:, None, :])
    path = torch.maximum(distance, both)
    for step in range(path.shape[1]):  # the shortest longest step between any two, through ever more points
        path = torch.minimum(path, torch.maximum(path[:, :, step, None], path[:, step, None, :]))
    return torch.where(path > both, path, 0.0).amax(dim=(1, 2))
