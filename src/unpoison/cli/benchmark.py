"""`unpoison benchmark`: a whole study from one task file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unpoison.cli.options import Device, Fresh, Json, Precision, Quiet
from unpoison.cli.screen import Screen, log_into

if TYPE_CHECKING:
    from unpoison.benchmark.results import Results
    from unpoison.benchmark.run import PlannedCell
    from unpoison.benchmark.task import Task

__all__ = ["app"]

app = typer.Typer(add_completion=False)


@app.command(
    epilog="A killed run goes on with the same command; finished cells are not computed again.\n\n"
    "Example: unpoison benchmark benchmarks/tasks/table1_small.toml --out table1 --dry-run\n\n"
    "Example: unpoison benchmark table1.toml --out table1 --store kept"
)
def benchmark(
    task: Annotated[
        Path, typer.Argument(metavar="TASK.toml", help="What to combine and to show.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for tables, plots and results.", show_default=False)
    ],
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for cells, encoders and scans; several tasks may share one. Default: --out.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the cells, which are done, and what the others take.")
    ] = False,
    fresh: Fresh = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Only this one of the task's seeds.", rich_help_panel="How it runs", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack, train, scan, clean, train again and measure: every combination in a task file, beside the papers."""
    screen = Screen(as_json=as_json, quiet=quiet)
    from unpoison.benchmark.run import plan_benchmark, run_benchmark
    from unpoison.benchmark.task import read_task

    asked = read_task(task)
    if seed is not None:
        asked = asked.only_seed(seed)
    if dry_run:
        planned = plan_benchmark(asked, out, store=store)
        screen.finish(_plan_summary(asked, planned), lambda: _plan_text(screen, asked, planned))
        return
    with log_into(out), screen.progress() as progress:
        results = run_benchmark(
            asked,
            out,
            store=store,
            device=device,
            precision=precision,
            fresh=fresh,
            say=screen.note,
            progress=progress,
        )
    screen.finish(_summary(results, out), lambda: _text(screen, results, out))
    if results.failed:
        raise typer.Exit(3)


def _plan_summary(task: Task, planned: list[PlannedCell]) -> dict[str, Any]:
    from dataclasses import asdict

    left = [entry for entry in planned if not entry.done]
    return {
        "schema": 1,
        "benchmark": task.name,
        "n_cells": len(planned),
        "n_done": len(planned) - len(left),
        "training_images": sum(entry.training for entry in left),
        "encoder_passes": sum(entry.passes for entry in left),
        "cells": [
            {**asdict(entry.cell), "done": entry.done, "training": entry.training, "passes": entry.passes}
            for entry in planned
        ],
    }


def _plan_text(screen: Screen, task: Task, planned: list[PlannedCell]) -> str:
    rows = [
        [
            entry.cell.data,
            entry.cell.attack,
            entry.cell.victim,
            entry.cell.defence,
            str(entry.cell.seed),
            "done" if entry.done else "left",
            f"{entry.training:,}",
            f"{entry.passes:,}",
        ]
        for entry in planned
    ]
    head = ["images", "attack", "victim", "defence", "seed", "state", "training images", "passes"]
    summary = _plan_summary(task, planned)
    return (
        f"{screen.table(task.title, head, rows)}\n\n{summary['n_cells']} cells, {summary['n_done']} done; the others "
        f"train on about {summary['training_images']:,} images and show encoders about "
        f"{summary['encoder_passes']:,}. Nothing was computed."
    )


def _summary(results: Results, out: Path) -> dict[str, Any]:
    from unpoison.benchmark.tables import as_json, make_tables

    return {
        "schema": 1,
        "benchmark": results.task.name,
        "out": str(out),
        "n_cells": len(results.task.cells),
        "n_done": len(results.rows),
        "failed": [reason for _, reason in results.failed],
        "tables": [as_json(table) for table in make_tables(results)],
    }


def _text(screen: Screen, results: Results, out: Path) -> str:
    from unpoison.benchmark.tables import make_tables

    parts = [
        screen.table(table.title, list(table.head), [list(row) for row in table.body])
        for table in make_tables(results)
    ]
    parts.append(f"{len(results.rows)} of {len(results.task.cells)} cells; everything is in {out}")
    return "\n\n".join(parts)
