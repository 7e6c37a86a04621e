"""PoisonCAM: hide one window after another, and see which one holds the image in its cluster.

Finds: where in an image a localised trigger would lie. Assumes that hiding the trigger moves a poisoned image towards
another cluster. Misses: triggers that are everywhere (CTRL, blended), several copies in one image, triggers much
larger than the window.

Paper: Qian et al., "Erasing Self-Supervised Learning Backdoor by Cluster Activation Masking", 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.functional.clustering import similarity
from unpoison.functional.windows import attention_map, grid_masks, hide, hottest_windows, random_masks
from unpoison.records import Clusters
from unpoison.scan.config import ScanConfig

__all__ = ["MaskAttention", "activation_scores", "margin_drop"]


def activation_scores(similarities: Tensor, own: Tensor) -> Tensor:
    """PoisonCAM's score of each mask: 1 if it changes the cluster, else the scaled distance to the centroid.

    Args:
        similarities: (N, M, K) cosine of every masked view with every centroid.
        own: (N,) int64, cluster of the unmasked image; breaks ties of the mode.

    Returns:
        (N, M) float32 in [0, 1].

    Source:
        PoisonCAM, equation 2. The mode is taken over the masked views; distances are scaled over the views that
        kept it, since the others' belong to another centroid and are never used.
    """
    n_clusters = similarities.shape[2]
    views = similarities.argmax(dim=2)
    votes = F.one_hot(views, n_clusters).sum(dim=1).float()
    votes.scatter_add_(1, own[:, None], torch.full((len(own), 1), 0.5, device=votes.device))
    mode = votes.argmax(dim=1)
    kept = views == mode[:, None]
    distance = 1 - similarities.gather(2, mode[:, None, None].expand(-1, views.shape[1], 1))[:, :, 0]
    lowest = torch.where(kept, distance, torch.inf).amin(dim=1, keepdim=True)
    highest = torch.where(kept, distance, -torch.inf).amax(dim=1, keepdim=True)
    spread = highest - lowest
    scaled = torch.where(spread > 0, (distance - lowest) / spread.clamp_min(1e-12), 0.0)
    return torch.where(kept, scaled, 1.0)


def margin_drop(similarities: Tensor, unmasked: Tensor) -> Tensor:
    """How much of the margin to the second cluster each mask takes away; continuous where equation 2 has a step.

    Args:
        similarities: (N, M, K) cosine of every masked view with every centroid.
        unmasked: (N, K) the same of the image itself.

    Returns:
        (N, M) float32, ≥ 0.
    """
    own = unmasked.argmax(dim=1)
    others = F.one_hot(own, unmasked.shape[1]).bool()

    def margin(values: Tensor, mine: Tensor, taken: Tensor) -> Tensor:
        return values.gather(-1, mine)[..., 0] - values.masked_fill(taken, -torch.inf).amax(dim=-1)

    before = margin(unmasked, own[:, None], others)
    index = own[:, None, None].expand(-1, similarities.shape[1], 1)
    after = margin(similarities, index, others[:, None].expand_as(similarities))
    return (before[:, None] - after).clamp_min(0)


class MaskAttention:
    """Attention of images by masking.

    Args:
        encoder: the encoder under suspicion.
        clusters: fixed before.
        config: resolved settings.
        generator: draws the random masks; unused by the grid.
        batch_size: images per pass.
    """

    def __init__(
        self,
        encoder: Encoder,
        clusters: Clusters,
        config: ScanConfig,
        *,
        generator: torch.Generator,
        batch_size: int,
    ) -> None:
        size = encoder.preprocessing.geometry.size
        assert config.window is not None, "the config is resolved before the search"
        self.encoder = encoder
        self.centroids = clusters.centroids.to(encoder.device)
        self.window = config.window
        self.faithful = config.faithful
        self.batch_size = batch_size
        if config.masks == "grid":
            masks = grid_masks(size, self.window, max(1, self.window // 2))
        else:
            masks = random_masks(size, self.window, config.n_masks, generator=generator)
        self.masks = masks.to(encoder.device)
        colour = torch.tensor(encoder.preprocessing.mean if config.fill == "mean" else (0.0, 0.0, 0.0))
        self.fill = (colour * 255).round().to(torch.uint8).to(encoder.device)

    def heat(self, pixels: Tensor) -> Tensor:
        """Attention of (N, 3, S, S) uint8 images, (N, S, S) float32 ≥ 0 on the CPU."""
        parts = []
        for chunk in self._chunks(pixels):
            unmasked = similarity(self.encoder.features(chunk), self.centroids)
            masked = similarity(self._masked_features(chunk), self.centroids).view(
                len(chunk), len(self.masks), -1
            )
            if self.faithful:
                scores = activation_scores(masked, unmasked.argmax(dim=1))
            else:
                scores = margin_drop(masked, unmasked)
            parts.append(attention_map(scores, self.masks, by_coverage=not self.faithful).cpu())
        return torch.cat(parts)

    def heat_along(self, pixels: Tensor, directions: Tensor) -> Tensor:
        """How much of each direction in feature space every pixel carries, (N, m, S, S) float32 ≥ 0 on the CPU.

        Hiding a trigger takes the image back along the direction in which the trigger pushes others. Looking along
        that one direction drops what the window's edges and the hidden object do in all the others.

        Args:
            pixels: (N, 3, S, S) uint8.
            directions: (m, D) unit length.
        """
        directions = directions.to(self.encoder.device)
        parts = []
        for chunk in self._chunks(pixels):
            along = F.normalize(self._masked_features(chunk), dim=1) @ directions.T
            drop = -along.view(len(chunk), len(self.masks), -1).transpose(1, 2).flatten(0, 1)
            heat = attention_map(drop - drop.amin(dim=1, keepdim=True), self.masks)
            parts.append(heat.view(len(chunk), len(directions), *heat.shape[1:]).cpu())
        return torch.cat(parts)

    def windows(self, heat: Tensor) -> Tensor:
        """(N, 2) corners of the hottest windows."""
        return hottest_windows(heat, self.window)[:, 0]

    def _chunks(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return torch.split(pixels.to(self.encoder.device), max(1, self.batch_size // len(self.masks)))

    def _masked_features(self, pixels: Tensor) -> Tensor:
        hidden = hide(pixels, self.masks, self.fill)
        return torch.cat([self.encoder.features(part) for part in torch.split(hidden, self.batch_size)])
