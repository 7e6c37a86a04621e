"""The story of an audit: what happens to an encoder on the way to a verdict, one call per stage.

images → own collapse → a patch at each place → starts at the best → the smallest mask → how far its trigger reaches
→ its collapse on other images → rank among clean encoders; beside it, what every cluster needs
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unpoison.audit.cost import audit_cost
from unpoison.audit.decree import (
    FEWEST_SHADOW_IMAGES,
    DecreeConfig,
    Inversion,
    Windows,
    blend,
    box_of,
    hold_out,
    invert,
    mean_pairwise_cosine,
    own_collapse,
    scout,
    too_few,
    whole_trigger,
)
from unpoison.audit.reference import (
    Conditions,
    Judgement,
    ReferenceTable,
    add_to_reference,
    family_of,
    judge,
    key_of,
    read_reference,
)
from unpoison.audit.result import AuditResult
from unpoison.audit.shadow import GENERATED, generated_images
from unpoison.audit.ssl_cleanse import OUTLIER, Needed, SslCleanseConfig, cleanse
from unpoison.data.export import check_outside, write_json_atomically
from unpoison.data.load import as_image_set
from unpoison.data.sources import ImageSource, open_source
from unpoison.encoders.checkpoints import as_encoder, save_tensors
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.encoders.extract import extract_features
from unpoison.encoders.rate import Rate, measure_rate
from unpoison.errors import ConfigError, DataError, NoVerdictError
from unpoison.pipeline import Images, count_of
from unpoison.records import Cost, ImageSet
from unpoison.report.audit_page import write_audit_report
from unpoison.runs import MemoryRun, RunFolder, Stages
from unpoison.runtime import Progress, library_versions, silent, stage_generator

__all__ = [
    "PAPER_IMAGES",
    "PAPER_THRESHOLD",
    "SHADOW_IMAGES",
    "SHIPPED_REFERENCE",
    "AuditPreview",
    "audit",
    "conditions_of",
    "load_audit",
    "preview_audit",
]

SHIPPED_REFERENCE = Path(__file__).parent / "audit" / "reference.json"
"""Figures of clean encoders that come along; benchmarks/zoo.py makes them."""

PAPER_THRESHOLD = 0.1
"""Mask share below which the paper calls an encoder trojaned; shown beside the figure, never the verdict."""

SHADOW_IMAGES = 512
"""Images that an audit uses at most, unless it is told another number."""

PAPER_IMAGES = 1000
"""The same as published."""

_EXAMPLES = 8


def audit(
    encoder: Encoder | nn.Module | str | Path,
    images: Images | None = None,
    *,
    config: DecreeConfig | None = None,
    out: str | Path | None = None,
    reference: str | Path | None = None,
    add_to: str | Path | None = None,
    alpha: float = 0.05,
    second_opinion: bool = False,
    max_seconds: float | None = None,
    preprocessing: Preprocessing | None = None,
    sample: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    root: str | Path | None = None,
    follow_links: bool = False,
    fresh: bool = False,
    progress: Progress = silent,
) -> AuditResult:
    """Is this encoder backdoored?

    Args:
        encoder: a reference (`timm:NAME`, a file), an `Encoder`, or a module (then with `preprocessing`).
        images: clean images such as the encoder was made for; a folder, shards, a list file, or in Python an
            `ImageSet`, a tensor (N, 3, H, W), paths. None takes generated ones.
        config: how hard to look.
        out: run folder with all files of a run; a run that was stopped goes on there, a finished one is judged again,
            which costs nothing. None keeps everything in memory.
        reference: file with the figures of clean encoders of the same family, beside those that come along; where
            neither has any, there is no verdict.
        add_to: reference file to which this encoder, known to be clean, is added.
        alpha: allowed share of clean encoders that are called backdoored.
        second_opinion: ask SSL-Cleanse, too; may cost more than the search itself, and the verdict ignores it.
        max_seconds: end the search by then, with what it has found; what is found late may then be missed, and the
            verdict is `inconclusive` where it would have been `no_evidence`.
        preprocessing: of a module.
        sample: images used at most; which ones does not depend on the seed. None: 512, or 1 000 as published. A quarter
            of them is held out of the search.
        seed: every draw of the run depends on it alone.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.
        workers: decoding threads.
        root: see `data.sources.open_source`, as for `follow_links`.
        follow_links: whether links may leave the folder.
        fresh: forget an earlier run in `out`.
        progress: told (stage, done, total).

    Raises:
        ConfigError: a setting is wrong, there is no such reference, or `out` holds something else.
        DataError: the reference cannot be read.
        CheckpointError: the encoder's weights are refused.
        NoVerdictError: too few images, or the encoder's features are not finite or all alike.
    """
    config = config or DecreeConfig()
    sample = _sample_of(sample, config)
    tables = _checked(config, reference, add_to, alpha, second_opinion, max_seconds, sample)
    if isinstance(images, str | Path):
        images = open_source(images, root=root, follow_links=follow_links)
    if out is not None and isinstance(images, ImageSource):
        check_outside(Path(out), images)
    suspect = as_encoder(encoder, preprocessing, device=device, precision=precision)
    if add_to is not None and not key_of(suspect):
        raise ConfigError(
            "an encoder without a fingerprint cannot be a reference: give a file, a name or an nn.Module"
        )
    geometry = suspect.preprocessing.geometry
    if images is None:
        shadow, location = generated_images(sample, geometry.size), GENERATED
    else:
        # The sample is the same for every seed, so that audits with one folder compare.
        shadow = as_image_set(images, geometry, workers=workers, sample=sample, seed=0, progress=progress)
        location = images.location if isinstance(images, ImageSource) else "images in memory"
    conditions = Conditions(
        family=family_of(suspect),
        image_size=geometry.size,
        settings=asdict(config),
        shadow=hashlib.sha256(shadow.pixels.contiguous().numpy().tobytes()).hexdigest(),
    )
    settings = {
        "audit": "decree",
        "encoder": suspect.identity(),
        "precision": str(suspect.precision).removeprefix("torch."),
        "geometry": asdict(geometry),
        "images": conditions.shadow,
        "config": asdict(config),
        "second_opinion": second_opinion,
        "max_seconds": max_seconds,
        "seed": seed,
    }
    folder = None if out is None else RunFolder(Path(out), settings, fresh=fresh)
    run: Stages = folder or MemoryRun()
    try:
        searched = _Search(
            suspect,
            shadow,
            *hold_out(shadow, stage_generator(seed, "audit/hold out")),
            config,
            run,
            seed,
            progress,
            max_seconds,
        ).result(second_opinion=second_opinion)
    except NoVerdictError:
        if folder is not None:
            folder.forget()
        raise
    said = judge(searched.mask_share, conditions, tables, alpha=alpha, fingerprint=key_of(suspect))
    if searched.cut_short and said.verdict == "no_evidence":
        said = replace(
            said,
            verdict="inconclusive",
            reason=f"the time was over before the search ({max_seconds:g} s): with more, the mask might have become "
            "as small as a backdoor's; raise --max-seconds",
        )
    if add_to is not None:
        add_to_reference(add_to, conditions, key_of(suspect), searched.mask_share)
    summary = {
        **_answer(searched, said, config, alpha, None if reference is None else Path(reference).name),
        "family": conditions.family,
        "image_size": conditions.image_size,
        "scope": _scope(location == GENERATED),
        "location": location,
        "n_images": len(shadow) + len(shadow.skipped),
        "n_searched": searched.n_searched,
        "n_held_out": len(searched.held),
        "n_skipped": len(shadow.skipped),
        "max_seconds": max_seconds,
        "cut_short": searched.cut_short,
        "encoder": suspect.name,
        "encoder_fingerprint": suspect.fingerprint,
        "preprocessing_assumed": suspect.preprocessing.assumed,
        "images_fingerprint": conditions.shadow,
        "encoder_passes": run.passes,
        "seconds": sum(run.seconds.values()),
        "stages": dict(run.seconds),
        "precision": str(suspect.precision).removeprefix("torch."),
        "config": asdict(config),
        "seed": seed,
        "versions": library_versions(),
    }
    # Spread over the order of the images, in which one class often follows the other.
    rows = torch.linspace(0, len(searched.held) - 1, min(_EXAMPLES, len(searched.held))).long()
    examples = searched.held[rows]
    stamped = blend(examples.float() / 255, searched.found.mask, searched.found.pattern)
    pixels = (stamped * 255).round().to(torch.uint8)
    result = AuditResult(said.verdict, searched.found, examples, pixels, said.mask_shares, summary)
    if folder is not None:
        write_audit_report(folder.path, result)
        _save(folder.path, result)
    return result


@dataclass(frozen=True)
class AuditPreview:
    """What an audit would cost.

    Attributes:
        n_images: that it would use; some may turn out unreadable.
        cost: passes.
        rate: of the encoder.
        memory: bytes of the images.
    """

    n_images: int
    cost: Cost
    rate: Rate
    memory: int

    @property
    def seconds(self) -> float:
        """Of the expected passes, at the encoder's rate."""
        return self.cost.expected / self.rate.images_per_second


