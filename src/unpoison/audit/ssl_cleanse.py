"""SSL-Cleanse's detection: does one cluster of the features need a far smaller trigger than all others?

What it finds: for every cluster of clean images' features the smallest mask and pattern that carry all other images
there. In a backdoored encoder one cluster, the target's, needs far less than the rest: an outlier among the masks.
What it assumes: as DECREE, some images and a trigger that is a patch; and that few clusters are targets.
What it misses: triggers that cover the image, targets between the clusters, and encoders in which every cluster is
easily reached. An outlier among ten figures is weak evidence: this is a second opinion, and no ground of a verdict.

Paper: Zheng et al.: SSL-Cleanse: Trojan Detection and Mitigation in Self-Supervised Learning, ECCV 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.audit.decree import FORWARD_AND_BACKWARD, DecreeConfig, Inversion, Windows, smallest_trigger
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import raw_features
from unpoison.errors import ConfigError
from unpoison.functional.clustering import assign, kmeans
from unpoison.runtime import Progress, silent

__all__ = [
    "OUTLIER",
    "Needed",
    "SslCleanseConfig",
    "anomaly_index",
    "cleanse",
    "passes_of_cleanse",
    "smallest_to",
]

OUTLIER = 2.0
"""Anomaly index above which the paper calls an encoder backdoored."""

_SHOWN = 64  # images on which every window is tried for every cluster
_AS_DEVIATION = 1.4826  # times the median absolute deviation is the standard deviation of normal values
_LEAST_DEVIATION = 1e-3  # of mask shares; below, equal masks would make an outlier of nothing


@dataclass(frozen=True, kw_only=True)
class SslCleanseConfig:
    """Settings of SSL-Cleanse's detection.

    Attributes:
        clusters: of the features, at least 3.
        rate: share of a batch that must land in the cluster, (0, 1].
        steps: most steps per cluster.
        patience: steps without a mask smaller by a hundredth, after which a cluster ends.
        batch_size: images per step, at least 2.
        learning_rate: of Adam.
    """

    clusters: int = 10
    rate: float = 0.9
    steps: int = 80
    patience: int = 40
    batch_size: int = 32
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.clusters < 3:
            raise ConfigError(f"clusters={self.clusters}: expected at least 3, or none can stand out")
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate={self.rate}: expected a share in (0, 1]")
        self.search  # noqa: B018 (checks the rest)

    @property
    def search(self) -> DecreeConfig:
        """What DECREE's search takes of them."""
        return DecreeConfig(
            steps=self.steps,
            patience=self.patience,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )


@dataclass(frozen=True, eq=False)
class Needed:
    """What each cluster needs.

    Attributes:
        mask_shares: (K,) float32, of the smallest trigger that carries images there; 1 where none does.
        found: the trigger of the cluster that needs least.
    """

    mask_shares: Tensor
    found: Inversion

    @property
    def cluster(self) -> int:
        """The cluster that needs least."""
        return int(self.mask_shares.argmin())

    @property
    def anomaly_index(self) -> float:
        """How far it stands out; see the function of this name."""
        return anomaly_index(self.mask_shares)


def cleanse(
    encoder: Encoder,
    images: Tensor,
    config: SslCleanseConfig,
    *,
    windows: Windows,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Needed:
    """The smallest trigger to every cluster.

    Args:
        encoder: differentiable from its input to its features.
        images: (N, 3, S, S) uint8, clean, at least as many as clusters; unchanged.
        config: settings.
        windows: what `decree.scout` found; each search begins at the one that already leads nearest to its cluster.
        generator: on the CPU; the only source of randomness.
        progress: told ("cluster k of K", step, most steps).
    """
    features = F.normalize(raw_features(encoder, images), dim=1)
    n_clusters = min(config.clusters, len(images))
    clusters = kmeans(features, n_clusters, generator=generator)
    centroids, members = clusters.centroids, clusters.assignment
    led = _led(encoder, images[torch.randperm(len(images), generator=generator)[:_SHOWN]], windows, centroids)
    found = []
    for cluster in range(n_clusters):
        others = images[members != cluster]
        found.append(
            smallest_to(
                encoder,
                others,
                centroids,
                cluster,
                config,
                start=(windows, int(led[:, cluster].argmax())),
                generator=generator,
                stage=f"cluster {cluster + 1} of {n_clusters}",
                progress=progress,
            )
        )
    shares = torch.tensor([one.mask_share if one.reached else 1.0 for one in found])
    return Needed(shares, found[int(shares.argmin())])


def smallest_to(
    encoder: Encoder,
    images: Tensor,
    centroids: Tensor,
    cluster: int,
    config: SslCleanseConfig,
    *,
    start: tuple[Windows, int] | None,
    generator: torch.Generator,
    stage: str = "cluster",
    progress: Progress = silent,
) -> Inversion:
    """The smallest trigger that carries images to one cluster; `collapse` is then their mean cosine to its centroid.

    Args:
        encoder: see `cleanse`.
        images: (N, 3, S, S) uint8 of other clusters.
        centroids: (K, D) of unit length.
        cluster: number of the centroid.
        config: settings.
        start: see `decree.invert`.
        generator: see `cleanse`.
        stage: what `progress` calls this.
        progress: told (stage, step, most steps).
    """
    wanted = centroids.to(encoder.device)

    def arrived(units: Tensor) -> tuple[Tensor, bool]:
        there = float((assign(units.detach(), wanted) == cluster).float().mean())
        return (units @ wanted[cluster]).mean(), there >= config.rate

    return smallest_trigger(
        encoder,
        images,
        arrived,
        config.search,
        generator=generator,
        start=start,
        stage=stage,
        progress=progress,
    )


def passes_of_cleanse(config: SslCleanseConfig, count: int, windows: int) -> int:
    """The most that `cleanse` takes with so many images and windows."""
    shown = FORWARD_AND_BACKWARD * config.steps * min(config.batch_size, count)
    return count + windows * min(_SHOWN, count) + min(config.clusters, count) * shown


def anomaly_index(mask_shares: Tensor) -> float:
    """How many deviations the smallest lies below the median, by the median absolute deviation with one constant.

    >>> round(anomaly_index(torch.tensor([0.02, 0.30, 0.32, 0.34, 0.36])), 2)
    10.12

    Args:
        mask_shares: (K,) float in [0, 1].
    """
    middle = mask_shares.double().quantile(0.5)
    deviation = _AS_DEVIATION * (mask_shares.double() - middle).abs().quantile(0.5)
    return float((middle - mask_shares.double().min()) / deviation.clamp(min=_LEAST_DEVIATION))


def _led(encoder: Encoder, images: Tensor, windows: Windows, centroids: Tensor) -> Tensor:
    """(P, K) mean cosine of images with each window to each centroid."""
    rows = []
    for (top, left), pattern in zip(windows.corners.tolist(), windows.patterns, strict=True):
        stamped = images.float() / 255
        stamped[:, :, top : top + windows.side, left : left + windows.side] = pattern
        units = F.normalize(raw_features(encoder, stamped), dim=1)
        rows.append((units @ centroids.T.cpu()).mean(dim=0))
    return torch.stack(rows)
