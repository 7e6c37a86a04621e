"""One contract for all detectors that judge images one by one: fit, score, compare with a calibrated threshold.

A score is one number per image, higher is more suspicious, and depends on no other image in the call. The threshold is
conformal: it is read off the scores of calibration images, so that of further innocent images of the same kind at most
the stated share is flagged, whatever the method. Poisoned calibration images that score high only raise the threshold;
`poison_share` sets that many of the highest aside, and `Calibration.bound` says what this costs.

A detector is frozen once it is made; scoring keeps nothing, so several threads may share one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pandas
import torch
from scipy.stats import betabinom
from torch import Tensor

from unpoison.encoders.checkpoints import read_tensors, save_tensors
from unpoison.encoders.encoder import Encoder
from unpoison.errors import CheckpointError, ConfigError, NoVerdictError, ShapeError
from unpoison.records import ImageSet, Verdict
from unpoison.runtime import Progress, silent, stage_generator
from unpoison.scan.backdoor_ids import BackdoorIds, BackdoorIdsConfig
from unpoison.scan.cross_encoder import CrossEncoder, CrossEncoderConfig, fit_cross_encoder
from unpoison.scan.dede import Dede, DedeConfig, fit_dede
from unpoison.scan.spectral_dct import SpectralDct, SpectralDctConfig, find_waves, fit_spectral_dct

__all__ = [
    "DETECTOR_SCHEMA",
    "JUDGED_RATE",
    "METHODS",
    "Calibration",
    "Detection",
    "Detector",
    "DetectorConfig",
    "Scorer",
    "calibrate",
    "detect",
    "fit_detector",
    "fit_on_judged",
    "judge",
    "load_detector",
    "make_config",
    "passes_per_image",
    "restore_detector",
]

JUDGED_RATE = 0.5
"""Rate of a detector that is fitted on the judged images: one score makes such a threshold, which decides nothing."""

DETECTOR_SCHEMA = "unpoison/detector/2"
"""What a detector's file calls itself; the number grows when an older reader would misread a newer file."""

DetectorConfig = BackdoorIdsConfig | CrossEncoderConfig | DedeConfig | SpectralDctConfig

METHODS: dict[str, type[DetectorConfig]] = {
    "backdoor-ids": BackdoorIdsConfig,
    "cross-encoder": CrossEncoderConfig,
    "dede": DedeConfig,
    "spectral-dct": SpectralDctConfig,
}
"""Every method by name, with the type of its settings."""

_SCOPES: dict[str, str] = {
    "backdoor-ids": "images whose embedding jumps when more and more of them is hidden",
    "cross-encoder": "images that this encoder and the second one place in different neighbourhoods",
    "dede": "images that cannot be drawn again from their embedding",
    "spectral-dct": "single frequencies in the chroma that the other images do not have",
}


