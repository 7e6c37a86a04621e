"""`unpoison schema`: the shape of what unpoison writes, for programs that read it."""

from __future__ import annotations

from typing import Annotated

import typer

from unpoison.cli.options import Device, Json, Quiet, Seed
from unpoison.cli.screen import Screen
from unpoison.errors import ConfigError
from unpoison.report.schemas import SCHEMAS

__all__ = ["app"]

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: unpoison schema verdict\n\nExample: unpoison schema findings > findings.schema.json"
)
def schema(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{', '.join(SCHEMAS)}.", show_default=False)],
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a JSON schema (draft 2020-12): verdict.json, a row of findings.parquet, plan.json or a benchmark's results.

    Within one schema number fields are only ever added.
    """
    if name not in SCHEMAS:
        raise ConfigError(f"schema {name!r}: expected {' or '.join(SCHEMAS)}")
    Screen(as_json=True, quiet=quiet).finish(SCHEMAS[name], "")
