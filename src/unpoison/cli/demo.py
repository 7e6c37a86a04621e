"""`unpoison demo`: the whole story on images that come along."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from unpoison.cli.options import Device, Fresh, Json, Quiet, Seed
from unpoison.cli.screen import Screen, log_into

__all__ = ["app"]

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: unpoison demo --out demo-run\n\n"
    "Example: unpoison demo --images photos/ --out photos-demo (one folder per class)"
)
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for everything that the demo makes.")
    ] = Path("demo-run"),
    data: Annotated[str, typer.Option(help="Images that come along: photos or digits.")] = "photos",
    images: Annotated[
        Path | None,
        typer.Option(metavar="IMAGES", help="Your own labelled images instead.", show_default=False),
    ] = None,
    fresh: Fresh = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plant a backdoor, train a victim, find the poison, remove it, and train again; minutes on two cores."""
    screen = Screen(as_json=as_json, quiet=quiet)
    from unpoison.demo import run_demo

    with log_into(out), screen.progress() as progress:
        result = run_demo(images, out, seed=seed, device=device, data=data, fresh=fresh, progress=progress)
    screen.finish(
        {"schema": 1, "out": str(out), **asdict(result)},
        lambda: _text(screen, result.table, result.sentence, out),
    )


def _text(screen: Screen, rows: Any, sentence: str, out: Path) -> str:
    """The first row of the table names its columns."""
    header, *body = [[str(cell) for cell in row] for row in rows]
    return f"{screen.table('unpoison demo', header, body)}\n\n{sentence}\neverything is in {out}"
