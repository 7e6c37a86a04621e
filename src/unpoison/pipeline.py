"""The story in code: what happens to images on the way to a verdict.

images → plan: patch search beside the spectral screen, one of them alone, or a detector → verdict, findings, report

The patch search itself is told in `patch_pipeline`, that of a detector in `detector_pipeline`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unpoison.data.export import check_outside
from unpoison.data.load import as_image_set, usual_side
from unpoison.data.sources import ImageSource, open_files, open_source
from unpoison.detector_pipeline import (
    DETECTOR_FILE,
    DetectorBench,
    detector_cost,
    given_detector,
    judge_images,
)
from unpoison.encoders.checkpoints import as_encoder, load_encoder, save_encoder
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.encoders.rate import Rate, measure_rate
from unpoison.errors import ConfigError, NothingToScanError, NoVerdictError
from unpoison.patch_pipeline import GLOBAL_TRIGGERS, PatchBench, search_patches
from unpoison.pretrain.loop import PretrainConfig, pretrain
from unpoison.records import Geometry, ImageSet, ScanResult
from unpoison.report.folder import write_report
from unpoison.runs import MemoryRun, RunFolder, Stages, load_result
from unpoison.runtime import Progress, choose_device, choose_precision, silent
from unpoison.scan.config import SCREEN_SHARE, ScanConfig
from unpoison.scan.cost import ScanCost, expected_cost, fit_budget
from unpoison.scan.detector import Detector
from unpoison.scan.power import power_statement
from unpoison.scan.spectral_dct import SpectralDctConfig, Waves, find_waves

__all__ = ["FEWEST_IMAGES", "Images", "Preview", "count_of", "preview", "scan"]

Opened = ImageSource | ImageSet | Tensor | Sequence[str | Path]
Images = str | Path | Opened

FEWEST_IMAGES = 50
"""Readable images below which clusters, a search half and a confirmation half mean nothing."""

_WAVES_TESTED = "waves in the chroma at single odd frequencies, as CTRL adds them, alike in many images"
_OTHER_GLOBAL_TRIGGERS = (
    "other triggers that cover the whole image: blended, warping, waves of brightness, waves at even or low "
    "frequencies, waves that scaling to the encoder's input hides"
)


def scan(
    images: Images,
    encoder: Encoder | nn.Module | str | Path | None = None,
    *,
    config: ScanConfig | None = None,
    detector: Detector | str | Path | None = None,
    auxiliary: Images | None = None,
    other: Encoder | nn.Module | str | Path | None = None,
    out: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    pretrain_config: PretrainConfig | None = None,
    image_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    root: str | Path | None = None,
    follow_links: bool = False,
    only: Collection[str] | None = None,
    limit: int | None = None,
    sample: int | None = None,
    min_coverage: float = 0.99,
    fresh: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> ScanResult:
    """Which of these images are poisoned?

    Args:
        images: a folder, parquet or tar shards, a list file; or in Python an `ImageSet`, a tensor (N, 3, H, W), paths.
        encoder: trained on the images, or thought to be; a reference (`timm:NAME`, a file), an `Encoder`, or a module
            (then with `preprocessing`). None trains one on the images first. The method `spectral-dct` takes none,
            the other detectors must have one.
        config: what to look for and how hard; `config.method` chooses between the patch search and a detector.
        detector: for a method that is a detector: one that was made before, or its file.
        auxiliary: for such a method: images like the judged ones, without labels, to fit and calibrate a detector on,
            half each. Without them and without `detector` the judged images take their place; see
            `scan.detector.judge` for what the verdict is then.
        other: for `cross-encoder`: the second encoder, as `encoder`; a module has the same `preprocessing`.
        out: run folder with all files of a run; a run that was stopped goes on there, a finished one is returned.
            None keeps everything in memory.
        preprocessing: of a module.
        pretrain_config: for `encoder` None.
        image_size: for `encoder` None; default: the usual side of the images, at most 224 pixels.
        seed: every draw of the run depends on it alone.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.
        batch_size: images per pass; None picks by device.
        workers: decoding threads.
        root: see `data.sources.open_source`, as for `follow_links` and `only`.
        follow_links: whether links may leave the folder.
        only: ids to keep to.
        limit: scan only so many images, the first.
        sample: scan only so many images, drawn by the seed.
        min_coverage: share of images that must be readable for any verdict but `inconclusive`.
        fresh: forget an earlier run in `out`.
        command: line that repeats the scan, for the report and the summary.
        progress: told (stage, done, total).

    Raises:
        ConfigError: a setting is wrong, or `out` holds something else.
        NothingToScanError: fewer than 50 readable images.
        CheckpointError: the encoder's weights are refused.
    """
    started = time.perf_counter()
    config = config or ScanConfig()
    if not 0 <= min_coverage <= 1:
        raise ConfigError(f"min_coverage={min_coverage}: expected a share between 0 and 1")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1 image per pass")
    for name, most in (("limit", limit), ("sample", sample)):
        if most is not None and most < 1:
            raise ConfigError(f"{name}={most}: expected at least 1 image")
    _check_parts(config, encoder, detector, auxiliary, other)
    source = _opened(images, root, follow_links, only)
    given = (
        None if encoder is None else as_encoder(encoder, preprocessing, device=device, precision=precision)
    )
    second = None if other is None else _second(other, given, preprocessing, device, precision)
    made = given_detector(detector, config, given, second)
    reference = None if auxiliary is None else _opened(auxiliary, root, follow_links, None)
    recipe = pretrain_config or PretrainConfig()
    geometry = (
        given.preprocessing.geometry if given else _own_geometry(source, made.size if made else image_size)
    )
    settings: dict[str, Any] = {
        "images": {"signature": _signature(source), "limit": limit, "sample": sample},
        "encoder": given.identity()
        if given
        else None
        if config.by_detector
        else {"pretrain": asdict(recipe)},
        "geometry": asdict(geometry),
        "precision": _precision(given, config, device, precision),
        "config": asdict(config),
        "seed": seed,
        "min_coverage": min_coverage,
    }
    if config.by_detector:
        settings["detector"] = made.fingerprint() if made else None
        settings["auxiliary"] = None if reference is None else _signature(reference)
        settings["other"] = second.identity() if second else None
    named = _named(source, limit, sample)
    if not config.by_detector and fresh:
        _fitted(config, named, geometry.size)  # nothing of an earlier run is removed for what no scan can do
    if out is not None and isinstance(source, ImageSource):
        check_outside(Path(out), source)
    run: Stages = MemoryRun()
    folder = None if out is None else RunFolder(Path(out), settings, fresh=fresh)
    if folder is not None:
        if folder.complete:
            return load_result(folder.path)
        run = folder
    location = source.location if isinstance(source, ImageSource) else "images in memory"
    try:
        decoded = as_image_set(
            source,
            geometry,
            workers=workers,
            store=folder.cache / "pixels" if folder else None,
            limit=limit,
            sample=sample,
            seed=seed,
            progress=progress,
        )
        if len(decoded) < FEWEST_IMAGES:
            raise NothingToScanError(
                f"{len(decoded)} readable images ({len(decoded.skipped)} unreadable): "
                f"a scan needs at least {FEWEST_IMAGES}"
            )
        asked = config.resolve(len(decoded), geometry.size)
        if config.by_detector:
            like = (
                None
                if reference is None
                else as_image_set(reference, geometry, workers=workers, progress=progress).pixels
            )
            if like is not None and (known := _share_known(decoded.pixels, like)) > _MOST_KNOWN:
                raise ConfigError(
                    f"auxiliary: {known:.0%} of the judged images are among the auxiliary ones, so that the threshold "
                    "would be their own; give other images, or leave it out for an order without a verdict"
                )
            judging = DetectorBench(
                decoded, location, asked, given, second, made, like, run, seed, batch_size or 256, progress
            )
            result, fitted = judge_images(judging, min_coverage, started)
            if folder is not None and fitted is not None:
                fitted.save(folder.path / DETECTOR_FILE)
            return _saved(_of_a_part(result, source, limit or sample, only), decoded, folder, command)
        resolved = _fitted(config, len(decoded), geometry.size)
    except (ConfigError, NothingToScanError):
        if folder is not None:
            folder.forget()
        raise
    waves = _screen(decoded, config, run) if _screens(config, geometry.size) else None
    suspect = given or _train(decoded, recipe, folder, seed, device, precision, progress)
    bench = PatchBench(
        decoded,
        location,
        suspect,
        _of_the_search(resolved, waves),
        run,
        seed,
        batch_size or _usual_batch(suspect),
        progress,
        _of_the_search(asked, waves),
    )
    try:
        found = search_patches(bench, min_coverage, started)
    except NoVerdictError:
        if folder is not None and given is not None:  # an encoder that was trained here is kept
            folder.forget()
        raise
    found = _with_screen(found, waves, config)
    if given is None:
        found = _of_own_encoder(found, recipe)
    result = _of_a_part(found, source, limit or sample, only)
    return _saved(result, decoded, folder, command)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a scan would cost.

    Attributes:
        config: settings as the scan would take them.
        n_images: images that the source names, at most `limit` or `sample`; some may turn out unreadable.
        batch_size: images per pass.
        cost: passes, memory, disk.
        rate: of the encoder; None without one.
        seconds: of the expected passes at that rate; None without an encoder.
        pretraining: images shown in training an encoder first; 0 with one.
        power: sentence on the smallest poison that the scan would catch.
    """

    config: ScanConfig
    n_images: int
    batch_size: int
    cost: ScanCost
    rate: Rate | None
    seconds: float | None
    pretraining: int
    power: str


