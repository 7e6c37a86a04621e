"""What people see while a verb runs: bars or heartbeats on stderr, one summary on stdout, or JSON, or silence."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from unpoison.records import Cost
    from unpoison.runtime import Progress

__all__ = ["HEARTBEAT", "Screen", "complain", "log_into", "printable", "read_ids"]

HEARTBEAT = 60.0
"""Seconds between two lines on a stderr that is no terminal."""


def printable(text: str) -> str:
    r"""Text without anything that could steer a terminal; ids and file names come from strangers.

    The same rule as `data.sources.escape`, repeated here because this must also work where torch cannot be imported.

    >>> printable("a\x1b[31m.png")
    'a\\x1b[31m.png'
    """
    return "".join(c if c in " \u202f" or c.isprintable() else repr(c)[1:-1] for c in text)


def complain(message: str) -> None:
    """One line on stderr; `--quiet` does not silence it."""
    typer.echo(f"unpoison: {printable(message)}", err=True)


class Screen:
    """The two streams of one verb.

    Args:
        as_json: stdout gets one JSON object and nothing else.
        quiet: nothing is printed, except JSON that was asked for, and errors.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def note(self, message: str) -> None:
        """One line on stderr, for what a person should know while the verb goes on."""
        if not self.quiet:
            typer.echo(f"unpoison: {printable(message)}", err=True)

    def finish(self, summary: Mapping[str, Any], text: str | Callable[[], str]) -> None:
        """The result, on stdout: as JSON or as text.

        Args:
            summary: plain JSON values.
            text: lines for people, or a function that makes them when they are wanted.
        """
        try:
            if self.as_json:
                typer.echo(json.dumps(summary, indent=1, allow_nan=False, default=str))
            elif not self.quiet:
                for line in (text if isinstance(text, str) else text()).split("\n"):
                    typer.echo(printable(line))
            sys.stdout.flush()
        except BrokenPipeError:
            # `| head` has seen enough. The exit code is still the verdict's, and 1 would say that there are findings.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def passes(self, n_images: int, cost: Cost) -> str:
        """What a dry run says of every stage, and of all."""
        rows = [(stage.name, stage.expected, stage.most) for stage in cost.stages]
        rows.append(("total", cost.expected, cost.most))
        cells = [[name, f"{expected:,}", f"{most:,}"] for name, expected, most in rows]
        return self.table(f"Encoder passes for {n_images:,} images", ["stage", "expected", "at most"], cells)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> str:
        """A table as text, as wide as the terminal allows."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        console = Console(
            file=sys.stdout, no_color=True, highlight=False, width=None if sys.stdout.isatty() else 110
        )
        with console.capture() as captured:
            console.print(table)
        return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """A progress callback for as long as the block runs."""
        if self.quiet:
            yield _ignore
        elif sys.stderr.isatty():
            with _bars() as progress:
                yield progress
        else:
            yield _Heartbeat()


def _ignore(stage: str, done: int, total: int) -> None:
    pass


class _Heartbeat:
    """A line when work begins, and then one at most every HEARTBEAT seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = -HEARTBEAT
        self._stage = ""
        self._since = 0.0
        self._done_before = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._since, self._done_before = stage, now, done
        if now - self._last < HEARTBEAT:
            return
        self._last = now
        line = f"{stage}: {done} of {total}"
        elapsed, fresh = now - self._since, done - self._done_before
        if elapsed > 0 and fresh > 0:
            rate = fresh / elapsed
            line += f", {rate:.3g}/s, {_clock_time((total - done) / rate)} left"
        complain(line)


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.progress import Task as Bar
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Bar) -> Text:
            speed = task.finished_speed or task.speed
            return Text(
                f"{speed:,.0f}/s" if speed and speed >= 10 else f"{speed:.1f}/s" if speed else "", "cyan"
            )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(compact=True),
    )
    bars = Bars(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
    known: dict[str, TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in known:
            known[stage] = bars.add_task(printable(stage), total=total)
        bars.update(known[stage], completed=done, total=total)

    with bars:
        yield progress


@contextlib.contextmanager
def log_into(folder: Path) -> Iterator[None]:
    """Have the traceback of an unexpected failure in the block written to `folder`/log.txt."""
    try:
        yield
    except Exception as error:
        error.log_folder = folder  # type: ignore[attr-defined]
        raise


def read_ids(path: Path | None) -> tuple[str, ...] | None:
    """The ids of a list such as clean.txt, one a line; None without a path.

    Raises:
        ConfigError: the file cannot be read, or names nothing.
    """
    from unpoison.errors import ConfigError

    if path is None:
        return None
    try:
        ids = tuple(line for line in path.read_text(encoding="utf-8").split("\n") if line)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--only {path} cannot be read: expected a text file with one id a line") from error
    if not ids:
        raise ConfigError(f"--only {path} names no image: expected one id a line")
    return ids
