"""Settings of a scan; the command line and Python share them and their defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from unpoison.errors import ConfigError

__all__ = [
    "CARRIERS",
    "DETECTORS",
    "MOST_BENIGN",
    "MOST_DIRECTIONS",
    "MOST_FINALISTS",
    "MOST_OTHERS",
    "MOST_PLACES",
    "PICTURES",
    "SCREEN_SHARE",
    "SHARING",
    "TRIALS",
    "ScanConfig",
    "held_out_count",
]

MOST_DIRECTIONS = 3
"""Directions that the strongest candidates may elect."""

TRIALS = 64
"""Strongest candidates that are looked at again along each direction."""

CARRIERS = 2
"""Images on which a window proves that it is whole, when its place is refined."""

MOST_FINALISTS = 5
"""Patterns that enter the confirmation; fewer lose less to the correction for many tests."""

MOST_BENIGN = 64
"""Random windows that say how much innocent ones steer."""

MOST_PLACES = 5
"""Places at which images share pixels that become candidates."""

SHARING = 16
"""Images that are tried of each such place."""

MOST_OTHERS = 1000
"""Images without a confirmed pattern that its own are compared with, once it is hidden."""

PICTURES = 24
"""Highest-scored images that the report shows with their attention."""

DETECTORS = ("backdoor-ids", "cross-encoder", "dede", "spectral-dct")
"""Methods that judge images one by one; see `scan.detector.METHODS`."""

SCREEN_SHARE = 0.1
"""Of alpha: what the spectral screen may use up when it runs beside the patch search, which has the rest."""

_ANY_METHOD = ("method", "alpha", "faithful", "false_positive_rate")


def held_out_count(n_images: int) -> int:
    """Images kept for the confirmation, which the search never sees."""
    return min(1000, n_images // 4)


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """What a scan looks for and how hard.

    None means "fit the image size, the number of images and `faithful`"; `resolve` fills it in, and the verdict
    records what was taken.

    Attributes:
        method: `auto`: the patch search by masks and, where images have at least 32 pixels, the spectral screen. A
            patch search alone: `poisoncam` (masks; what `auto` becomes with `faithful`) or `patchsearch` (Grad-CAM). Or
            a detector, which judges images one by one: a name in `DETECTORS`; it has no settings but `alpha`,
            `false_positive_rate` and, for `dede`, `faithful`.
        clusters: K of k-means.
        window: side of a trigger candidate, in encoder-input pixels.
        attention: `mask` or `gradcam`; None is the method's own.
        masks: `grid` (deterministic, every half window apart, overhanging), or one of the paper's, at random places and
            wrapping around the border: `random` (the whole window is hidden), `blocks` (every other block of it) or
            `pixels` (a random half of its pixels).
        n_masks: number of masks at random places; ignored by the grid.
        fill: colour of hidden pixels: `mean` of the data set, or `black`.
        score: poison score that ranks images: `directed` (ours), `concentrated`, `any` (PoisonCAM) or `source`
            (PatchSearch).
        n_flips: images on which each candidate is pasted.
        patches: windows tried per image in the rounds; the one with the highest score counts.
        samples: images per surviving cluster and round.
        prune: share of the clusters dropped per round, (0, 1).
        exploit: images examined again, or anew, along the trigger direction.
        top_k: patches that train the classifier.
        filter_steps: of each network of the classifier, at most. None: 80, or 2000 with `faithful`. 0 trains none:
            then only those images are flagged that confirmed windows were cut from.
        alpha: allowed false-alarm rate of the verdict, (0, 0.5).
        faithful: run the search as published: random masks, equation 2, no control patches, the whole flip set,
            no second look. Settings that contradict it are refused.
        min_poison: smallest poison worth catching, in images (1 or more) or as a share of them (below 1); sets
            `clusters` where those are not given.
        max_passes: encoder passes that the scan may take, without pre-training and classifier; the search is made
            smaller to fit, the confirmation never is.
        max_seconds: the same by the clock: passes are counted at the rate at which the features were extracted.
        race: drop a candidate of the rounds as soon as the flip images seen so far speak against it.
        false_positive_rate: of a detector: share of innocent images that it may flag, (0, 0.5].
    """

    method: str = "auto"
    clusters: int | None = None
    window: int | None = None
    attention: str | None = None
    masks: str | None = None
    n_masks: int = 256
    fill: str = "mean"
    score: str | None = None
    n_flips: int | None = None
    patches: int = 1
    samples: int = 2
    prune: float = 0.25
    exploit: int = 300
    top_k: int = 20
    filter_steps: int | None = None
    alpha: float = 0.01
    faithful: bool = False
    min_poison: float | None = None
    max_passes: int | None = None
    max_seconds: float | None = None
    race: bool = False
    false_positive_rate: float = 0.01

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "method": ("auto", "poisoncam", "patchsearch", *DETECTORS),
            "attention": ("mask", "gradcam", None),
            "masks": ("grid", "random", "blocks", "pixels", None),
            "fill": ("mean", "black"),
            "score": ("directed", "concentrated", "any", "source", None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = " or ".join(a for a in allowed if a is not None)
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}")
        for name in ("n_masks", "patches", "samples", "top_k", "exploit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("clusters", "window", "n_flips"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ConfigError(f"{name}={value}: expected at least 2")
        if self.filter_steps is not None and self.filter_steps < 0:
            raise ConfigError(f"filter_steps={self.filter_steps}: expected 0 or more")
        if not 0 < self.prune < 1:
            raise ConfigError(f"prune={self.prune}: expected a fraction between 0 and 1")
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"alpha={self.alpha}: expected a false-alarm rate between 0 and 0.5")
        if self.min_poison is not None and not self._is_poison_size(self.min_poison):
            raise ConfigError(
                f"min_poison={self.min_poison}: expected a whole number of images, or a share between 0 and 1"
            )
        for name in ("max_passes", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value}: expected a number above 0")
        if not 0 < self.false_positive_rate <= 0.5:
            raise ConfigError(
                f"false_positive_rate={self.false_positive_rate}: expected a share above 0, at most 0.5"
            )
        self._check_method()
        if self.faithful and self.method == "auto":  # as published: the search alone
            object.__setattr__(self, "method", "poisoncam")
        ours = [n for n in ("max_passes", "max_seconds", "race") if getattr(self, n)]
        if self.faithful and ours:
            raise ConfigError(
                f"faithful contradicts {', '.join(ours)}: the published search is not cut short; drop one of them"
            )
        contradicting = [f"masks={self.masks}"] if self.masks == "grid" else []
        contradicting += [f"score={self.score}"] if self.score in ("directed", "concentrated") else []
        if self.faithful and contradicting:
            raise ConfigError(
                f"faithful contradicts {', '.join(contradicting)}: the paper has random masks and the scores any or "
                "source; drop one of them"
            )

    @property
    def by_detector(self) -> bool:
        """Whether images are judged one by one, and not searched for a pattern that recurs."""
        return self.method in DETECTORS

    @property
    def with_screen(self) -> bool:
        """Whether the spectral screen runs beside the patch search."""
        return self.method == "auto"

    def _check_method(self) -> None:
        """Refuse settings that the method does not have."""
        changed = [entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default]
        if not self.by_detector:
            if "false_positive_rate" in changed:
                raise ConfigError(
                    f"false_positive_rate={self.false_positive_rate}: is a setting of detectors; leave it out, or give "
                    f"a method: {' or '.join(DETECTORS)}"
                )
            return
        for name in changed:
            if name not in _ANY_METHOD:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: {self.method} judges images one by one and has no such setting; "
                    "leave it out"
                )
        if self.faithful and self.method != "dede":
            raise ConfigError(f"faithful: {self.method} has no published settings; leave it out")

    def resolve(self, n_images: int, image_size: int) -> ScanConfig:
        """The same settings with every None filled in; those of a detector are complete as they are.

        K follows the smallest number of poisons worth catching: four clusters for it, so that poison does not share
        a cluster with its class. Published attacks need a few hundred images, hence the floor of 400.

        Args:
            n_images: readable images.
            image_size: side of the encoder's input in pixels.

        Raises:
            ConfigError: the window does not fit the images, or there are more clusters than images.
        """
        if self.by_detector:
            return self
        asked = self.smallest_poison(n_images)
        if asked is not None and asked > n_images:
            raise ConfigError(
                f"min_poison={asked}: there are {n_images} readable images; expected at most that"
            )
        smallest = asked or max(0.005 * n_images, 400)
        clusters = max(2, min(round(4 * n_images / smallest), 2000, n_images // 10))
        clusters = max(clusters, min(50, n_images // 10), 2)
        if self.faithful and self.min_poison is None:
            clusters = max(2, min(1000, n_images // 10))
        filled = replace(
            self,
            clusters=self.clusters or clusters,
            window=self.window or max(3, round(60 / 224 * image_size)),
            attention=self.attention or ("gradcam" if self.method == "patchsearch" else "mask"),
            masks=self.masks or ("random" if self.faithful else "grid"),
            score=self.score or self._published_score(),
            n_flips=self.n_flips or min(1000 if self.faithful else 96, max(2, n_images // 2)),
        )
        assert filled.window is not None and filled.clusters is not None
        if filled.window > image_size:
            raise ConfigError(
                f"window={filled.window}: the encoder sees {image_size} pixels; expected at most that"
            )
        if filled.clusters > n_images:
            raise ConfigError(
                f"clusters={filled.clusters}: there are {n_images} readable images; expected at most that, "
                "or leave it out"
            )
        return filled

    def smallest_poison(self, n_images: int) -> int | None:
        """`min_poison` as a number of images, at least 1; None where it was left out."""
        if self.min_poison is None:
            return None
        return max(1, round(self.min_poison * (n_images if self.min_poison < 1 else 1)))

    @staticmethod
    def _is_poison_size(value: float) -> bool:
        return 0 < value < 1 or (1 <= value < math.inf and value == int(value))

    def _published_score(self) -> str:
        if not self.faithful:
            return "directed"
        return "source" if self.method == "patchsearch" else "any"
