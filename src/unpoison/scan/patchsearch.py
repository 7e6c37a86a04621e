"""PatchSearch's attention: Grad-CAM of the cluster that holds an image.

Finds: where in an image a localised trigger would lie, in about three passes instead of one per mask. Assumes that the
gradient of the cluster's logit, at one coarse layer, points at the trigger. Misses: what masks miss, and triggers
much smaller than a cell of that layer's map.

The release explains a head that a vision transformer never runs through, and always the last, coarsest stage of a
ResNet. Here the logit is a function of the features themselves, and the layer is the deepest whose map has at least 8×8
cells: a fair opponent of masking. The rest of the search (rounds, flip test, pruning) is `scan/search.py`;
docs/fidelity.md lists what the release does otherwise, and why we do not.

Paper: Tejankar et al., "Defending Against Patch-based Backdoor Attacks on Self-Supervised Learning", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.errors import ConfigError
from unpoison.functional.clustering import similarity
from unpoison.functional.saliency import choose_layer, grad_cam
from unpoison.functional.windows import hottest_windows
from unpoison.records import Clusters
from unpoison.runtime import autocast
from unpoison.scan.config import ScanConfig

__all__ = ["PASSES_PER_MAP", "GradCamAttention"]

PASSES_PER_MAP = 3
"""What one map costs in `Encoder.images_shown`: a forward pass, and a backward pass that counts as two."""


class GradCamAttention:
    """Attention of images by Grad-CAM; stands where `MaskAttention` stands.

    Args:
        encoder: the encoder under suspicion; each map adds `PASSES_PER_MAP` to its `images_shown`.
        clusters: fixed before.
        config: resolved settings.
        batch_size: images per pass.

    Raises:
        ConfigError: the encoder's network is no torch module, or no layer of it gives a map.
    """

    def __init__(self, encoder: Encoder, clusters: Clusters, config: ScanConfig, *, batch_size: int) -> None:
        if not isinstance(encoder.network, nn.Module):
            raise ConfigError(
                f"Grad-CAM needs the layers of a torch module, and {encoder.name} is a "
                f"{type(encoder.network).__name__}; use --attention mask"
            )
        assert config.window is not None, "the config is resolved before the search"
        self.encoder = encoder
        self.network: nn.Module = encoder.network
        self.centroids = clusters.centroids.to(encoder.device)
        self.window = config.window
        self.faithful = config.faithful
        self.batch_size = batch_size
        self.layer = choose_layer(self.network, encoder.preprocessing.geometry.size)

    def heat(self, pixels: Tensor) -> Tensor:
        """Attention of (N, 3, S, S) uint8 images, (N, S, S) float32 in [0, 1] on the CPU.

        Explained is the logit of the image's own cluster, the product of its features and the unit centroid. The
        cosine, which the release explains and `faithful` too, picks the same cluster, but is flat where an image lies
        close to its centroid, as poisoned ones do: with it, four of six victims had fewer triggers inside the window.
        """
        return self._maps(pixels, self._logit)

    def heat_along(self, pixels: Tensor, directions: Tensor) -> Tensor:
        """How much of each direction in feature space every pixel carries, (N, m, S, S) float32 in [0, 1], CPU.

        Args:
            pixels: (N, 3, S, S) uint8.
            directions: (m, D) unit length.
        """
        axes = directions.to(self.encoder.device)
        maps = [self._maps(pixels, lambda f, a=axis: F.normalize(f.float(), dim=1) @ a) for axis in axes]  # type: ignore[misc]
        return torch.stack(maps, dim=1) if maps else torch.empty(len(pixels), 0, *pixels.shape[2:])

    def windows(self, heat: Tensor) -> Tensor:
        """(N, 2) corners of the hottest windows."""
        return hottest_windows(heat, self.window)[:, 0]

    def _logit(self, features: Tensor) -> Tensor:
        """(N,), the largest over the clusters, in float32 so that rounding does not choose the cluster."""
        if self.faithful:
            return similarity(features, self.centroids).amax(dim=1)
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() @ self.centroids.T).amax(dim=1)

    def _maps(self, pixels: Tensor, target: Callable[[Tensor], Tensor]) -> Tensor:
        def explain(images: Tensor) -> Tensor:
            with autocast(self.encoder.device, self.encoder.precision):
                return grad_cam(self.network, self.layer, self.encoder.normalise(images), target).cpu()

        parts = []
        for start in range(0, len(pixels), self.batch_size):
            chunk = pixels[start : start + self.batch_size]
            parts.append(self.encoder.fitting(explain, chunk))
            self.encoder.images_shown += PASSES_PER_MAP * len(chunk)
        return torch.cat(parts) if parts else torch.empty(0, *pixels.shape[2:])
