"""`unpoison scan`: which images are poisoned?"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unpoison.cli.options import (
    BatchSize,
    Device,
    FollowLinks,
    Formats,
    Fresh,
    Images,
    Json,
    Only,
    Precision,
    Quiet,
    Root,
    Seed,
    Workers,
    batch_size_of,
    check_formats,
    write_formats,
)
from unpoison.cli.screen import Screen, log_into, read_ids
from unpoison.errors import ConfigError
from unpoison.scan.config import ScanConfig

if TYPE_CHECKING:
    from unpoison.runtime import Progress

__all__ = ["EXIT_CODES", "app"]

EXIT_CODES = {"no_evidence": 0, "poisoned": 1, "inconclusive": 4}

_DEFAULT = ScanConfig()
_SEARCH, _WHICH, _COST = "The search", "Which images", "What it may cost"
_DETECTOR = "Images one by one: a detector"

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Exit codes: 0 no evidence of poison · 1 poisoned · 2 wrong usage · 3 the run failed · 4 inconclusive, or "
    "nothing could be scanned · 130 interrupted; the same command resumes.\n\n"
    "Example: unpoison scan images/ --encoder encoder.safetensors --out run\n\n"
    "Example: unpoison scan incoming/ --method dede --encoder encoder.safetensors --auxiliary trusted/ --out run"
)
def scan(
    images: Images,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="RUN",
            help="Run folder; an earlier run in it is resumed or shown.",
            show_default=False,
        ),
    ],
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="ENC",
            help="timm:, torchvision:, hf: or open_clip:NAME, or a file; default: train one on IMAGES first.",
            show_default=False,
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a file that does not name its own.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Side of the encoder's input, where ENC does not say it.", min=8),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of the pre-training when no encoder is given.", min=1)
    ] = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Return 0 also when images are poisoned.")
    ] = False,
    formats: Formats = [],  # noqa: B006 (never changed)
    fresh: Fresh = False,
    method: Annotated[
        str,
        typer.Option(
            help="auto: poisoncam and the spectral screen; or one alone: poisoncam, patchsearch; or a detector: dede, "
            "backdoor-ids, cross-encoder, spectral-dct.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.method,
    clusters: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Clusters of k-means; default: fits the number of images.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.clusters,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="PX",
            help="Side of a trigger candidate; default: fits the image size.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.window,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Where to look in an image: mask or gradcam; default: the method's own.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.attention,
    masks: Annotated[
        str | None,
        typer.Option(
            help="grid; or random (as published), blocks or pixels; default: grid.", rich_help_panel=_SEARCH
        ),
    ] = _DEFAULT.masks,
    n_masks: Annotated[
        int, typer.Option(metavar="M", help="How many masks at random places.", rich_help_panel=_SEARCH)
    ] = _DEFAULT.n_masks,
    patches: Annotated[
        int,
        typer.Option(metavar="P", help="Windows tried per image; the best counts.", rich_help_panel=_SEARCH),
    ] = _DEFAULT.patches,
    score: Annotated[
        str | None,
        typer.Option(
            help="directed (default), concentrated, any (PoisonCAM) or source (PatchSearch).",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.score,
    top_k: Annotated[
        int, typer.Option(help="Patches that train the last classifier.", rich_help_panel=_SEARCH)
    ] = _DEFAULT.top_k,
    filter_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps of the last classifier; 0: none, flag only what the windows were cut from.",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = _DEFAULT.filter_steps,
    alpha: Annotated[
        float, typer.Option(help="Allowed false-alarm rate of the verdict.", rich_help_panel=_SEARCH)
    ] = _DEFAULT.alpha,
    faithful: Annotated[
        bool,
        typer.Option("--faithful", help="The method exactly as published; slower.", rich_help_panel=_SEARCH),
    ] = _DEFAULT.faithful,
    min_poison: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE",
            help="Smallest poison worth catching, as a number of images or as 0.002 or 0.2%; sets K.",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    race: Annotated[
        bool,
        typer.Option(
            "--race", help="Drop harmless candidates after a few flip images.", rich_help_panel=_SEARCH
        ),
    ] = _DEFAULT.race,
    detector: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A detector that an earlier run with --auxiliary wrote: RUN/detector.safetensors.",
            rich_help_panel=_DETECTOR,
            show_default=False,
        ),
    ] = None,
    auxiliary: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="Other images of the same kind, to fit a detector and its threshold on.",
            rich_help_panel=_DETECTOR,
            show_default=False,
        ),
    ] = None,
    other: Annotated[
        str | None,
        typer.Option(
            metavar="ENC",
            help="The second encoder of cross-encoder.",
            rich_help_panel=_DETECTOR,
            show_default=False,
        ),
    ] = None,
    false_positive_rate: Annotated[
        float,
        typer.Option(help="Share of innocent images that may be flagged.", rich_help_panel=_DETECTOR),
    ] = _DEFAULT.false_positive_rate,
    max_passes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Encoder passes that the scan may take; the search shrinks.",
            rich_help_panel=_COST,
        ),
    ] = _DEFAULT.max_passes,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds that it may take, by the speed of the features.",
            rich_help_panel=_COST,
        ),
    ] = _DEFAULT.max_seconds,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print expected passes, time and memory; write nothing.", rich_help_panel=_COST
        ),
    ] = False,
    root: Root = None,
    follow_links: FollowLinks = False,
    only: Only = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N images.", rich_help_panel=_WHICH)
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only N images, drawn by the seed.", rich_help_panel=_WHICH),
    ] = None,
    min_coverage: Annotated[
        float,
        typer.Option(
            help="Share of readable images below which the verdict is inconclusive.", rich_help_panel=_WHICH
        ),
    ] = 0.99,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile", help="Speed the encoder up by torch.compile; for long scans.", rich_help_panel=_COST
        ),
    ] = False,
    batch_size: BatchSize = "auto",
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find poisoned images in an unlabelled image set.

    Looks for a small patch that recurs in the images and that an encoder has learned to obey, and tests each finding on
    images that the search never saw; also looks for waves in the chroma. With a detector as --method, judges images one
    by one. Writes a verdict, the list of images to keep, the trigger as a picture, and a report for people to RUN.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    formats = check_formats(formats)
    config = ScanConfig(
        method=method,
        clusters=clusters,
        window=window,
        attention=attention,
        masks=masks,
        n_masks=n_masks,
        patches=patches,
        score=score,
        top_k=top_k,
        filter_steps=filter_steps,
        alpha=alpha,
        faithful=faithful,
        min_poison=_poison_size(min_poison),
        max_passes=max_passes,
        max_seconds=max_seconds,
        race=race,
        false_positive_rate=false_positive_rate,
    )
    if encoder is None and (compile_ or arch is not None):
        option = "--compile" if compile_ else f"--arch {arch}"
        raise ConfigError(f"{option} is about the encoder that --encoder names; name one, or leave it out")
    if epochs is not None and (encoder is not None or config.by_detector):
        why = f"{method} trains none" if encoder is None else f"--encoder {encoder} is trained already"
        raise ConfigError(f"--epochs {epochs} is of the encoder that a scan trains: {why}; leave it out")
    size = batch_size_of(batch_size)
    ids = read_ids(only)
    # Torch comes in here: usage errors above are answered at once.
    from unpoison import pipeline
    from unpoison.encoders.checkpoints import load_encoder
    from unpoison.pretrain.loop import PretrainConfig

    more: dict[str, Any] = {}
    chosen: Any = encoder
    parts = {"detector": detector, "auxiliary": auxiliary, "other": other}
    more |= {name: part for name, part in parts.items() if part is not None}
    if encoder is None and config.by_detector:
        if image_size is not None:
            more["image_size"] = image_size
    elif encoder is None:
        if epochs is not None:
            more["pretrain_config"] = PretrainConfig(epochs=epochs)
        if image_size is not None:
            more["image_size"] = image_size
    elif arch is not None or image_size is not None or compile_:
        chosen = load_encoder(encoder, arch=arch, image_size=image_size, device=device, precision=precision)
    if compile_:
        chosen.compile()
    if dry_run:
        seen = pipeline.preview(
            images,
            chosen,
            config=config,
            device=device,
            precision=precision,
            batch_size=size,
            root=root,
            follow_links=follow_links,
            only=ids,
            limit=limit,
            sample=sample,
            **more,
        )
        screen.finish(_preview_summary(seen), lambda: _preview_text(seen, screen))
        return
    with log_into(out), screen.progress() as shown:
        progress = shown if encoder is not None else _announcing(screen, shown)
        result = pipeline.scan(
            images,
            chosen,
            config=config,
            out=out,
            seed=seed,
            device=device,
            precision=precision,
            batch_size=size,
            workers=workers,
            root=root,
            follow_links=follow_links,
            only=ids,
            limit=limit,
            sample=sample,
            min_coverage=min_coverage,
            fresh=fresh,
            command=shlex.join(["unpoison", *sys.argv[1:]]),
            progress=progress,
            **more,
        )
    from unpoison.report.as_sarif import scan_as_sarif

    page = out / "report.html"
    text = partial(_text, result, images, out)
    write_formats(out, formats, text, lambda: scan_as_sarif(result))
    screen.finish(
        {**result.summary, "run": str(out), "report": str(page)},
        lambda: f"{text()}\n\n{result.verdict}: see {page}",
    )
    raise typer.Exit(0 if exit_zero and result.verdict == "poisoned" else EXIT_CODES[result.verdict])


def _announcing(screen: Screen, progress: Progress) -> Progress:
    """Says that an encoder is trained, when that begins: not before the images are found and can be read."""
    announced = False

    def announce(stage: str, done: int, total: int) -> None:
        nonlocal announced
        if stage.startswith("pretrain") and not announced:
            announced = True
            screen.note("no --encoder: training one on the images first, then scanning with it")
        progress(stage, done, total)

    return announce


def _poison_size(text: str | None) -> float | None:
    """The number that `--min-poison` names: images, or a share of them.

    >>> _poison_size("200"), _poison_size("0.002"), _poison_size("0.2%")
    (200.0, 0.002, 0.002)
    """
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise ConfigError(
            f"--min-poison {text}: expected a number of images, or a share as 0.002 or 0.2%"
        ) from error


def _preview_summary(seen: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "n_images": seen.n_images,
        "passes": {s.name: {"expected": s.expected, "most": s.most} for s in seen.cost.stages},
        "expected_passes": seen.cost.expected,
        "most_passes": seen.cost.most,
        "passes_per_second": None if seen.rate is None else round(seen.rate.images_per_second, 1),
        "expected_seconds": None if seen.seconds is None else round(seen.seconds, 1),
        "memory": seen.cost.memory,
        "device_memory": None if seen.rate is None else seen.rate.memory,
        "disk": seen.cost.disk,
        "classifier_images": {"trained": seen.cost.classifier_trained, "judged": seen.cost.classifier_judged},
        "pretraining_images": seen.pretraining,
        "power": seen.power,
        "config": asdict(seen.config),
    }


def _preview_text(seen: Any, screen: Screen) -> str:
    cost = seen.cost
    lines = [screen.passes(seen.n_images, cost)]
    if seen.rate is None and seen.pretraining:
        lines.append(
            f"first an encoder is trained: {seen.pretraining:,} images; the speed is not known before"
        )
    elif seen.rate is not None:
        lines.append(
            f"time: about {seen.seconds:,.0f} s in the encoder, at {seen.rate.images_per_second:,.0f} images/s"
        )
        if seen.rate.memory is not None:
            lines.append(f"memory of the device: {seen.rate.memory / 2**20:,.0f} MiB")
    lines += [
        f"memory: {cost.memory / 2**20:,.0f} MiB without the networks; disk: {cost.disk / 2**20:,.0f} MiB",
    ]
    if cost.classifier_trained:
        lines.append(
            f"if poison is confirmed, a classifier is trained on {cost.classifier_trained:,} images and judges "
            f"{cost.classifier_judged:,}"
        )
    lines.append(f"{seen.power}.")
    return "\n".join(lines)


def _text(result: Any, images: Path, out: Path) -> str:
    from unpoison.report.as_text import as_text
    from unpoison.report.document import make_report

    return as_text(make_report(result, location=str(images), run=str(out)))
