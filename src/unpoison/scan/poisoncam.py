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
from unpoison.functional.windows import (
    attention_map,
    block_masks,
    crop_windows,
    grid_masks,
    hide,
    hottest_windows,
    paste_windows,
    pixel_masks,
    random_masks,
)
from unpoison.records import Clusters
from unpoison.scan.config import ScanConfig

__all__ = ["MaskAttention", "activation_scores", "margin_drop", "sharpen_windows"]


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
    # Views that hide nothing differ by rounding, about 1e-7, which must not be stretched to [0, 1].
    scaled = torch.where(spread > 1e-6, (distance - lowest) / spread.clamp_min(1e-6), 0.0)
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


def sharpen_windows(
    encoder: Encoder,
    pixels: Tensor,
    corners: Tensor,
    direction: Tensor,
    side: int,
    *,
    carriers: Tensor,
    batch_size: int,
) -> Tensor:
    """Windows moved to where they hold most of what pushes along a direction.

    Masks half a window apart leave the corner up to half a window uncertain. Each image tries the eight neighbours
    of its window at a third of the side, then at half that step, and so on down to one pixel. A window is good if
    hiding it takes the image back along the direction, and if pasting it takes other images forward: a trigger may be
    broken by hiding any part of it, but works elsewhere only when it is whole.

    Args:
        encoder: shown nine times (1 + c) views of each image and step.
        pixels: (N, 3, S, S) uint8.
        corners: (N, 2) int64, the windows to start from.
        direction: (D,) unit length, in feature space.
        side: of the windows, pixels.
        carriers: (c, 3, S, S) uint8, images to paste on, c ≥ 1.
        batch_size: images per pass.

    Returns:
        (N, 2) int64 corners, each window inside its image.
    """
    colour = torch.tensor(encoder.preprocessing.mean).mul(255).round().to(torch.uint8).to(encoder.device)
    axis = direction.to(encoder.device)
    blank = colour.view(1, 3, 1, 1)
    # The window itself comes first, so that it stays where nothing is better.
    around = torch.tensor(sorted(((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)), key=lambda p: p != (0, 0)))
    per_pass = max(1, batch_size // (len(around) * (1 + len(carriers))))

    def along(images: Tensor, patches: Tensor, places: Tensor) -> Tensor:
        return F.normalize(encoder.features(paste_windows(images, patches, places)), dim=1) @ axis

    step = -(-side // 3)
    while True:
        tried = (corners[:, None] + step * around).clamp(0, pixels.shape[-1] - side)
        gains = [torch.empty(0, len(around))]
        for start in range(0, len(pixels), per_pass):
            rows = slice(start, start + per_pass)
            views = pixels[rows].to(encoder.device).repeat_interleave(len(around), dim=0)
            places = tried[rows].flatten(0, 1).to(encoder.device)
            windows = crop_windows(views, places, side)
            gain = -along(views, blank.expand(len(views), -1, side, side), places)
            for carrier in carriers.to(encoder.device):
                gain += along(carrier.expand(len(views), -1, -1, -1), windows, places) / len(carriers)
            gains.append(gain.view(-1, len(around)).cpu())
        corners = tried[torch.arange(len(tried)), torch.cat(gains).argmax(dim=1)]
        if step == 1:
            return corners
        step = -(-step // 2)


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
            strategies = {"random": random_masks, "blocks": block_masks, "pixels": pixel_masks}
            assert config.masks is not None, "the config is resolved before the search"
            masks = strategies[config.masks](size, self.window, config.n_masks, generator=generator)
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
