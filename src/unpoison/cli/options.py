"""Options that several verbs share, spelled once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from unpoison.errors import ConfigError

__all__ = [
    "BatchSize",
    "Device",
    "FollowLinks",
    "Formats",
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
    "check_formats",
    "write_formats",
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


def _silence_warnings(wanted: bool) -> bool:
    """Until the verb ends, see `cli.main`."""
    if wanted:
        logging.getLogger("unpoison").setLevel(logging.ERROR)
    return wanted


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="Print nothing but errors.",
        callback=_silence_warnings,
        rich_help_panel=_RUNNING,
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over instead of resuming or showing an earlier run.")
]
Formats = Annotated[
    list[str],
    typer.Option(
        "--format",
        metavar="sarif|text",
        help="Also write report.sarif or report.txt to RUN; repeat it, or name both with a comma. html and json are "
        "always written.",
        show_default=False,
    ),
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


EVERY_METHOD = "Each of these takes --seed, --device, --json and --quiet; see its own --help."
"""The last line of a group's help."""


def check_formats(asked: list[str]) -> list[str]:
    """Every format that is asked for, once or with commas; complains before the long work begins."""
    formats = [name.strip() for each in asked for name in each.split(",")]
    for name in formats:
        if name not in ("html", "json", "sarif", "text"):
            raise ConfigError(f"--format {name}: expected html, json, sarif or text")
    return formats


def write_formats(
    run: Path, formats: list[str], text: Callable[[], str], sarif: Callable[[], dict[str, Any]]
) -> None:
    """The files that `--format` asks for beside report.html and verdict.json; those of before are written again."""
    from unpoison.data.export import atomic_file, write_json_atomically

    if "sarif" in formats or (run / "report.sarif").exists():
        write_json_atomically(run / "report.sarif", sarif())
    if "text" in formats or (run / "report.txt").exists():
        with atomic_file(run / "report.txt") as file:
            file.write(text().encode("utf-8", "backslashreplace") + b"\n")
