"""The entry point: which verbs there are, and what every failure looks like.

A verb's module is imported when the verb is named, so that `unpoison --help` answers at once and a missing library
stops only the verbs that need it.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import tempfile
import traceback
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import unpoison
from unpoison.cli.every_verb import add_options
from unpoison.cli.screen import complain, printable
from unpoison.errors import UnpoisonError

__all__ = ["VERBS", "app", "main"]

VERBS = {
    "demo": "Plant a backdoor, find it and remove it, on images that come along; no download.",
    "scan": "Find poisoned images in an unlabelled set, with a verdict that can gate a pipeline.",
    "audit": "Find a backdoor in an encoder, without its training images.",
    "clean": "Write an image set without the images that a scan flagged.",
    "repair": "Turn findings into a clean encoder: train again without the flagged images.",
    "attack": "Plant a backdoor: a poisoned copy, and the answer key.",
    "pretrain": "Train an encoder on unlabelled images.",
    "evaluate": "Measure an encoder and an attack on it; measure a scan against the answer key.",
    "report": "Render report.html of a run again.",
    "benchmark": "Run a whole study from a task file, with tables beside the papers' figures.",
    "cache": "Show or remove what lets killed runs go on, RUN/cache.",
    "doctor": "Show versions, devices, and whether references resolve; runs nothing.",
    "schema": "Print the JSON schema of verdict, findings or plan.",
}

_EXIT_CODES = (
    "Exit codes: 0 no evidence, or done · 1 findings · 2 wrong usage · 3 the run failed · "
    "4 inconclusive, or nothing could be scanned · 130 interrupted."
)


class _Verbs(TyperGroup):
    """A group that knows its commands by name and imports them one at a time."""

    _listing = False  # while help is written, names and one line each are enough

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(VERBS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name not in VERBS:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=VERBS[cmd_name])
        module = import_module(f"unpoison.cli.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        for each in (command, *getattr(command, "commands", {}).values()):
            each.help = _flowing(each.help or "")
        add_options(command)
        return command

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        log = logging.getLogger("unpoison")
        level = log.level
        try:
            return self._invoke(ctx)
        finally:
            log.setLevel(level)  # which `--quiet` raises

    def _invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted; the same command resumes")
            raise typer.Exit(130) from None
        except UnpoisonError as error:
            complain(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if _interrupted:  # in the middle of a library's own work, which made another error of it
                complain("interrupted; the same command resumes")
                raise typer.Exit(130) from None
            if hasattr(error, "exit_code"):  # a usage error, which the parser words itself
                if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
                    raise
                where = getattr(getattr(error, "ctx", None), "command_path", "unpoison")
                said = " ".join(error.format_message().split()).rstrip(".")
                complain(f"error: {said}; see {where} --help")
                raise typer.Exit(error.exit_code) from None
            log = _write_log(error)
            what = printable(str(error).strip().split("\n")[0])[:200]
            complain(f"error: unexpected {type(error).__name__}: {what}; the traceback is in {log}")
            raise typer.Exit(3) from error


app = typer.Typer(
    cls=_Verbs,
    name="unpoison",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=f"{_EXIT_CODES}\n\nExample: unpoison scan images/ --encoder timm:resnet18 --out run\n\n"
    "Example: unpoison demo --out demo-run",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _flowing(text: str) -> str:
    """Paragraphs without the line breaks of the source, so that they fill whatever width the terminal has."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unpoison {unpoison.__version__}")
        raise typer.Exit


@app.callback()
def verbs(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Find backdoors in unlabelled images and in the vision models trained on them; prove them; remove them."""


_interrupted: list[int] = []


def _interrupt(number: int, _: Any) -> None:
    _interrupted.append(number)
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a name that the terminal cannot show must not end the run
    app()


def _write_log(error: BaseException) -> Path:
    """The traceback goes to RUN/log.txt when the verb has a run folder, else to a new temporary file."""
    text = f"{datetime.now().isoformat(timespec='seconds')} unpoison {unpoison.__version__}\n"
    text += "".join(traceback.format_exception(error))
    folder = getattr(error, "log_folder", None)
    with contextlib.suppress(OSError):  # the folder may be what failed, even for a look at it
        if folder is not None and folder.is_dir():
            with (folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return Path(folder / "log.txt")
    with tempfile.NamedTemporaryFile(
        "w", prefix="unpoison-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return Path(file.name)