def preview(
    images: Images,
    encoder: Encoder | nn.Module | str | Path | None = None,
    *,
    config: ScanConfig | None = None,
    detector: Detector | str | Path | None = None,
    auxiliary: Images | None = None,
    other: Encoder | nn.Module | str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    pretrain_config: PretrainConfig | None = None,
    image_size: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    root: str | Path | None = None,
    follow_links: bool = False,
    only: Collection[str] | None = None,
    limit: int | None = None,
    sample: int | None = None,
) -> Preview:
    """What a scan would cost: nothing is decoded or written, and the encoder is shown two batches of grey images.

    Args:
        images: see `scan`, as for all others that have no more to say here.
        encoder: None counts the training of one, and knows no speed.
        config: what to look for and how hard; `max_seconds` is not applied, since it needs the speed of the scan.
        detector: nothing is fitted then.
        auxiliary: counted, not read.
        other: the second encoder is not timed.
        preprocessing: of a module.
        pretrain_config: for `encoder` None.
        image_size: for `encoder` None.
        device: where the encoder is timed.
        precision: likewise.
        batch_size: images of the timed batch.
        root: for a list of paths.
        follow_links: whether links may leave the folder.
        only: ids to keep to.
        limit: scan only so many images.
        sample: likewise.

    Raises:
        ConfigError: a setting is wrong, or the budget is too small.
        NothingToScanError: fewer than 50 images.
        CheckpointError: the encoder's weights are refused.
    """
    config = config or ScanConfig()
    _check_parts(config, encoder, detector, auxiliary, other)
    source = _opened(images, root, follow_links, only)
    given = (
        None if encoder is None else as_encoder(encoder, preprocessing, device=device, precision=precision)
    )
    geometry = given.preprocessing.geometry if given else _own_geometry(source, image_size)
    count = _named(source, limit, sample)
    resolved = _fitted(config, count, geometry.size)
    batch = batch_size or (512 if given is None else _usual_batch(given))
    rate = None if given is None else measure_rate(given, min(batch, count))
    if config.by_detector:
        like = None if auxiliary is None else count_of(_opened(auxiliary, root, follow_links, None))
        cost = detector_cost(resolved, count, 0 if detector is not None else like, geometry.size)
        power = "a detector judges images one by one; docs/detectors.md says what each misses"
    else:
        columns = 512 if rate is None else rate.features
        cost = expected_cost(resolved, count, geometry.size, features=columns, batch_size=batch)
        power = power_statement(resolved, count, geometry.size).sentence
    trains = given is None and not config.by_detector
    return Preview(
        config=resolved,
        n_images=count,
        batch_size=batch,
        cost=cost,
        rate=rate,
        seconds=None if rate is None else cost.expected / rate.images_per_second,
        pretraining=(pretrain_config or PretrainConfig()).resolve().epochs * count if trains else 0,
        power=power,
    )


