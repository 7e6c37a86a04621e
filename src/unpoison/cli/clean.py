"""`unpoison clean`: the image set without the images that a scan flagged."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unpoison.cli.options import Device, FollowLinks, Images, Json, Quiet, Root, Seed
from unpoison.cli.screen import Screen, log_into
from unpoison.errors import ConfigError

if TYPE_CHECKING:
    from unpoison.data.export import CopyMode
    from unpoison.data.sources import ImageSource

__all__ = ["app"]

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: unpoison clean images/ --run run --out cleaned\n\n"
    "Example: unpoison clean images/ --run run --out cleaned --link"
)
def clean(
    images: Images,
    run: Annotated[
        Path, typer.Option(metavar="RUN", help="Run folder of the scan of IMAGES.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder for the cleaned images.", show_default=False)
    ],
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies.")] = False,
    list_only: Annotated[bool, typer.Option("--list-only", help="Write only DIR/clean.txt.")] = False,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write IMAGES without the flagged ones; the source is only read.

    Keeps exactly what RUN/clean.txt names. Refuses when RUN is the scan of other images, because what was never
    examined must not end up in a folder called clean.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    if link and list_only:
        raise ConfigError("--link and --list-only contradict each other: give one of them")
    from unpoison.data.export import clean_copy
    from unpoison.data.sources import open_source

    verdict, examined, keep = _read_run(run)
    source = open_source(images, root=root, follow_links=follow_links)
    _refuse_other_images(source, examined, run)
    if verdict == "inconclusive":
        screen.note("the scan was inconclusive, so nothing was flagged; the copy is not known to be clean")
    mode: CopyMode = "link" if link else "list" if list_only else "copy"
    with log_into(out):
        copy = clean_copy(source, keep, out, mode)
    summary = {"schema": 1, "verdict": verdict, "mode": mode, "out": str(out), **asdict(copy)}
    screen.finish(summary, f"{copy.kept} images kept, {copy.removed} left out: {out}")


def _read_run(run: Path) -> tuple[str, set[str], list[str]]:
    """Verdict, every id that the scan knows, and the ids to keep."""
    import pandas as pd

    needed = [run / name for name in ("verdict.json", "findings.parquet", "clean.txt")]
    missing = next((path for path in needed if not path.is_file()), None)
    if missing is not None:
        raise ConfigError(
            f"--run {run} holds no {missing.name}: expected the folder of a finished `unpoison scan`"
        )
    summary: dict[str, Any] = json.loads(needed[0].read_text(encoding="utf-8"))
    ids = pd.read_parquet(needed[1], columns=["id"])["id"]
    keep = [line for line in needed[2].read_text(encoding="utf-8").split("\n") if line]
    return str(summary.get("verdict")), set(ids), keep


def _refuse_other_images(source: ImageSource, examined: set[str], run: Path) -> None:
    from unpoison.errors import DataError

    here = {*source.ids, *(entry.id for entry in source.refused)}
    new, gone = here - examined, examined - here
    if gone:
        raise DataError(
            f"{run} is the scan of other images: it knows {len(gone)} that {source.location} lacks, such as "
            f"{min(gone)!r}; name the images that were scanned, or scan these"
        )
    if new:
        raise DataError(
            f"{run} never examined {len(new)} of the {len(here)} images of {source.location}, such as {min(new)!r}; "
            "scan all of them, then clean"
        )