class Scorer(Protocol):
    """A fitted method. `method` is its name in `METHODS`."""

    @property
    def method(self) -> str:
        """Its name."""

    @property
    def config(self) -> Any:
        """Its settings, of the type in `METHODS`."""

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 to (N,) float32 on the CPU; higher is more suspicious; no image matters to another."""

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold beside the settings."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where a threshold comes from.

    Attributes:
        threshold: an image is flagged when its score lies above.
        false_positive_rate: the wanted share of innocent images that are flagged, at most, (0, 0.5].
        poison_share: share of the calibration images that were taken for poisoned, those that scored highest, [0, 0.5).
        n_images: calibration images, those included.
    """

    threshold: float
    false_positive_rate: float
    poison_share: float
    n_images: int

    def __post_init__(self) -> None:
        if not 0 < self.false_positive_rate <= 0.5:
            raise ConfigError(f"false_positive_rate={self.false_positive_rate}: expected a share in (0, 0.5]")
        if not 0 <= self.poison_share < 0.5:
            raise ConfigError(f"poison_share={self.poison_share}: expected a share in [0, 0.5)")
        fewest = math.ceil(1 / self.false_positive_rate - 1e-9) - 1
        if self.n_trusted < fewest:
            raise ConfigError(
                f"{self.n_trusted} calibration images: a false-positive rate of {self.false_positive_rate:g} needs at "
                f"least {fewest}; give more images, or a higher rate"
            )

    @property
    def n_trusted(self) -> int:
        """Calibration images that were not set aside."""
        return self.n_images - int(self.poison_share * self.n_images)

    @property
    def rank(self) -> int:
        """The threshold is the rank-th smallest of the calibration scores."""
        # The epsilon undoes the rounding of products such as 0.95 · 20, which must count as 19.
        return math.ceil((1 - self.false_positive_rate) * (self.n_trusted + 1) - 1e-9)

    @property
    def bound(self) -> float:
        """The false-positive rate that holds whatever the calibration images that were set aside are.

        It is `false_positive_rate` when none was, or when exactly the poisoned ones were; (α + ε) / (1 - ε) at worst.
        """
        share = self.poison_share
        return min(1.0, (self.false_positive_rate + share) / (1 - share))

    def p_value(self, n_flagged: int, n_images: int) -> float:
        """How surely innocent images of the calibration's kind would be flagged as often.

        Exact for scores without ties, also for few calibration images: the share above a calibration score of known
        rank has a beta distribution, so the count has a beta-binomial one. Images that were set aside count as innocent
        here, which makes it too large, never too small. Below 1e-10 it is only known to be small.

        Args:
            n_flagged: flagged images.
            n_images: judged images, none of which was in the calibration.
        """
        above = self.n_images + 1 - self.rank
        return float(betabinom.sf(n_flagged - 1, n_images, above, self.rank))


def calibrate(scores: Tensor, false_positive_rate: float, *, poison_share: float = 0.0) -> Calibration:
    """The conformal threshold.

    Args:
        scores: (n,) of images that were not used in fitting.
        false_positive_rate: wanted share of innocent images that are flagged, at most, (0, 0.5].
        poison_share: that share of the highest scores is set aside as if poisoned, [0, 0.5).

    Raises:
        ConfigError: a share is out of range, or there are too few scores for the wanted rate.
        NoVerdictError: a score is not finite.

    >>> calibrate(torch.arange(1.0, 100.0), 0.05).threshold
    95.0
    """
    _check_finite(scores)
    empty = Calibration(
        threshold=math.inf,
        false_positive_rate=false_positive_rate,
        poison_share=poison_share,
        n_images=len(scores),
    )
    return replace(empty, threshold=float(scores.sort().values[empty.rank - 1]))


@dataclass(frozen=True, eq=False)
class Detector:
    """A fitted and calibrated method.

    Attributes:
        scorer: the fitted method.
        calibration: its threshold.
        encoders: fingerprints of the encoders that it asks, the suspect first; empty when it asks none.
        size: side of the images that it takes, pixels.
    """

    scorer: Scorer
    calibration: Calibration
    encoders: tuple[str, ...]
    size: int

    def score(self, images: Tensor, *, batch_size: int = 256, progress: Progress = silent) -> Tensor:
        """How suspicious each image is. Safe to call from several threads.

        Args:
            images: (N, 3, S, S) uint8, S = `size`; N may be 0.
            batch_size: images per pass; no matter for the result beyond rounding.
            progress: called after every batch.

        Returns:
            (N,) float32 on the CPU; higher is more suspicious; the scale is the method's own.

        Raises:
            ShapeError: the images have another shape or dtype.
            NoVerdictError: a score is not finite.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.size, self.size) or images.dtype != torch.uint8:
            raise ShapeError(
                f"images must be (N, 3, {self.size}, {self.size}) uint8, got {tuple(images.shape)} {images.dtype}"
            )
        return _scores(self.scorer, images, batch_size, progress)

    def flags(self, images: Tensor, *, batch_size: int = 256) -> Tensor:
        """(N,) bool: which images score above the threshold; arguments and errors as of `score`."""
        return self.score(images, batch_size=batch_size) > self.calibration.threshold

    def fingerprint(self) -> str:
        """Hex digest of everything that a score or a flag depends on."""
        total = hashlib.sha256(
            repr((self.calibration, self.scorer.config, self.encoders, self.size)).encode()
        )
        for name, tensor in sorted(self.scorer.tensors().items()):
            total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def to_tensors(self) -> dict[str, Tensor]:
        """All that fitting and calibrating gave, for the cache of a run; see `restore_detector`."""
        found = {name: tensor.detach().cpu() for name, tensor in self.scorer.tensors().items()}
        calibration = torch.tensor(
            [self.calibration.threshold, self.calibration.n_images, self.size], dtype=torch.float64
        )
        return {**found, "calibration": calibration}

    def save(self, path: Path | str) -> None:
        """Write the detector as one .safetensors file; the encoders are not in it.

        Raises:
            ConfigError: the name does not end in .safetensors.
            CheckpointError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ConfigError(f"{path}: a detector is written as .safetensors; end the name so")
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.scorer.tensors().items()}
        metadata = {
            "schema": DETECTOR_SCHEMA,
            "method": self.scorer.method,
            "config": asdict(self.scorer.config),
            "calibration": asdict(self.calibration),
            "encoders": list(self.encoders),
            "size": self.size,
        }
        save_tensors(path, tensors, metadata, what="detector")