def _check_parts(
    config: ScanConfig,
    encoder: object,
    detector: object,
    auxiliary: object,
    other: object,
) -> None:
    """Complain about what the method does not take, and about what it lacks, before anything is loaded."""
    method = config.method
    if not config.by_detector:
        for name, part in (("detector", detector), ("auxiliary", auxiliary), ("other", other)):
            if part is not None:
                raise ConfigError(
                    f"{name}: the patch search takes none; leave it out, or give the method of a detector"
                )
        return
    if detector is not None and auxiliary is not None:
        raise ConfigError(
            "detector and auxiliary: a finished detector is not fitted again; leave one of them out"
        )
    if method == "spectral-dct" and encoder is not None:
        raise ConfigError("spectral-dct takes no encoder: leave it out")
    if method != "spectral-dct" and encoder is None:
        raise ConfigError(f"{method} takes the encoder that it judges: give one")
    if method == "cross-encoder" and other is None:
        raise ConfigError("cross-encoder takes a second encoder: give one with other")
    if method != "cross-encoder" and other is not None:
        raise ConfigError(f"{method} takes no second encoder: leave it out")


def _second(
    other: Encoder | nn.Module | str | Path,
    first: Encoder | None,
    preprocessing: Preprocessing | None,
    device: str,
    precision: str,
) -> Encoder:
    """The encoder that the first one is compared with; a name takes images of the first one's side."""
    by_name = isinstance(other, str) and ":" in other and not Path(other).is_file()
    side = first.preprocessing.geometry.size if first is not None and by_name else None
    return as_encoder(other, preprocessing, image_size=side, device=device, precision=precision)


