"""A scan by a detector in code: what happens to images that are judged one by one.

images, encoder, detector (given, or fitted on auxiliary images) → scores → flagged share → verdict
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unpoison.encoders.encoder import Encoder
from unpoison.errors import ConfigError
from unpoison.patch_pipeline import by_coverage, coverage
from unpoison.records import Evidence, ImageSet, ScanResult, StageCost, Verdict
from unpoison.runs import Stages
from unpoison.runtime import Progress, library_versions
from unpoison.scan.config import PICTURES, ScanConfig
from unpoison.scan.cost import ScanCost
from unpoison.scan.detector import (
    JUDGED_RATE,
    Detection,
    Detector,
    fit_detector,
    fit_on_judged,
    judge,
    load_detector,
    make_config,
    passes_per_image,
    restore_detector,
)

__all__ = ["DETECTOR_FILE", "DetectorBench", "detector_cost", "given_detector", "judge_images"]

DETECTOR_FILE = "detector.safetensors"
"""In the run folder: the detector, when it was fitted on auxiliary images; `--detector` takes it."""

_NOT_TESTED = (
    "images that the detector's method misses: see docs/detectors.md",
    "whether one pattern recurs in the images: the patch search does that",
)


@dataclass(frozen=True, eq=False)
class DetectorBench:
    """What every stage of one scan by a detector needs.

    Attributes:
        images: what is judged.
        location: where they came from, for people.
        config: settings.
        encoder: the suspect; None for `spectral-dct`.
        other: the second encoder, for `cross-encoder`.
        detector: made on other images; None fits one.
        auxiliary: (n, 3, S, S) uint8 to fit and calibrate one; None takes the judged images themselves.
        run: keeps the stages.
        seed: of every draw.
        batch_size: images per pass.
        progress: told (stage, done, total).
    """

    images: ImageSet
    location: str
    config: ScanConfig
    encoder: Encoder | None
    other: Encoder | None
    detector: Detector | None
    auxiliary: Tensor | None
    run: Stages
    seed: int
    batch_size: int
    progress: Progress

    def passes(self) -> int:
        """Images that the encoders were shown so far."""
        return sum(each.images_shown for each in (self.encoder, self.other) if each is not None)


def given_detector(
    detector: Detector | str | Path | None, config: ScanConfig, encoder: Encoder | None, other: Encoder | None
) -> Detector | None:
    """The detector that a caller gave, as a file or made.

    Raises:
        ConfigError: it is of another method, or for other encoders.
        CheckpointError: the file is no detector.
    """
    if detector is None:
        return None
    if not isinstance(detector, Detector):
        detector = load_detector(detector, encoder, other=other)
    if detector.scorer.method != config.method:
        raise ConfigError(
            f"method {config.method!r}, but the detector is one of {detector.scorer.method}: leave one of them out"
        )
    kept, asked = detector.calibration.false_positive_rate, config.false_positive_rate
    if asked not in (kept, ScanConfig.false_positive_rate):
        raise ConfigError(
            f"false_positive_rate={asked:g}: the detector was calibrated for {kept:g}, which it keeps; leave it out"
        )
    return detector


def judge_images(
    bench: DetectorBench, min_coverage: float, started: float
) -> tuple[ScanResult, Detector | None]:
    """Fit unless a detector was given, score, judge.

    Args:
        bench: images, encoders, settings.
        min_coverage: share of readable images below which no evidence is `inconclusive`.
        started: by `time.perf_counter`, when the scan began.

    Returns:
        The result, and the detector when it was made here on auxiliary images.

    Raises:
        ConfigError: too few images to fit or to calibrate.
        NoVerdictError: features or scores are not finite.
    """
    detector = bench.detector or _fitted(bench)

    def compute() -> dict[str, Tensor]:
        scores = detector.score(bench.images.pixels, batch_size=bench.batch_size, progress=bench.progress)
        return {"scores": scores}

    scores = bench.run.stage("scores", compute, passes=bench.passes)["scores"]
    independent = bench.detector is not None or bench.auxiliary is not None
    said = judge(bench.images, scores, detector, alpha=bench.config.alpha, independent=independent)
    verdict, reason = said.verdict, said.reason
    if verdict == "no_evidence":
        verdict, reason = by_coverage(bench.images, min_coverage)
    summary = _summary(bench, detector, said, verdict, reason, independent, started)
    result = ScanResult(verdict, said.findings, (), _evidence(bench.images, scores), summary)
    return result, detector if bench.detector is None and independent else None


def detector_cost(config: ScanConfig, n_images: int, n_auxiliary: int | None, image_size: int) -> ScanCost:
    """Passes of a scan by a detector that is fitted first.

    Args:
        config: of a detector.
        n_images: images to judge.
        n_auxiliary: images to fit and calibrate on, half each; None: the judged ones; 0 when a detector is given.
        image_size: side of the images, pixels.
    """
    fitted, scored = passes_per_image(make_config(config.method, faithful=config.faithful))
    calibrated = 1 if n_auxiliary is None else n_auxiliary // 2
    fit = (n_images if n_auxiliary is None else n_auxiliary - calibrated) * fitted + calibrated * scored
    side = 3 * image_size**2
    return ScanCost(
        stages=(StageCost("detector", fit, fit), StageCost("scores", n_images * scored, n_images * scored)),
        classifier_trained=0,
        classifier_judged=0,
        memory=(n_images + (n_auxiliary or 0)) * side,
        disk=n_images * side,
    )


def _fitted(bench: DetectorBench) -> Detector:
    """A detector of our own; the stage keeps it, so that a resumed run does not fit it again."""
    config = make_config(bench.config.method, faithful=bench.config.faithful, seed=bench.seed)
    method, rate = bench.config.method, bench.config.false_positive_rate

    def compute() -> dict[str, Tensor]:
        if bench.auxiliary is None:
            made = fit_on_judged(
                method,
                bench.images.pixels,
                bench.encoder,
                other=bench.other,
                config=config,
                seed=bench.seed,
                progress=bench.progress,
            )
        else:
            made = fit_detector(
                method,
                bench.auxiliary,
                bench.encoder,
                other=bench.other,
                config=config,
                false_positive_rate=rate,
                seed=bench.seed,
                batch_size=bench.batch_size,
                progress=bench.progress,
            )
        return made.to_tensors()

    tensors = bench.run.stage("detector", compute, passes=bench.passes)
    if bench.auxiliary is None:
        rate = JUDGED_RATE
    return restore_detector(config, tensors, bench.encoder, other=bench.other, false_positive_rate=rate)


def _evidence(images: ImageSet, scores: Tensor) -> Evidence:
    """The highest-scored images; a detector looks at no particular place, so their maps are empty."""
    best = scores.argsort(descending=True, stable=True)[:PICTURES]
    ids = tuple(images.ids[row] for row in best.tolist())
    return Evidence(ids, images.pixels[best], torch.zeros(len(best), images.size, images.size))


def _summary(
    bench: DetectorBench,
    detector: Detector,
    said: Detection,
    verdict: Verdict,
    reason: str,
    independent: bool,
    started: float,
) -> dict[str, Any]:
    """The content of verdict.json."""
    images, config, calibration = bench.images, bench.config, detector.calibration
    n_flagged = int(said.findings["flagged"].sum())
    not_tested = list(_NOT_TESTED)
    if images.skipped:
        not_tested.append(f"{len(images.skipped)} images that could not be read")
    if bench.encoder is not None and bench.encoder.preprocessing.assumed:
        not_tested.append("whether the encoder's normalisation is right: mean, std or size had to be assumed")
    if verdict == "poisoned" and independent:
        not_tested.append(
            "each flagged image for itself: about "
            f"{calibration.bound:.2%} of innocent images are flagged, too"
        )
    made_on = "auxiliary images" if bench.auxiliary is not None else "the judged images"
    summary: dict[str, Any] = {
        "schema": 1,
        "verdict": verdict,
        "method": config.method,
        "alpha": config.alpha,
        "p_value": said.p_value,
        "n_images": len(said.findings),
        "n_scored": len(images),
        "n_unscored": 0,
        "n_skipped": len(images.skipped),
        "n_flagged": n_flagged,
        "triggers": [],
        "scope": {"tested": [said.tested], "not_tested": not_tested},
        "detector": {
            "threshold": calibration.threshold if independent else None,
            "false_positive_rate": calibration.bound if independent else None,
            "n_calibration": calibration.n_images if independent else 0,
            "made_on": "other images, before" if bench.detector is not None else made_on,
            "fingerprint": detector.fingerprint(),
            "config": asdict(detector.scorer.config),
        },
        "coverage": coverage(images),
        "location": bench.location,
        "encoder": "" if bench.encoder is None else bench.encoder.name,
        "encoder_fingerprint": "" if bench.encoder is None else bench.encoder.fingerprint,
        "images_fingerprint": images.fingerprint,
        "encoder_passes": bench.run.passes,
        "seconds": round(time.perf_counter() - started, 3),
        "stages": {name: round(seconds, 3) for name, seconds in bench.run.seconds.items()},
        "config": asdict(config),
        "seed": bench.seed,
        "versions": library_versions(),
    }
    if bench.encoder is not None:
        summary["precision"] = str(bench.encoder.precision).removeprefix("torch.")
    if bench.other is not None:
        summary["other_encoder"] = bench.other.name
    if said.rule:
        summary["rule"] = said.rule
    if reason:
        summary["reason"] = reason
    return summary