def fit_detector(
    method: str,
    images: Tensor,
    encoder: Encoder | None = None,
    *,
    other: Encoder | None = None,
    config: DetectorConfig | None = None,
    calibration: Tensor | None = None,
    false_positive_rate: float = 0.01,
    poison_share: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress = silent,
) -> Detector:
    """Fit a method and calibrate its threshold.

    Args:
        method: a name in `METHODS`.
        images: (N, 3, S, S) uint8: auxiliary images, without labels; a few may be poisoned.
        encoder: the suspect; only `spectral-dct` does without.
        other: a second encoder, for `cross-encoder` alone.
        config: settings of the method; None = its defaults, with this seed where it has one.
        calibration: (n, 3, S, S) uint8: other images of the kind that will be judged. None sets half of `images` apart,
            drawn by the seed.
        false_positive_rate: see `calibrate`.
        poison_share: see `calibrate`.
        seed: of that draw.
        batch_size: images per pass when the calibration images are scored.
        progress: called by long loops.

    Raises:
        ConfigError: an unknown method, settings of another one, a missing or superfluous encoder, too few images.
        ShapeError: the images have the wrong shape or dtype.
        NoVerdictError: features or scores are not finite.
    """
    size = _check_encoders(method, encoder, other) or int(images.shape[-1])
    for each in (images,) if calibration is None else (images, calibration):
        if each.ndim != 4 or each.shape[1:] != (3, size, size) or each.dtype != torch.uint8:
            raise ShapeError(
                f"images must be (N, 3, {size}, {size}) uint8, got {tuple(each.shape)} {each.dtype}"
            )
    kind = METHODS[method]
    if config is None:
        config = make_config(method, seed=seed)
    if not isinstance(config, kind):
        raise ConfigError(f"{method} takes a {kind.__name__}, got a {type(config).__name__}")
    if calibration is None:
        order = torch.randperm(len(images), generator=stage_generator(seed, "scan/detector/split"))
        half = len(images) // 2
        images, calibration = images[order[half:]], images[order[:half]]
    scorer: Scorer
    match config:
        case SpectralDctConfig():
            scorer = fit_spectral_dct(images, config)
        case BackdoorIdsConfig():
            scorer = BackdoorIds(config, _given(encoder))
        case DedeConfig():
            scorer = fit_dede(images, _given(encoder), config, progress=progress)
        case CrossEncoderConfig():
            scorer = fit_cross_encoder(images, _given(encoder), _given(other), config)
    scores = _scores(scorer, calibration, batch_size, progress)
    found = calibrate(scores, false_positive_rate, poison_share=poison_share)
    return Detector(scorer, found, _fingerprints(encoder, other), size)


