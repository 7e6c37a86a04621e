"""`unpoison cache`: what the stage caches of runs take, and removing them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unpoison.caches import StageCache, clear_cache, find_caches
from unpoison.cli.options import EVERY_METHOD, Device, Json, Quiet, Seed
from unpoison.cli.screen import Screen

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True)

_Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="A run folder, or a folder with runs in it, at any depth.", show_default=False
    ),
]


@app.callback(
    epilog=f"Example: unpoison cache list runs/\n\nExample: unpoison cache clear runs/\n\n{EVERY_METHOD}"
)
def cache() -> None:
    """Show or remove what lets killed runs go on: RUN/cache. Nothing is ever kept outside of RUN."""


@app.command("list", epilog="Example: unpoison cache list\n\nExample: unpoison cache list runs/ --json")
def list_(
    folder: _Folder = Path(),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what the cache of each run takes; without DIR in the current folder."""
    screen = Screen(as_json=as_json, quiet=quiet)
    found = find_caches(folder)
    total = sum(cache.size for cache in found)

    def text() -> str:
        if not found:
            return f"no run in {folder} has a cache"
        rows = [
            [str(cache.run), "finished" if cache.complete else "unfinished", _bytes(cache.size)]
            for cache in found
        ]
        rows.append(["total", "", _bytes(total)])
        return screen.table("Stage caches", ["run", "", "size"], rows)

    screen.finish({"schema": 1, "caches": [_as_json(cache) for cache in found], "bytes": total}, text)


@app.command(epilog="Example: unpoison cache clear runs/\n\nExample: unpoison cache clear run --unfinished")
def clear(
    folder: _Folder,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also of runs without a verdict, which then start over.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove the caches of finished runs; verdicts, findings and reports stay."""
    screen = Screen(as_json=as_json, quiet=quiet)
    found = find_caches(folder)
    removed = [cache for cache in found if cache.complete or unfinished]
    for each in removed:
        clear_cache(each)
    freed, kept = sum(cache.size for cache in removed), len(found) - len(removed)
    summary = {"schema": 1, "removed": [_as_json(cache) for cache in removed], "bytes": freed, "kept": kept}
    text = f"removed {len(removed)} caches, {_bytes(freed)}"
    if kept:
        text += f"; kept {kept} of unfinished runs, which go on from them (--unfinished removes these, too)"
    screen.finish(summary, text)


def _as_json(cache: StageCache) -> dict[str, object]:
    return {"run": str(cache.run), "complete": cache.complete, "bytes": cache.size}


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