def _fitted(config: ScanConfig, n_images: int, image_size: int) -> ScanConfig:
    """The settings with all defaults filled in, and made smaller where a budget asks for it."""
    resolved = config.resolve(n_images, image_size)
    if config.max_passes is None:
        return resolved
    return fit_budget(resolved, n_images, image_size, config.max_passes)


def _opened(
    images: Images, root: str | Path | None, follow_links: bool, only: Collection[str] | None
) -> Opened:
    if isinstance(images, str | Path):
        return open_source(images, root=root, follow_links=follow_links, only=only)
    return images


def count_of(source: Opened) -> int:
    """Images that a source names; some may turn out unreadable."""
    return len(source.ids if isinstance(source, ImageSource) else source)


def _screens(config: ScanConfig, image_size: int) -> bool:
    """Whether the spectral screen runs: images must hold a block."""
    return config.with_screen and image_size >= SpectralDctConfig().block


def _screen(images: ImageSet, config: ScanConfig, run: Stages) -> Waves:
    """The spectral screen, at its share of alpha."""

    def compute() -> dict[str, Tensor]:
        found = find_waves(images.pixels, SCREEN_SHARE * config.alpha)
        return {
            "p_value": torch.tensor(found.p_value, dtype=torch.float64),
            "flagged": found.flagged,
            "frequencies": torch.tensor(found.frequencies, dtype=torch.int64).view(-1, 3),
        }

    kept = run.stage("screen", compute)
    frequencies = tuple((c, row, column) for c, row, column in kept["frequencies"].tolist())
    return Waves(float(kept["p_value"]), kept["flagged"], frequencies)


def _of_the_search(config: ScanConfig, waves: Waves | None) -> ScanConfig:
    """Settings of the patch search: its own name, and its share of alpha beside a screen."""
    method = "poisoncam" if config.method == "auto" else config.method
    return replace(config, method=method, alpha=config.alpha * (1 if waves is None else 1 - SCREEN_SHARE))


def _with_screen(found: ScanResult, waves: Waves | None, config: ScanConfig) -> ScanResult:
    """The patch search's result with what the screen says; the same findings where it says nothing.

    The false-alarm rates of the two add up to alpha. Each p-value is divided by its share, so that the smaller one
    compares with alpha.
    """
    summary = {
        **found.summary,
        "alpha": config.alpha,
        "config": {**found.summary["config"], "method": config.method, "alpha": config.alpha},
    }
    if waves is None:
        return replace(found, summary=summary)
    searched = summary["p_value"]
    shares = [1.0 if searched is None else searched / (1 - SCREEN_SHARE), waves.p_value / SCREEN_SHARE]
    hit = waves.p_value <= SCREEN_SHARE * config.alpha
    scope = summary["scope"]
    not_tested = [_OTHER_GLOBAL_TRIGGERS if line == GLOBAL_TRIGGERS else line for line in scope["not_tested"]]
    summary |= {
        "p_value": min(1.0, *shares),
        "scope": {**scope, "tested": [*scope["tested"], _WAVES_TESTED], "not_tested": not_tested},
        "screens": [
            {
                "method": "spectral-dct",
                "verdict": "poisoned" if hit else "no_evidence",
                "p_value": waves.p_value,
                "alpha": SCREEN_SHARE * config.alpha,
                "n_flagged": int(waves.flagged.sum()),
                "frequencies": [list(frequency) for frequency in waves.frequencies],
            }
        ],
    }
    if not hit:
        return replace(found, summary=summary)
    findings = found.findings.copy()
    rows = findings["skip_reason"].isna().to_numpy()
    findings.loc[rows, "flagged"] = findings.loc[rows, "flagged"].to_numpy() | waves.flagged.numpy()
    for name in ("reason", "power"):
        summary.pop(name, None)
    summary |= {"verdict": "poisoned", "n_flagged": int(findings["flagged"].sum())}
    return replace(found, verdict="poisoned", findings=findings, summary=summary)


