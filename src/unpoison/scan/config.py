"""Settings of a scan; the command line and Python share them and their defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unpoison.errors import ConfigError

__all__ = ["ScanConfig"]


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """What a scan looks for and how hard.

    None means "fit the image size and the number of images"; `resolve` fills it in, and the verdict records it.

    Attributes:
        method: `poisoncam` (masks) or `patchsearch` (Grad-CAM); the two differ in `attention`.
        clusters: K of k-means.
        window: side of a trigger candidate, in encoder-input pixels.
        attention: `mask` or `gradcam`.
        masks: `grid` (deterministic, covers every trigger position) or `random` (the paper's cyclic ones).
        n_masks: number of random masks; ignored by the grid.
        fill: colour of hidden pixels: `mean` of the data set, or `black`.
        score: poison score that ranks images: `concentrated`, `any` or `source`.
        n_flips: images on which each candidate is pasted.
        proposals: windows tried per candidate image; the best counts.
        samples: images per surviving cluster and round.
        prune: share of the clusters dropped per round, (0, 1).
        top_k: patches that train the classifier.
        alpha: allowed false-alarm rate of the verdict, (0, 0.5).
        faithful: run the method exactly as published; other settings that contradict it are refused.
    """

    method: str = "poisoncam"
    clusters: int | None = None
    window: int | None = None
    attention: str = "mask"
    masks: str = "grid"
    n_masks: int = 256
    fill: str = "mean"
    score: str = "directed"
    n_flips: int | None = None
    proposals: int = 1
    samples: int = 2
    prune: float = 0.25
    top_k: int = 20
    alpha: float = 0.01
    faithful: bool = False

    def __post_init__(self) -> None:
        choices = {
            "method": ("poisoncam", "patchsearch"),
            "attention": ("mask", "gradcam"),
            "masks": ("grid", "random"),
            "fill": ("mean", "black"),
            "score": ("directed", "concentrated", "any", "source"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {' or '.join(allowed)}")
        for name in ("n_masks", "samples", "top_k", "proposals"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("clusters", "window", "n_flips"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ConfigError(f"{name}={value}: expected at least 2")
        if not 0 < self.prune < 1:
            raise ConfigError(f"prune={self.prune}: expected a fraction between 0 and 1")
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"alpha={self.alpha}: expected a false-alarm rate between 0 and 0.5")
