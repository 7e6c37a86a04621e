"""Finished cells as one tidy table: a row per measurement, with the names that the task gives its cells."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from unpoison.benchmark.measures import MeasureName
from unpoison.benchmark.task import Cell, Task

__all__ = ["RESULTS_SCHEMA", "Results", "collect", "to_json", "values_of", "write_parquet"]

RESULTS_SCHEMA = 1
"""Version of results.json and results.parquet; within one, fields and columns are only ever added."""

_COLUMNS = {
    "data": "str",
    "attack": "str",
    "victim": "str",
    "defence": "str",
    "seed": "int64",
    "cell": "str",
    "measure": "str",
    "probe": "str",
    "trigger": "Int64",
    "at": "float64",
    "value": "float64",
    "unit": "str",
}


@dataclass(frozen=True)
class Results:
    """What is known so far.

    Attributes:
        task: what was asked for.
        rows: finished cells and what they measured, in the order of the task.
        failed: cells that could not be computed, and why.
    """

    task: Task
    rows: tuple[tuple[Cell, Mapping[str, Any]], ...]
    failed: tuple[tuple[Cell, str], ...]


def values_of(row: Mapping[str, Any], name: MeasureName) -> list[tuple[float | None, float]]:
    """(k or rate, value) of a finished cell; the mean where there are several triggers, nothing where undefined."""
    found: dict[float | None, list[float]] = {}
    for entry in row["measurements"]:
        if entry["measure"] == name.measure and entry["probe"] == name.probe:
            at, value = entry["at"], entry["value"]
            if value is not None and (name.at is None or at == name.at):
                found.setdefault(at, []).append(value)
    return [(at, sum(values) / len(values)) for at, values in found.items()]


def collect(results: Results) -> pd.DataFrame:
    """One row per measurement."""
    rows = [
        {
            **{axis: getattr(cell, axis) for axis in ("data", "attack", "victim", "defence", "seed")},
            "cell": row["key"],
            **{name: entry[name] for name in ("measure", "probe", "trigger", "at", "value", "unit")},
        }
        for cell, row in results.rows
        for entry in row["measurements"]
    ]
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    return frame.astype(_COLUMNS)


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a table in one step."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        frame.to_parquet(partial, index=False)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_json(results: Results, tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of results.json.

    Args:
        results: finished and failed cells.
        tables: as `tables.as_json` gives them.
    """
    task = results.task
    return {
        "schema": RESULTS_SCHEMA,
        "benchmark": task.name,
        "title": task.title,
        "seeds": list(task.seeds),
        "n_cells": len(task.cells),
        "n_done": len(results.rows),
        "cells": [{**_names(cell), **row} for cell, row in results.rows],
        "failed": [{**_names(cell), "reason": reason} for cell, reason in results.failed],
        "left_out": [{"what": what, "reason": reason} for what, reason in task.left_out],
        "published": [
            {
                "where": {key: list(value) for key, value in entry.where.items()},
                "values": dict(entry.values),
                "source": entry.source,
            }
            for entry in task.published
        ],
        "tables": list(tables),
    }


def _names(cell: Cell) -> dict[str, Any]:
    return {
        "data": cell.data,
        "attack": cell.attack,
        "victim": cell.victim,
        "defence": cell.defence,
        "seed": cell.seed,
    }
