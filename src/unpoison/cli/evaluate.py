"""`unpoison evaluate`: how good is an encoder, how well does an attack on it work, how good was a scan?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unpoison.cli.options import (
    BatchSize,
    Device,
    FollowLinks,
    Json,
    Precision,
    Quiet,
    Seed,
    Workers,
    batch_size_of,
)
from unpoison.cli.screen import Screen
from unpoison.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from unpoison.attack.plan import Plan, Trigger
    from unpoison.evaluate.attack_success import EncoderReport
    from unpoison.evaluate.scan_quality import ScanQuality
    from unpoison.records import Geometry, ImageSet
    from unpoison.runtime import Progress

__all__ = ["app"]

app = typer.Typer(add_completion=False)


@app.command(
    epilog="ACC is the share of clean test images that are classified rightly. ASR is the share of images of other "
    "classes that are classified as the target when they carry the trigger; images of the target class are left out, "
    "and the same share without the trigger stands beside it.\n\n"
    "Example: unpoison evaluate encoder.safetensors --train train/ --test test/ --plan poisoned/plan.json\n\n"
    "Example: unpoison evaluate timm:resnet18 --train train/ --test test/ --target cat --trigger seed:7 --size 8"
)
def evaluate(
    encoder: Annotated[
        str,
        typer.Argument(
            metavar="ENC", help="timm:, torchvision:, hf: or open_clip:NAME, or a file.", show_default=False
        ),
    ],
    test: Annotated[
        Path,
        typer.Option(
            metavar="IMAGES",
            help="Labelled images that --train does not hold, of the same classes.",
            show_default=False,
        ),
    ],
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES", help="Clean labelled images; both probes learn from them.", show_default=False
        ),
    ] = None,
    zero_shot: Annotated[
        bool,
        typer.Option(
            "--zero-shot",
            help="Tell classes apart by their names, without --train; for what pretrain clip wrote.",
        ),
    ] = False,
    plan: Annotated[
        Path | None, typer.Option(metavar="plan.json", help="Answer key of the attack: triggers and targets.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS", help="Without a plan: target class, in pairs with --trigger."),
    ] = None,
    trigger: Annotated[
        list[str] | None, typer.Option(metavar="seed:N|FILE.png", help="Without a plan: the patch.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="PX", help="Width of the patch at the encoder's input.", min=2)
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="With --plan: also measure this scan against the plan.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a file that does not name its own.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of the input, where ENC does not say it.", min=8)
    ] = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = "auto",
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure an encoder with a linear probe and with nearest neighbours, on clean and on triggered images."""
    screen = Screen(as_json=as_json, quiet=quiet)
    if plan is not None and (target or trigger):
        raise ConfigError(
            "--plan already names targets and triggers: give it alone, or --target with --trigger"
        )
    if bool(target) != bool(trigger):
        raise ConfigError("--target and --trigger belong together: give both, or --plan")
    if run is not None and plan is None:
        raise ConfigError("--run is measured against an answer key: add --plan")
    if run is not None and not (run / "findings.parquet").is_file():
        raise ConfigError(f"--run {run} holds no findings.parquet: expected the folder of a finished scan")
    if size is not None and plan is None and not trigger:
        raise ConfigError("--size is that of a trigger: add --target and --trigger, or --plan")
    if zero_shot == (train is not None):
        raise ConfigError("expected --train IMAGES for both probes to learn from, or --zero-shot instead")
    if zero_shot and (arch is not None or image_size is not None):
        raise ConfigError(
            "--zero-shot reads a file that says its network and size: leave out --arch and --image-size"
        )
    at_once = batch_size_of(batch_size) or 512
    from unpoison.attack.plan import read_plan
    from unpoison.encoders.checkpoints import load_encoder
    from unpoison.encoders.image_text import load_image_text
    from unpoison.evaluate.attack_success import evaluate_encoder
    from unpoison.evaluate.zero_shot import evaluate_zero_shot

    key = read_plan(plan) if plan is not None else None
    if train is None:
        pair = load_image_text(encoder, device=device, precision=precision)
        geometry = pair.encoder.preprocessing.geometry
        with screen.progress() as progress:
            shown, shown_labels, names = _labelled(test, geometry, follow_links, workers, progress)
            report = evaluate_zero_shot(
                pair,
                shown,
                shown_labels,
                names,
                triggers=_triggers(key, target, trigger, size, names, geometry),
                size=size,
                seed=seed,
                batch_size=at_once,
                progress=progress,
            )
        _finish(screen, report, run, key, geometry, seed)
        return
    network = load_encoder(encoder, arch=arch, image_size=image_size, device=device, precision=precision)
    geometry = network.preprocessing.geometry
    with screen.progress() as progress:
        known, known_labels, names = _labelled(train, geometry, follow_links, workers, progress)
        shown, shown_labels, _ = _labelled(test, geometry, follow_links, workers, progress, names)
        if shown.fingerprint == known.fingerprint:
            screen.note(f"--test {test} holds the images of --train, so that the figures are too good")
        report = evaluate_encoder(
            network,
            known,
            known_labels,
            shown,
            shown_labels,
            triggers=_triggers(key, target, trigger, size, names, geometry),
            n_classes=len(names),
            size=size,
            seed=seed,
            batch_size=at_once,
            progress=progress,
        )
    _finish(screen, report, run, key, geometry, seed)


