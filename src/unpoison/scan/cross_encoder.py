"""Two encoders, one image: do they agree on what it looks like?

Finds: images that the suspect encoder puts beside pictures which a second, independently trained encoder finds unlike
it. A backdoor that only one encoder has learned moves the image for that one alone.
Needs: a second encoder that does not share the backdoor, and reference images that both embed; a few of these may be
poisoned. One pass of each encoder per image.
Misses: a backdoor that both have learned (trained on the same poisoned images), and targets that are near the image.
Flags wrongly: images about which good encoders may differ: rare, cluttered or ambiguous ones.

Ours; the idea that independently trained encoders agree on neighbourhoods, and that a backdoor breaks this, is from the
Platonic Defense (arXiv 2606.29451), which we have not read in full and do not reproduce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import raw_features
from unpoison.errors import CheckpointError, ConfigError

__all__ = ["CrossEncoder", "CrossEncoderConfig", "fit_cross_encoder"]


@dataclass(frozen=True, kw_only=True)
class CrossEncoderConfig:
    """Settings of the comparison.

    Attributes:
        neighbors: nearest reference images that are compared.
        references: reference images that are kept, at most.
    """

    neighbors: int = 10
    references: int = 5000

    def __post_init__(self) -> None:
        if not 1 <= self.neighbors < self.references:
            raise ConfigError(
                f"neighbors={self.neighbors}, references={self.references}: expected at least one neighbour and more "
                "references than that"
            )


@dataclass(frozen=True, eq=False)
class CrossEncoder:
    """The fitted comparison; see `scan.detector.Scorer`.

    Attributes:
        config: its settings.
        encoder: the suspect.
        other: the second encoder; both take images of the same size.
        seen: (M, D) float32, unit length: reference images as the suspect sees them.
        seen_by_other: (M, D') float32, unit length: the same images as the second encoder sees them.
    """

    config: CrossEncoderConfig
    encoder: Encoder
    other: Encoder
    seen: Tensor
    seen_by_other: Tensor

    method: ClassVar[str] = "cross-encoder"

    def score(self, images: Tensor) -> Tensor:
        """How much less the second encoder likes the suspect's neighbours than its own.

        Args:
            images: (N, 3, S, S) uint8, S as both encoders take them.

        Returns:
            (N,) float32, at least 0: 0 = the suspect's neighbours are as near, 1 = they are no nearer than reference
            images are on average.
        """
        mine = F.normalize(self.encoder.features(images).cpu(), dim=1) @ self.seen.T
        others = F.normalize(self.other.features(images).cpu(), dim=1) @ self.seen_by_other.T
        k = self.config.neighbors
        best = others.topk(k, dim=1).values.mean(dim=1)
        given = others.gather(1, mine.topk(k, dim=1).indices).mean(dim=1)
        return ((best - given) / (best - others.mean(dim=1)).clamp_min(1e-6)).clamp_min(0)

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold beside the settings."""
        return {"seen": self.seen, "seen_by_other": self.seen_by_other}

    @classmethod
    def restore(
        cls, config: CrossEncoderConfig, tensors: Mapping[str, Tensor], encoder: Encoder, other: Encoder
    ) -> CrossEncoder:
        """The comparison of a file.

        Raises:
            CheckpointError: the file's tensors are not those of this method.
        """
        found = [tensors.get("seen"), tensors.get("seen_by_other")]
        rows = {len(t) for t in found if t is not None and t.ndim == 2 and t.dtype == torch.float32}
        if set(tensors) != {"seen", "seen_by_other"} or len(rows) != 1 or min(rows) <= config.neighbors:
            raise CheckpointError(
                "a cross-encoder detector holds `seen` and `seen_by_other`, (M, D) float32: get another copy"
            )
        return cls(config, encoder, other, tensors["seen"], tensors["seen_by_other"])


def fit_cross_encoder(
    images: Tensor, encoder: Encoder, other: Encoder, config: CrossEncoderConfig | None = None
) -> CrossEncoder:
    """Embed the reference images with both encoders.

    Args:
        images: (N, 3, S, S) uint8, S as both encoders take them; of more than `references` as many at even
            distances, since files are often sorted by class.
        encoder: the suspect.
        other: a second encoder.
        config: see `CrossEncoderConfig`.

    Raises:
        ConfigError: too few images, or encoders that take images of different sizes.
    """
    config = config or CrossEncoderConfig()
    if len(images) <= config.neighbors:
        raise ConfigError(f"{len(images)} reference images: expected more than neighbors={config.neighbors}")
    sizes = [each.preprocessing.geometry.size for each in (encoder, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the encoders take images of {sizes[0]} and {sizes[1]} pixels: expected the same")
    count = min(len(images), config.references)
    chosen = images[torch.linspace(0, len(images) - 1, count, dtype=torch.float64).round().long()]
    seen, by_other = (F.normalize(raw_features(each, chosen), dim=1) for each in (encoder, other))
    return CrossEncoder(config, encoder, other, seen, by_other)
