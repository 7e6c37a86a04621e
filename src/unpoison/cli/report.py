"""`unpoison report`: report.html of a run, again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unpoison.cli.options import Device, Formats, Json, Quiet, Seed, check_formats, write_formats
from unpoison.cli.screen import Screen, log_into
from unpoison.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: unpoison report run\n\nExample: unpoison report run --json")
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a finished scan or audit.", show_default=False)
    ],
    formats: Formats = [],  # noqa: B006 (never changed)
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Render RUN/report.html again from what the run recorded; no image and no encoder is needed."""
    screen = Screen(as_json=as_json, quiet=quiet)
    formats = check_formats(formats)
    if not (run / "verdict.json").is_file():
        raise ConfigError(f"{run} holds no verdict.json: expected the folder of a finished `unpoison scan`")
    if (run / "trigger.safetensors").is_file():
        _report_audit(run, formats, screen)
        return
    from unpoison.report.as_sarif import scan_as_sarif
    from unpoison.report.as_text import as_text
    from unpoison.report.document import make_report
    from unpoison.report.folder import write_report
    from unpoison.runs import load_result

    with log_into(run):
        result = load_result(run)
        page = write_report(run, result)

    def text() -> str:
        return as_text(make_report(result, run=str(run)))

    write_formats(run, formats, text, lambda: scan_as_sarif(result))
    screen.finish(
        {**result.summary, "run": str(run), "report": str(page)},
        lambda: f"{text()}\n\n{result.verdict}: see {page}",
    )


def _report_audit(run: Path, formats: list[str], screen: Screen) -> None:
    from unpoison.audit_pipeline import load_audit
    from unpoison.report.as_sarif import audit_as_sarif
    from unpoison.report.audit_page import audit_as_text, make_audit_report, write_audit_report

    with log_into(run):
        result = load_audit(run)
        page = write_audit_report(run, result)

    def text() -> str:
        return audit_as_text(make_audit_report(result))

    write_formats(run, formats, text, lambda: audit_as_sarif(result.summary))
    screen.finish(
        {**result.summary, "run": str(run), "report": str(page)},
        lambda: f"{text()}\n\n{result.verdict}: see {page}",
    )