def preview_audit(
    encoder: Encoder | nn.Module | str | Path,
    images: Images | None = None,
    *,
    config: DecreeConfig | None = None,
    reference: str | Path | None = None,
    add_to: str | Path | None = None,
    alpha: float = 0.05,
    second_opinion: bool = False,
    max_seconds: float | None = None,
    preprocessing: Preprocessing | None = None,
    sample: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    root: str | Path | None = None,
    follow_links: bool = False,
) -> AuditPreview:
    """What an audit would cost: nothing is decoded or written, and the encoder is shown two batches of grey images.

    Args and errors are those of `audit`.
    """
    config = config or DecreeConfig()
    sample = _sample_of(sample, config)
    _checked(config, reference, add_to, alpha, second_opinion, max_seconds, sample)
    if isinstance(images, str | Path):
        images = open_source(images, root=root, follow_links=follow_links)
    suspect = as_encoder(encoder, preprocessing, device=device, precision=precision)
    count = sample if images is None else min(sample, count_of(images))
    if count < FEWEST_SHADOW_IMAGES:
        raise too_few(count)
    size = suspect.preprocessing.geometry.size
    return AuditPreview(
        n_images=count,
        cost=audit_cost(config, count, size, second_opinion=second_opinion),
        rate=measure_rate(suspect, min(config.batch_size, count)),
        memory=count * 3 * size**2,
    )