def _finish(
    screen: Screen, report: EncoderReport, run: Path | None, key: Plan | None, geometry: Geometry, seed: int
) -> None:
    quality = _scan_quality(run, key, geometry, seed) if run is not None and key is not None else None
    summary = report.to_json() | ({"scan": quality.to_json()} if quality is not None else {})
    screen.finish(summary, lambda: _text(screen, report, quality))


def _labelled(
    images: Path,
    geometry: Geometry,
    follow_links: bool,
    workers: int | None,
    progress: Progress,
    names: tuple[str, ...] | None = None,
) -> tuple[ImageSet, Tensor, tuple[str, ...]]:
    """Images, their classes numbered as in `names`, and the names."""
    import torch

    from unpoison.data.labels import read_labels
    from unpoison.data.load import load_images
    from unpoison.data.sources import open_source

    source = open_source(images, follow_links=follow_links)
    labels = read_labels(source)
    pixels = load_images(source, geometry, workers=workers, progress=progress)
    numbers = labels.of(pixels.ids)
    if names is None:
        return pixels, numbers, labels.class_names
    unknown = [name for name in labels.class_names if name not in names]
    if unknown:
        raise DataError(
            f"{images} has the class {unknown[0]!r}, which --train lacks: expected the same classes"
        )
    place = torch.tensor([names.index(name) for name in labels.class_names])
    return pixels, place[numbers], names


def _triggers(
    plan: Plan | None,
    targets: list[str] | None,
    triggers: list[str] | None,
    size: int | None,
    names: tuple[str, ...],
    geometry: Geometry,
) -> tuple[Trigger, ...]:
    from unpoison.attack.ssl_backdoor import PatchAttackConfig, make_triggers

    if plan is not None:
        return plan.for_classes(names).at(geometry).triggers
    if not targets or not triggers:
        return ()
    return make_triggers(
        PatchAttackConfig(targets=tuple(targets), triggers=tuple(triggers), size=size), names
    )


def _scan_quality(run: Path, plan: Plan, geometry: Geometry, seed: int) -> ScanQuality:
    import pandas as pd

    from unpoison.evaluate.scan_quality import score_scan
    from unpoison.evaluate.truth import read_truth

    findings = pd.read_parquet(run / "findings.parquet")
    truth = read_truth(plan, [str(id) for id in findings["id"]], geometry, partial=True)
    return score_scan(findings, truth, seed=seed)


def _text(screen: Screen, report: EncoderReport, quality: ScanQuality | None) -> str:
    rows = []
    for probe in report.probes:
        rows.append([f"{probe.probe}, clean images", f"{probe.accuracy:.1f}", "", ""])
        for attack in probe.attacks:
            name = f"{probe.probe}, {attack.trigger} → {attack.target_name} ({attack.side} px)"
            rates = (attack.patched.attack_success, attack.untriggered_rate)
            cells = [
                f"{attack.patched.accuracy:.1f}",
                *("–" if rate is None else f"{rate:.1f}" for rate in rates),
            ]
            rows.append([name, *cells])
    counts = f"{report.n_train} images to learn from, {report.n_test} to test, {report.n_classes} classes"
    title = f"{report.encoder}: {counts}"
    text = screen.table(title, ["probe", "ACC %", "ASR %", "without trigger %"], rows)
    if quality is None:
        return text
    return text + "\n\n" + screen.table(*_scan_table(quality))


def _scan_table(quality: ScanQuality) -> tuple[str, list[str], list[list[str]]]:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    rows: list[list[Any]] = [
        [
            f"top {top.k} poisoned, %" if top.n >= top.k else f"top {top.k} ({top.n} scored) poisoned, %",
            share(top.accuracy),
        ]
        for top in quality.top
    ]
    rows += [
        ["poison flagged (recall), %", share(quality.recall)],
        ["flagged are poison (precision), %", share(quality.precision)],
        ["F1, %", share(quality.f1)],
        ["images removed", str(quality.removed)],
    ]
    title = f"The scan: {quality.n_images} images, {quality.n_poisoned} poisoned, {quality.n_scored} scored"
    return title, ["measure", "value"], rows