def fit_on_judged(
    method: str,
    images: Tensor,
    encoder: Encoder | None,
    *,
    other: Encoder | None,
    config: DetectorConfig | None,
    seed: int,
    progress: Progress = silent,
) -> Detector:
    """A detector of the very images that it will judge: all of them, so that none scores low for having been fitted on.

    Arguments and errors are as of `fit_detector`; see `JUDGED_RATE`, and `judge` for what the verdict is then.
    """
    return fit_detector(
        method,
        images,
        encoder,
        other=other,
        config=config,
        calibration=images[:1],
        false_positive_rate=JUDGED_RATE,
        seed=seed,
        progress=progress,
    )


def load_detector(
    path: Path | str, encoder: Encoder | None = None, *, other: Encoder | None = None
) -> Detector:
    """A detector from its file, with the encoders that it was made for.

    Args:
        path: what `Detector.save` wrote.
        encoder: the suspect; None for `spectral-dct`.
        other: the second encoder, for `cross-encoder`.

    Raises:
        ConfigError: there is no such file, or an encoder is missing, superfluous or another one.
        CheckpointError: the file is damaged, or no detector of this version.
    """
    path = Path(path)
    tensors, entry = read_tensors(path, DETECTOR_SCHEMA)
    method = entry("method", str)
    if method not in METHODS:
        raise CheckpointError(f"{path}: method {method!r}, this version knows {', '.join(METHODS)}")
    config = _read_config(path, entry, method)
    calibration = entry("calibration", Calibration)
    if not math.isfinite(calibration.threshold):
        raise CheckpointError(f"{path}: its threshold is {calibration.threshold}, expected a number")
    size = entry("size", int)
    fingerprints = tuple(entry("encoders", list[str]))
    expected = _check_encoders(method, encoder, other)
    if not 1 <= size <= 4096 or (expected is not None and size != expected):
        raise ConfigError(
            f"{path}: made for images of {size} pixels, but the encoder takes {expected}; give the one it was made for"
        )
    if fingerprints != _fingerprints(encoder, other) or "" in fingerprints:
        raise ConfigError(
            f"{path}: made for another encoder, or for a function without a fingerprint; give the one it was fitted "
            "with, or fit it again"
        )
    try:
        scorer = _restore(config, tensors, encoder, other)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Detector(scorer, calibration, fingerprints, size)


def restore_detector(
    config: DetectorConfig,
    tensors: Mapping[str, Tensor],
    encoder: Encoder | None,
    *,
    other: Encoder | None,
    false_positive_rate: float,
) -> Detector:
    """The detector that `Detector.to_tensors` came from.

    Args:
        config: its settings.
        tensors: of `Detector.to_tensors`.
        encoder: the suspect that it was made for.
        other: the second encoder, likewise.
        false_positive_rate: that it was calibrated for, without setting poison aside.
    """
    threshold, n_images, size = tensors["calibration"].tolist()
    calibration = Calibration(
        threshold=threshold,
        false_positive_rate=false_positive_rate,
        poison_share=0.0,
        n_images=int(n_images),
    )
    fitted = {name: tensor for name, tensor in tensors.items() if name != "calibration"}
    scorer = _restore(config, fitted, encoder, other)
    return Detector(scorer, calibration, _fingerprints(encoder, other), int(size))


@dataclass(frozen=True, eq=False)
class Detection:
    """What a detector says of a set of images.

    Attributes:
        verdict: `poisoned`, `no_evidence`, or `inconclusive`, see `judge`.
        reason: of an inconclusive verdict, else empty.
        p_value: that innocent images would look as suspicious; None when inconclusive.
        findings: one row per image that the source named, columns as in findings.parquet.
        tested: sentence for the scope.
        rule: sentence that says what the p-value compares.
    """

    verdict: Verdict
    reason: str
    p_value: float | None
    findings: pandas.DataFrame
    tested: str
    rule: str


