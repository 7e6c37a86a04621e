"""Options that several verbs share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unpoison.errors import ConfigError

__all__ = [
    "BatchSize",
    "Device",
    "FollowLinks",
    "Fresh",
    "Images",
    "Json",
    "Only",
    "Precision",
    "Quiet",
    "Root",
    "Seed",
    "Workers",
    "batch_size_of",
]

_RUNNING = "How it runs"

Images = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES", help="A folder, parquet or tar shards, or a text file of paths.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Determines every draw.", rich_help_panel=_RUNNING)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_RUNNING)]
Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16.", rich_help_panel=_RUNNING)]
BatchSize = Annotated[str, typer.Option(metavar="auto|N", help="Images per pass.", rich_help_panel=_RUNNING)]
Workers = Annotated[
    int | None,
    typer.Option(help="Threads that decode images; default: one per core.", rich_help_panel=_RUNNING, min=1),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on stdout and nothing else there.", rich_help_panel=_RUNNING
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.", rich_help_panel=_RUNNING)]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over instead of resuming or showing an earlier run.")
]
Only = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Use just the ids in this file, one a line, such as clean.txt."),
]
Root = Annotated[
    Path | None, typer.Option(metavar="DIR", help="For a text file of paths: the folder they must stay in.")
]
FollowLinks = Annotated[
    bool, typer.Option("--follow-links", help="Also read through links that leave the folder.")
]


def batch_size_of(text: str) -> int | None:
    """The number that `--batch-size` names; None for auto.

    >>> batch_size_of("64"), batch_size_of("auto")
    (64, None)
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batch-size {text}: expected auto or a whole number of at least 1")
    return int(text)