def conditions_of(summary: Mapping[str, Any]) -> Conditions:
    """Under which the mask share of a verdict.json was measured."""
    return Conditions(
        family=summary["family"],
        image_size=summary["image_size"],
        settings=summary["config"],
        shadow=summary["images_fingerprint"],
    )


def load_audit(folder: str | Path) -> AuditResult:
    """The result of a finished audit.

    Raises:
        ConfigError: there is no finished audit in the folder.
        DataError: a file of it is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "verdict.json").is_file():
        raise ConfigError(
            f"{folder}: holds no finished audit (no verdict.json); the audit's own command resumes it"
        )
    try:
        summary = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
        with safe_open(folder / "trigger.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        return AuditResult(
            summary["verdict"],
            _as_inversion(tensors),
            tensors["examples"],
            tensors["stamped"],
            tuple(float(share) for share in summary["reference_shares"]),
            summary,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if (folder / "findings.parquet").exists():
            raise ConfigError(f"{folder}: holds a scan and no audit; load it with unpoison.load") from error
        raise DataError(
            f"{folder}: a file of the audit is missing or damaged; audit again with --fresh"
        ) from error


@dataclass(frozen=True, eq=False)
class _Searched:
    """What the search found.

    Attributes:
        tried: one per start, at the gain that the verdict rests on.
        relaxed: the best start at the relaxed gain; None when it was not needed.
        extent: the whole trigger of a small mask; None where that is the mask itself.
        found: the trigger to show.
        before, after: mean cosine of the held-out images without and with it.
        n_searched: images that it was searched on.
        held: (M, 3, S, S) uint8, the others.
        cut_short: whether the time was over before every start had its steps.
        needed: what SSL-Cleanse says; None when faithful to DECREE alone.
    """

    tried: tuple[Inversion, ...]
    relaxed: Inversion | None
    extent: Inversion | None
    found: Inversion
    before: float
    after: float
    n_searched: int
    held: Tensor
    cut_short: bool
    needed: Needed | None

    @property
    def mask_share(self) -> float:
        """Of the smallest mask at the verdict's gain; 1 when none reached it."""
        best = _best(self.tried)
        return best.mask_share if best.reached else 1.0