def detect(
    images: ImageSet,
    encoder: Encoder | None,
    method: str,
    *,
    detector: Detector | None = None,
    auxiliary: Tensor | None = None,
    other: Encoder | None = None,
    config: DetectorConfig | None = None,
    alpha: float = 0.01,
    false_positive_rate: float = 0.01,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress = silent,
) -> Detection:
    """Judge every image of a set, in memory.

    Args:
        images: what to judge.
        encoder: the suspect; None for `spectral-dct`.
        method: a name in `METHODS`.
        detector: fitted and calibrated on other images; then `auxiliary` and `config` are of no matter.
        auxiliary: (n, 3, S, S) uint8, other images of the same kind, to fit and calibrate one here. None, and no
            detector, takes the judged images themselves; see `judge`.
        other: the second encoder, for `cross-encoder`.
        config: settings of the method; None = its defaults.
        alpha: allowed false-alarm rate of the verdict, (0, 0.5).
        false_positive_rate: of a detector that is made here.
        seed: of everything that is drawn.
        batch_size: images per pass.
        progress: called by long loops.

    Raises:
        ConfigError: as `fit_detector`, or the detector is one of another method.
        ShapeError: the images are not of the detector's size.
        NoVerdictError: features or scores are not finite.
    """
    independent = detector is not None or auxiliary is not None
    if detector is None and auxiliary is None:
        detector = fit_on_judged(
            method, images.pixels, encoder, other=other, config=config, seed=seed, progress=progress
        )
    elif detector is None and auxiliary is not None:
        detector = fit_detector(
            method,
            auxiliary,
            encoder,
            other=other,
            config=config,
            false_positive_rate=false_positive_rate,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    assert detector is not None, "one was given or made"
    if detector.scorer.method != method:
        raise ConfigError(
            f"method {method!r}, but the detector is one of {detector.scorer.method}: leave one of them out"
        )
    scores = detector.score(images.pixels, batch_size=batch_size, progress=progress)
    return judge(images, scores, detector, alpha=alpha, independent=independent)


def judge(
    images: ImageSet, scores: Tensor, detector: Detector, *, alpha: float, independent: bool
) -> Detection:
    """The verdict over scored images, and the list of those to remove.

    A detector that was calibrated on other images counts the images above its threshold: the verdict is `poisoned` when
    these are more than innocent ones explain, exactly (`Calibration.p_value`), and they are flagged. One that was made
    on the judged images puts the same share above it whatever they hold. Then `spectral-dct` has a test that needs no
    other images (`find_waves`), and the other methods give an order and no verdict.

    Args:
        images: that were scored.
        scores: (N,) of `detector`.
        detector: that gave them.
        alpha: allowed false-alarm rate of the verdict, (0, 0.5).
        independent: whether the detector was fitted and calibrated on other images.

    Raises:
        ConfigError: alpha is out of range.
    """
    if not 0 < alpha < 0.5:
        raise ConfigError(f"alpha={alpha}: expected a rate in (0, 0.5)")
    method, calibration = detector.scorer.method, detector.calibration
    verdict: Verdict
    p_value: float | None
    if independent:
        above = scores > calibration.threshold
        p_value = calibration.p_value(int(above.sum()), len(images))
        rule = (
            f"{int(above.sum())} of {len(images)} images score above the threshold; of innocent images like the "
            f"{calibration.n_images} of the calibration, at most {calibration.bound:.2%} do"
        )
    elif isinstance(detector.scorer, SpectralDct):
        waves = find_waves(images.pixels, alpha, detector.scorer.config)
        above, p_value = waves.flagged, waves.p_value
        rule = "signs of unusually large coefficients, which are fair coins in pictures"
    else:
        nothing = torch.zeros(len(images), dtype=torch.bool)
        reason = (
            "the detector was fitted and calibrated on these very images, so the order means something and the flagged "
            "share nothing; give other images of the same kind with --auxiliary, or a --detector made on such"
        )
        return Detection(
            "inconclusive", reason, None, _findings(images, scores, nothing), _SCOPES[method], ""
        )
    verdict = "poisoned" if p_value <= alpha else "no_evidence"
    flagged = above & (verdict == "poisoned")
    return Detection(verdict, "", p_value, _findings(images, scores, flagged), _SCOPES[method], rule)


def passes_per_image(config: DetectorConfig) -> tuple[int, int]:
    """Encoder passes for every image that is fitted on, and for every image that is scored."""
    match config:
        case SpectralDctConfig():
            return 0, 0
        case BackdoorIdsConfig():
            return 0, config.steps * config.orders
        case DedeConfig():
            return 1, 1
        case CrossEncoderConfig():
            return 2, 2


def make_config(method: str, *, faithful: bool = False, seed: int = 0) -> DetectorConfig:
    """The default settings of a method, or with `faithful` the published ones, which `dede` alone has."""
    config: DetectorConfig = DedeConfig.published() if faithful and method == "dede" else METHODS[method]()
    return replace(config, seed=seed) if isinstance(config, BackdoorIdsConfig | DedeConfig) else config


def _findings(images: ImageSet, scores: Tensor, flagged: Tensor) -> pandas.DataFrame:
    judged = pandas.DataFrame(
        {
            "id": list(images.ids),
            "scored": True,
            "poison_score": scores.double().numpy(),
            "flagged": flagged.numpy(),
        }
    )
    skipped = pandas.DataFrame(
        {"id": [s.id for s in images.skipped], "skip_reason": [s.reason for s in images.skipped]}
    )
    if len(skipped):
        skipped["scored"] = skipped["flagged"] = False
        judged = pandas.concat([judged, skipped], ignore_index=True)
    kinds: Any = {
        "cluster": "Int32",
        "scored": bool,
        "poison_score": float,
        **{f"box_{side}": "Int32" for side in "xywh"},
        "poison_probability": float,
        "flagged": bool,
        "trigger": "Int32",
        "skip_reason": "string",
    }
    return judged.reindex(columns=["id", *kinds]).astype(kinds)


def _scores(scorer: Scorer, images: Tensor, batch_size: int, progress: Progress) -> Tensor:
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1 image per pass")
    parts = []
    for start in range(0, len(images), batch_size):
        parts.append(scorer.score(images[start : start + batch_size]))
        progress("score images", min(start + batch_size, len(images)), len(images))
    scores = torch.cat(parts) if parts else torch.empty(0)
    _check_finite(scores)
    return scores


def _check_finite(scores: Tensor) -> None:
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise NoVerdictError(
            f"{bad} of {len(scores)} scores are NaN or infinite; check the encoder's weights and preprocessing"
        )


def _check_encoders(method: str, encoder: Encoder | None, other: Encoder | None) -> int | None:
    """The side of the images that the encoders take, pixels; None when the method asks none."""
    if method not in METHODS:
        raise ConfigError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if (encoder is None) != (method == "spectral-dct"):
        wanted = (
            "no encoder: leave it out" if method == "spectral-dct" else "the encoder that it judges: give one"
        )
        raise ConfigError(f"{method} takes {wanted}")
    if (other is None) == (method == "cross-encoder"):
        wanted = (
            "a second encoder: give one" if method == "cross-encoder" else "no second encoder: leave it out"
        )
        raise ConfigError(f"{method} takes {wanted}")
    return None if encoder is None else encoder.preprocessing.geometry.size


def _fingerprints(encoder: Encoder | None, other: Encoder | None) -> tuple[str, ...]:
    return tuple(each.fingerprint for each in (encoder, other) if each is not None)


def _given(encoder: Encoder | None) -> Encoder:
    assert encoder is not None, "_check_encoders saw to it"
    return encoder


def _read_config(path: Path, entry: Callable[[str, type[Any]], Any], method: str) -> DetectorConfig:
    known = set(METHODS[method].__dataclass_fields__)
    found = entry("config", dict[str, Any])
    if set(found) != known:
        odd = sorted(set(found) ^ known)[0]
        raise CheckpointError(f"{path}: its settings and those of {method} differ in {odd!r}; fit it again")
    config: DetectorConfig = entry("config", METHODS[method])
    return config


def _restore(
    config: DetectorConfig, tensors: Mapping[str, Tensor], encoder: Encoder | None, other: Encoder | None
) -> Scorer:
    match config:
        case SpectralDctConfig():
            return SpectralDct.restore(config, tensors)
        case BackdoorIdsConfig():
            return BackdoorIds.restore(config, tensors, _given(encoder))
        case DedeConfig():
            return Dede.restore(config, tensors, _given(encoder))
        case CrossEncoderConfig():
            return CrossEncoder.restore(config, tensors, _given(encoder), _given(other))
