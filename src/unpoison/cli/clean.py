"""`unpoison clean`: the image set without the images that a scan flagged."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unpoison.cli.options import Device, FollowLinks, Images, Json, Quiet, Root, Seed
from unpoison.cli.screen import Screen, log_into
from unpoison.errors import ConfigError

if TYPE_CHECKING:
    from unpoison.data.export import CopyMode

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

    Keeps exactly what RUN/clean.txt names, and compares the copy with the original before it gets its name. Refuses
    when RUN is the scan of other images, because what was never examined must not end up in a folder called clean.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    if link and list_only:
        raise ConfigError("--link and --list-only contradict each other: give one of them")
    from unpoison.repair.filtering import clean as clean_images

    mode: CopyMode = "link" if link else "list" if list_only else "copy"
    with log_into(out), screen.progress() as progress:
        done = clean_images(
            images, run, out, mode=mode, root=root, follow_links=follow_links, progress=progress
        )
    if done.verdict == "inconclusive":
        screen.note("the scan was inconclusive, so nothing was flagged; the copy is not known to be clean")
    if link and not done.linked:
        screen.note("no hard link was possible, so everything was copied")
    summary = {"schema": 1, "mode": mode, "out": str(out), **asdict(done)}
    unread = f" ({done.skipped} of them unreadable)" if done.skipped else ""
    screen.finish(summary, f"{done.kept} images kept, {done.removed} left out{unread}: {out}")
