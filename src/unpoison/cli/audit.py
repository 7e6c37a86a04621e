"""`unpoison audit`: is this encoder backdoored?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unpoison.cli.options import (
    Device,
    FollowLinks,
    Formats,
    Fresh,
    Json,
    Precision,
    Quiet,
    Root,
    Seed,
    Workers,
    check_formats,
    write_formats,
)
from unpoison.cli.scan import EXIT_CODES
from unpoison.cli.screen import Screen, log_into

if TYPE_CHECKING:
    from unpoison.audit_pipeline import AuditPreview

__all__ = ["app"]

_SEARCH = "The search"

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Exit codes: 0 no evidence of a backdoor · 1 backdoored · 2 wrong usage · 3 the run failed · "
    "4 inconclusive, as without a reference that fits · 130 interrupted; the same command resumes.\n\n"
    "Example: unpoison audit encoder.safetensors --images images/ --reference reference.json --out run\n\n"
    "Example: unpoison audit clean.safetensors --images images/ --add-to-reference reference.json --out clean-run"
)
def audit(
    encoder: Annotated[
        str,
        typer.Argument(
            metavar="ENC", help="timm:, torchvision:, hf: or open_clip:NAME, or a file.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="RUN",
            help="Run folder; an earlier run in it is resumed or judged again.",
            show_default=False,
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="Clean images like those the encoder is for; a folder, shards or a list. Default: generated ones.",
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
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Figures of clean encoders of the same family; without it there is no verdict.",
        ),
    ] = None,
    add_to_reference: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="ENC is known to be clean: add its figure to this file."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Share of clean encoders that may be called backdoored.")
    ] = 0.05,
    second_opinion: Annotated[
        bool,
        typer.Option(
            "--second-opinion",
            help="Ask SSL-Cleanse, too; takes longer, and changes no verdict.",
        ),
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="End the search by then; a backdoor that is found late may be missed, and the verdict says so.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print expected passes, time and memory; write nothing.")
    ] = False,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Return 0 also when the encoder is backdoored.")
    ] = False,
    formats: Formats = [],  # noqa: B006 (never changed)
    fresh: Fresh = False,
    faithful: Annotated[
        bool,
        typer.Option(
            "--faithful", help="DECREE as published: fewer passes, one random start.", rich_help_panel=_SEARCH
        ),
    ] = False,
    restarts: Annotated[
        int | None,
        typer.Option(
            help="Starts, each at a promising place; default: 2.", rich_help_panel=_SEARCH, show_default=False
        ),
    ] = None,
    scout_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps per place, by which the promising ones are found; default: 8.",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Most steps of a start; default: 300.", rich_help_panel=_SEARCH, show_default=False
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Images used at most, a quarter of them held out; default: 512, with --faithful 1000.",
            rich_help_panel=_SEARCH,
            min=1,
            show_default=False,
        ),
    ] = None,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find a backdoor in an encoder, without its training images.

    Reconstructs the smallest patch that makes the encoder take all images for one another (DECREE), and ranks it among
    those of clean encoders. Writes a verdict, the trigger as a picture, and a report for people to RUN.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    formats = check_formats(formats)
    from unpoison import audit_pipeline
    from unpoison.audit.decree import DecreeConfig
    from unpoison.encoders.checkpoints import load_encoder
    from unpoison.report.as_sarif import audit_as_sarif
    from unpoison.report.audit_page import audit_as_text, make_audit_report

    given = {"restarts": restarts, "scout_steps": scout_steps, "steps": steps}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = DecreeConfig(faithful=faithful, **chosen)
    suspect = load_encoder(encoder, arch=arch, image_size=image_size, device=device, precision=precision)
    screen.note(f"the encoder is {suspect.name}")
    if suspect.preprocessing.assumed:
        screen.note("the encoder's normalisation or input size is assumed, not known; the report says so")
    if dry_run:
        seen = audit_pipeline.preview_audit(
            suspect,
            images,
            config=config,
            reference=reference,
            add_to=add_to_reference,
            alpha=alpha,
            second_opinion=second_opinion,
            max_seconds=max_seconds,
            sample=sample,
            root=root,
            follow_links=follow_links,
        )
        screen.finish(_preview_summary(seen), lambda: _preview_text(seen, screen))
        return
    with log_into(out), screen.progress() as progress:
        result = audit_pipeline.audit(
            suspect,
            images,
            config=config,
            out=out,
            reference=reference,
            add_to=add_to_reference,
            alpha=alpha,
            second_opinion=second_opinion,
            max_seconds=max_seconds,
            sample=sample,
            seed=seed,
            workers=workers,
            root=root,
            follow_links=follow_links,
            fresh=fresh,
            progress=progress,
        )
    page = out / "report.html"

    def text() -> str:
        return audit_as_text(make_audit_report(result))

    write_formats(out, formats, text, lambda: audit_as_sarif(result.summary))
    screen.finish(
        {**result.summary, "run": str(out), "report": str(page)},
        lambda: f"{text()}\n\n{result.verdict}: see {page}",
    )
    raise typer.Exit(0 if exit_zero and result.verdict == "poisoned" else EXIT_CODES[result.verdict])


def _preview_summary(seen: AuditPreview) -> dict[str, Any]:
    return {
        "schema": 1,
        "n_images": seen.n_images,
        "passes": {s.name: {"expected": s.expected, "most": s.most} for s in seen.cost.stages},
        "expected_passes": seen.cost.expected,
        "most_passes": seen.cost.most,
        "passes_per_second": round(seen.rate.images_per_second, 1),
        "expected_seconds": round(seen.seconds, 1),
        "memory": seen.memory,
        "device_memory": seen.rate.memory,
    }


def _preview_text(seen: AuditPreview, screen: Screen) -> str:
    lines = [
        screen.passes(seen.n_images, seen.cost),
        f"time: about {seen.seconds:,.0f} s, at {seen.rate.images_per_second:,.0f} passes/s; a step, forward and "
        "backward, counts as three",
        f"memory: {seen.memory / 2**20:,.0f} MiB for the images, without the network",
    ]
    if seen.rate.memory is not None:
        lines.append(f"memory of the device: {seen.rate.memory / 2**20:,.0f} MiB")
    return "\n".join(lines)