_Place = tuple[Windows, int]
"""A window that was looked at, by its number."""


@dataclass(frozen=True, eq=False)
class _Search:
    """From images to the smallest mask: the stages of a search, and the time that is left for them.

    Attributes:
        encoder: under suspicion.
        shadow: all images.
        searched: (M, 3, S, S) uint8, those that the trigger is searched on.
        held: likewise, those that it is measured on.
        config, run, seed, progress, max_seconds: see `audit`.
    """

    encoder: Encoder
    shadow: ImageSet
    searched: Tensor
    held: Tensor
    config: DecreeConfig
    run: Stages
    seed: int
    progress: Progress
    max_seconds: float | None

    def result(self, *, second_opinion: bool) -> _Searched:
        """Every stage in turn."""
        clean = self._stage("clean", self._own_collapse)
        collapse = float(clean["searched"])
        windows = None if self.config.faithful else self._scout()
        self._refuse_if_over()
        places = [None] if windows is None else [(windows, n) for n in windows.best(self.config.restarts)]
        tried = self._starts("start", self.config.gain, places, collapse)
        cut_short = len(tried) < len(places) or any(one.cut_short for one in tried)
        found, relaxed = _best(tried), None
        if (
            not found.reached
            and not self.config.faithful
            and (looked := self._starts("relaxed", self.config.relaxed_gain, places, collapse))
        ):
            relaxed = _best(looked)
            found = relaxed if relaxed.reached else found
        extent, place = None, places[tried.index(found)] if found in tried else None
        if place is not None and found.reached:
            extent = self._reach(place, collapse)
            found = extent or found
        # By another name, for a run of an earlier version may have measured the smallest mask.
        measured = "measure" if extent is None else "measure-extent"
        after = self._stage(measured, lambda: self._measure(found.mask, found.pattern))
        return _Searched(
            tried=tried,
            relaxed=relaxed,
            extent=extent,
            found=found,
            before=float(clean["collapse"]),
            after=float(after["collapse"]),
            n_searched=len(self.searched),
            held=self.held,
            cut_short=cut_short,
            needed=self._cleanse(windows) if second_opinion and windows is not None else None,
        )

    def _stage(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.run.stage(name, compute, passes=lambda: self.encoder.images_shown)

    def _left(self) -> float:
        """Seconds; by the stages' own clocks: a run that was stopped decides the same when it goes on."""
        return math.inf if self.max_seconds is None else self.max_seconds - sum(self.run.seconds.values())

    def _refuse_if_over(self) -> None:
        if self._left() <= 0:
            raise NoVerdictError(
                f"max_seconds={self.max_seconds:g}: all of it went by before the first start; raise it"
            )

    def _measure(self, mask: Tensor | None = None, pattern: Tensor | None = None) -> dict[str, Tensor]:
        value = mean_pairwise_cosine(self.encoder, self.held, mask=mask, pattern=pattern)
        return {"collapse": torch.tensor(value, dtype=torch.float64)}

    def _own_collapse(self) -> dict[str, Tensor]:
        # Refuses NaN and zero features.
        extract_features(self.encoder, self.shadow, batch_size=256, progress=self.progress)
        own = own_collapse(self.encoder, self.searched)
        return {"searched": torch.tensor(own, dtype=torch.float64), **self._measure()}

    def _scout(self) -> Windows:
        """What a patch at each place can do; every place is looked at, or none."""
        self._refuse_if_over()
        looked_from, before = time.perf_counter(), self._left()

        def looking(stage: str, done: int, total: int) -> None:
            """Where there is no time for all places, say so at once."""
            needed = (time.perf_counter() - looked_from) * total / done
            if done >= total / 10 and needed >= before:
                raise NoVerdictError(
                    f"max_seconds={self.max_seconds:g}: looking at all places takes about {needed:.0f} s, before the "
                    "first start; raise it"
                )
            self.progress(stage, done, total)

        def compute() -> dict[str, Tensor]:
            generator = stage_generator(self.seed, "audit/scout")
            found = scout(self.encoder, self.searched, self.config, generator=generator, progress=looking)
            return {"corners": found.corners, "patterns": found.patterns, "collapse": found.collapse}

        tensors = self._stage("scout", compute)
        return Windows(tensors["corners"], tensors["patterns"], tensors["collapse"])

    def _starts(
        self, name: str, gain: float, places: Sequence[_Place | None], clean_collapse: float
    ) -> tuple[Inversion, ...]:
        """One per place; those that an end of the time leaves no step for are left out."""

        def start(number: int) -> Inversion:
            until = time.perf_counter() + self._left() / (len(places) - number)

            def compute() -> dict[str, Tensor]:
                found = invert(
                    self.encoder,
                    self.searched,
                    self.config,
                    clean_collapse=clean_collapse,
                    generator=stage_generator(self.seed, f"audit/{name}-{number}"),
                    gain=gain,
                    start=places[number],
                    time_is_over=lambda: time.perf_counter() >= until,
                    stage=f"{name} {number + 1} of {len(places)}",
                    progress=self.progress,
                )
                return _as_tensors(found)

            return _as_inversion(self._stage(f"{name}-{number}", compute))

        return tuple(start(number) for number in range(len(places)) if self._left() > 0)

    def _reach(self, place: _Place, clean_collapse: float) -> Inversion | None:
        """The whole trigger at a place, if there is more of it than the smallest mask, and time."""
        if self._left() <= 0:
            return None
        until = time.perf_counter() + self._left()

        def compute() -> dict[str, Tensor]:
            found = whole_trigger(
                self.encoder,
                self.searched,
                self.config,
                clean_collapse=clean_collapse,
                start=place,
                generator=stage_generator(self.seed, "audit/extent"),
                time_is_over=lambda: time.perf_counter() >= until,
                progress=self.progress,
            )
            return {} if found is None else _as_tensors(found)

        tensors = self._stage("extent", compute)
        return _as_inversion(tensors) if tensors else None

    def _cleanse(self, windows: Windows) -> Needed:
        """The second opinion."""

        def compute() -> dict[str, Tensor]:
            said = cleanse(
                self.encoder,
                self.searched,
                SslCleanseConfig(),
                windows=windows,
                generator=stage_generator(self.seed, "audit/clusters"),
                progress=self.progress,
            )
            return {"mask_shares": said.mask_shares, **_as_tensors(said.found)}

        tensors = self._stage("clusters", compute)
        return Needed(tensors["mask_shares"], _as_inversion(tensors))


def _sample_of(sample: int | None, config: DecreeConfig) -> int:
    if sample is None:
        return PAPER_IMAGES if config.faithful else SHADOW_IMAGES
    return sample


def _checked(
    config: DecreeConfig,
    reference: str | Path | None,
    add_to: str | Path | None,
    alpha: float,
    second_opinion: bool,
    max_seconds: float | None,
    sample: int,
) -> tuple[ReferenceTable, ...]:
    """All reference tables; complains of whatever is wrong before the long work begins."""
    if not 0 < alpha < 0.5:
        raise ConfigError(f"alpha={alpha}: expected a false-alarm rate in (0, 0.5)")
    if sample < 1:
        raise ConfigError(f"sample={sample}: expected at least 1 image")
    if second_opinion and config.faithful:
        raise ConfigError(
            "second_opinion contradicts faithful: it starts at windows, which DECREE has not; drop one"
        )
    if max_seconds is not None:
        _check_time(max_seconds, second_opinion=second_opinion, add_to=add_to)
    if add_to is not None and Path(add_to).exists():
        read_reference(add_to)
    return read_reference(SHIPPED_REFERENCE) + (() if reference is None else read_reference(reference))


def _check_time(max_seconds: float, *, second_opinion: bool, add_to: str | Path | None) -> None:
    if not 0 < max_seconds < math.inf:
        raise ConfigError(f"max_seconds={max_seconds}: expected a positive number of seconds")
    if second_opinion:
        raise ConfigError("second_opinion contradicts max_seconds: it cannot be cut short; drop one")
    if add_to is not None:
        raise ConfigError(
            "max_seconds contradicts add_to: the figure of a search that was cut short is no reference; drop one"
        )


def _answer(
    searched: _Searched, said: Judgement, config: DecreeConfig, alpha: float, reference: str | None
) -> dict[str, Any]:
    """The first half of verdict.json: what was found, and what it means."""
    box, relaxed = box_of(searched.found.mask), searched.relaxed
    answer: dict[str, Any] = {
        "schema": 1,
        "verdict": said.verdict,
        "method": "decree",
        "alpha": alpha,
        "p_value": said.p_value,
        "mask_share": searched.mask_share,
        "reached": any(one.reached for one in searched.tried),
        "below_paper_threshold": searched.mask_share < PAPER_THRESHOLD,
        "collapse_before": searched.before,
        "collapse_after": searched.after,
        "relaxed": None
        if relaxed is None
        else {"gain": config.relaxed_gain, "reached": relaxed.reached, "mask_share": relaxed.mask_share},
        "extent": None
        if searched.extent is None
        else {
            "mask_share": searched.extent.mask_share,
            "collapse": searched.extent.collapse,
            "steps": len(searched.extent.curve),
        },
        "box": None if box is None else asdict(box),
        "image": "trigger.png",
        "starts": [
            {
                "mask_share": one.mask_share,
                "collapse": one.collapse,
                "reached": one.reached,
                "steps": len(one.curve),
            }
            for one in searched.tried
        ],
        "second_opinion": None if searched.needed is None else _second_opinion(searched.needed),
        "reference": reference,
        "reference_shares": list(said.mask_shares),
    }
    if said.reason:
        answer["reason"] = said.reason
    return answer


def _second_opinion(needed: Needed) -> dict[str, Any]:
    box = box_of(needed.found.mask)
    return {
        "method": "ssl-cleanse",
        "anomaly_index": needed.anomaly_index,
        "threshold": OUTLIER,
        "outlier": needed.anomaly_index > OUTLIER,
        "cluster": needed.cluster,
        "mask_shares": [float(share) for share in needed.mask_shares],
        "box": None if box is None else asdict(box),
    }


def _best(tried: tuple[Inversion, ...]) -> Inversion:
    """The smallest mask that collapses the features as wanted, else the largest collapse."""
    reached = [one for one in tried if one.reached]
    if reached:
        return min(reached, key=lambda one: one.mask_share)
    return max(tried, key=lambda one: one.collapse)


def _scope(generated: bool) -> dict[str, list[str]]:
    tested = [
        "one opaque or half-transparent patch at a fixed place that gives every image nearly the same features"
    ]
    untested = [
        "triggers that change the whole image, such as CTRL's",
        "backdoors that keep the features of triggered images apart on purpose, such as DRUPE's",
        "weak backdoors from poisoned training images, which gather features without making them alike",
        "several triggers: the search shows one of them",
    ]
    if generated:
        untested.append("the encoder on the images it was made for: only generated ones were used")
    return {"tested": tested, "not_tested": untested}


def _as_tensors(found: Inversion) -> dict[str, Tensor]:
    figures = torch.tensor(
        [found.mask_share, found.collapse, float(found.reached), float(found.cut_short)], dtype=torch.float64
    )
    return {"mask": found.mask, "pattern": found.pattern, "curve": found.curve, "figures": figures}


def _as_inversion(tensors: dict[str, Tensor]) -> Inversion:
    share, collapse, reached, cut_short = tensors["figures"].tolist()
    return Inversion(
        tensors["mask"], tensors["pattern"], share, collapse, bool(reached), tensors["curve"], bool(cut_short)
    )


def _save(folder: Path, result: AuditResult) -> None:
    """The trigger as tensors, and verdict.json last, since it says that the audit is complete."""
    tensors = {**_as_tensors(result.found), "examples": result.examples, "stamped": result.stamped}
    plain = {key: value.contiguous(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_tensors(folder / "trigger.safetensors", plain, {"schema": 1}, what="trigger")
    write_json_atomically(folder / "verdict.json", result.summary)