def _of_own_encoder(found: ScanResult, recipe: PretrainConfig) -> ScanResult:
    """The result with the recipe of the encoder that was trained for it, and a sentence on that."""
    said, scope = recipe.resolve(), found.summary["scope"]
    learned = f"learns in {said.epochs} epochs of {said.method} on these images"
    trained = f"poison that an encoder {learned}, for none was given"
    summary = {
        **found.summary,
        "pretrained": asdict(said),
        "scope": {**scope, "tested": [*scope["tested"], trained]},
    }
    return replace(found, summary=summary)


def _precision(given: Encoder | None, config: ScanConfig, device: str, precision: str) -> str:
    """In which the encoder works, as runs record it: halves of two precisions must not make one run."""
    if given is None and config.by_detector:
        return ""  # no encoder at all
    dtype = given.precision if given else choose_precision(precision, choose_device(device))
    return str(dtype).removeprefix("torch.")


_MOST_KNOWN = 0.1  # share of judged images that may lie among the auxiliary ones


def _share_known(judged: Tensor, auxiliary: Tensor) -> float:
    """Share of the judged images that are, pixel for pixel, among the auxiliary ones."""

    def digests(pixels: Tensor) -> list[bytes]:
        return [hashlib.sha256(one.contiguous().numpy().tobytes()).digest() for one in pixels]

    known = set(digests(auxiliary))
    return sum(digest in known for digest in digests(judged)) / len(judged)


def _named(source: Opened, *most: int | None) -> int:
    """How many images the source names, at most so many; some may turn out unreadable."""
    named = min(n for n in (count_of(source), *most) if n is not None)
    if named < FEWEST_IMAGES:
        raise NothingToScanError(f"{named} images: a scan needs at least {FEWEST_IMAGES}")
    return named


def _of_a_part(
    result: ScanResult, source: Opened, wanted: int | None, only: Collection[str] | None
) -> ScanResult:
    """The result; what `limit`, `sample` or `only` left out is named among what was not tested."""
    left = 0 if wanted is None else count_of(source) - wanted
    parts = [] if only is None else ["images that only, a list of ids to keep to, left out"]
    if left > 0:
        parts.append(f"{left} other images, which limit or sample left out")
    if not parts:
        return result
    scope = result.summary["scope"]
    scope = {**scope, "not_tested": [*parts, *scope["not_tested"]]}
    return replace(result, summary={**result.summary, "scope": scope})


def _saved(result: ScanResult, images: ImageSet, folder: RunFolder | None, command: str) -> ScanResult:
    if command:
        result = replace(result, summary={**result.summary, "command": command})
    if folder is not None:
        write_report(folder.path, result, images=images)
        folder.save(result)
    return result


def _own_geometry(source: Opened, image_size: int | None) -> Geometry:
    """For images that train their own encoder."""
    if image_size is None:
        if isinstance(source, ImageSet):
            image_size = source.size
        elif isinstance(source, Tensor):
            image_size = int(source.shape[-1])
        else:
            image_size = usual_side(source)
    return Geometry(image_size, image_size)


def _signature(source: Opened) -> str:
    """Changes when the images may have changed."""
    if isinstance(source, ImageSource):
        return source.signature()
    if isinstance(source, ImageSet) and source.fingerprint:
        return source.fingerprint
    if isinstance(source, ImageSet | Tensor):
        pixels = source.pixels if isinstance(source, ImageSet) else source
        return hashlib.sha256(pixels.cpu().contiguous().numpy().tobytes()).hexdigest()
    return open_files(source).signature()


def _usual_batch(encoder: Encoder) -> int:
    return 512 if encoder.device.type == "cpu" else 2048


def _train(
    images: ImageSet,
    recipe: PretrainConfig,
    folder: RunFolder | None,
    seed: int,
    device: str,
    precision: str,
    progress: Progress,
) -> Encoder:
    """An encoder of our own, kept in the run folder."""
    if folder is None:
        return pretrain(
            images, recipe, seed=seed, device=device, precision=precision, progress=progress
        ).encoder
    path = folder.path / "encoder.safetensors"
    if not path.exists():
        trained = pretrain(
            images,
            recipe,
            seed=seed,
            device=device,
            precision=precision,
            checkpoint=folder.cache / "pretrain.state",
            progress=progress,
        )
        save_encoder(trained, path)
    return load_encoder(path, device=device, precision=precision)
