"""Tables of a study: mean and standard deviation over repetitions, the paper's figure in the column beside ours.

A table is made once, as texts, and rendered as Markdown here and as HTML by `page.py`. Nothing in it depends on the
clock, so that a study that was killed and went on gives the same bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unpoison.benchmark.measures import MEASURES, MeasureName
from unpoison.benchmark.results import Results, values_of
from unpoison.benchmark.task import Cell, Published, Table, Task

__all__ = [
    "MadeTable",
    "Statistic",
    "as_json",
    "as_markdown",
    "make_tables",
    "matches",
    "mean_of",
    "plain_markdown",
    "row_groups",
]

_HEADS = {"data": "images", "attack": "attack", "victim": "victim", "defence": "defence", "seed": "seed"}


@dataclass(frozen=True)
class Statistic:
    """A mean over n cells; `deviation` is the sample's standard deviation, None for a single one."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class MadeTable:
    """A table as texts.

    Attributes:
        title: above it; may be empty.
        head: names of the columns.
        body: rows of cells.
        numbers: of each column: whether it holds numbers.
        notes: sources of the paper's figures, definitions of the measures.
        values: the numbers behind the texts, for results.json.
    """

    title: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    numbers: tuple[bool, ...]
    notes: tuple[str, ...]
    values: tuple[Mapping[str, Any], ...]


def make_tables(results: Results) -> tuple[MadeTable, ...]:
    """All tables of the task; rows that have no finished cell yet show dashes."""
    return tuple(_make(table, results) for table in results.task.tables)


def _make(table: Table, results: Results) -> MadeTable:
    task = results.task
    with_paper = {name for name in table.columns if any(name.key in entry.values for entry in task.published)}
    head = [_head(key) for key in table.rows] + ["cells"]
    for name in table.columns:
        head.append(_with_unit(name))
        if name in with_paper:
            head.append("paper")
    sources: dict[str, int] = {}
    body, values = [], []
    for keys, cells in row_groups(task, table.rows, table.where).items():
        done = [row for cell, row in results.rows if cell in cells]
        texts = [_text(key) for key in keys]
        texts.append(str(len(done)) if len(done) == len(cells) else f"{len(done)} of {len(cells)}")
        entry: dict[str, Any] = {"row": dict(zip(table.rows, map(_text, keys), strict=True)), "n": len(done)}
        for name in table.columns:
            statistic = mean_of(done, name)
            texts.append(_shown(statistic, name))
            entry[name.key] = None if statistic is None else vars(statistic)
            if name in with_paper:
                published = _published(task, cells, name)
                if published is None:
                    texts.append("–")
                else:
                    number = sources.setdefault(published.source, len(sources) + 1)
                    figure = published.values[name.key]
                    texts.append(f"{figure:g} [{number}]")
                    entry[f"{name.key} published"] = figure
        body.append(tuple(texts))
        values.append(entry)
    notes = [f"[{number}] {source}" for source, number in sources.items()]
    notes += [f"{_general_title(name)}: {MEASURES[name.measure].means}." for name in _once(table.columns)]
    n_text = len(table.rows)
    return MadeTable(
        title=table.title,
        head=tuple(head),
        body=tuple(body),
        numbers=tuple(index >= n_text for index in range(len(head))),
        notes=tuple(notes),
        values=tuple(values),
    )


def row_groups(
    task: Task, keys: Sequence[str], where: Mapping[str, tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Cell]]:
    """Cells that share their values of some axes or settings, in the order of the task."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in task.cells:
        if matches(task, cell, where):
            groups.setdefault(tuple(_hashable(task.value(cell, key)) for key in keys), []).append(cell)
    order = {name: place for items in task.axes.values() for place, name in enumerate(items)}
    return dict(sorted(groups.items(), key=lambda group: [_place(part, order) for part in group[0]]))


def matches(task: Task, cell: Cell, where: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether a cell has one of the values everywhere; an axis may be met by the name or by the family."""
    for key, wanted in where.items():
        having = {_hashable(task.value(cell, key))}
        if key in task.axes:
            having.add(task.value(cell, f"{key}.family"))
        if having.isdisjoint(_hashable(value) for value in wanted):
            return False
    return True


def mean_of(rows: Sequence[Mapping[str, Any]], name: MeasureName) -> Statistic | None:
    """Mean and deviation over cells of a measure that has one value per cell; None where no cell has it."""
    values = [value for row in rows for _, value in values_of(row, name)]
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Statistic(statistics.fmean(values), deviation, len(values))


def as_markdown(table: MadeTable) -> str:
    """The table with its title and notes."""
    lines = [f"### {plain_markdown(table.title)}", ""] if table.title else []
    lines.append("| " + " | ".join(plain_markdown(text) for text in table.head) + " |")
    lines.append("|" + "|".join("---:" if number else "---" for number in table.numbers) + "|")
    lines += ["| " + " | ".join(plain_markdown(text) for text in row) + " |" for row in table.body]
    if table.notes:
        lines += ["", *(f"- {plain_markdown(note)}" for note in table.notes)]
    return "\n".join(lines)


def as_json(table: MadeTable) -> dict[str, Any]:
    """The numbers of a table: per row its keys, and per measure mean, deviation, n, and the published figure."""
    return {"title": table.title, "rows": [dict(row) for row in table.values]}


def _published(task: Task, cells: Sequence[Cell], name: MeasureName) -> Published | None:
    """The first entry that stands beside every cell of the row."""
    for entry in task.published:
        if name.key in entry.values and all(matches(task, cell, entry.where) for cell in cells):
            return entry
    return None


def _shown(statistic: Statistic | None, name: MeasureName) -> str:
    if statistic is None:
        return "–"
    digits = MEASURES[name.measure].digits
    text = f"{statistic.mean:.{digits}f}"
    return text if statistic.deviation is None else f"{text} ± {statistic.deviation:.{digits}f}"


def _head(key: str) -> str:
    axis, _, setting = key.partition(".")
    return _HEADS[axis] if setting in ("", "family") else setting.replace("_", " ")


def _with_unit(name: MeasureName) -> str:
    return f"{name.title} %" if MEASURES[name.measure].unit == "%" else name.title


def _general_title(name: MeasureName) -> str:
    return MEASURES[name.measure].title.replace("{at}", "k" if MEASURES[name.measure].of == "top" else "x")


def _once(names: Sequence[MeasureName]) -> list[MeasureName]:
    """One of each measure: its definition is the same for every k."""
    first: dict[str, MeasureName] = {}
    for name in names:
        first.setdefault(name.measure, name)
    return list(first.values())


def _place(value: Any, order: Mapping[str, int]) -> tuple[int, float, str]:
    """Names in the order of the task file, numbers by size, everything else by its text."""
    if isinstance(value, str) and value in order:
        return (0, order[value], "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return (2, 0.0, _text(value))
    return (1, float(value), "") if math.isfinite(value) else (2, 0.0, _text(value))


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_hashable(part) for part in value)
    return _flat(value) if isinstance(value, dict) else value


def _flat(value: Mapping[str, Any]) -> str:
    """A table of settings in one line."""
    return ", ".join(f"{key}={part}" for key, part in sorted(value.items()))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(_text(part) for part in value)
    if value is None:
        return "fits"
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain_markdown(text: str) -> str:
    """Text that stays in its cell: Markdown allows HTML, and class names and titles come from files."""
    text = "".join(c if c.isprintable() else " " for c in text)
    for mark, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(mark, instead)
    return text
