"""A study for people: a Markdown text, and an HTML page that opens offline; no scripts, every string escaped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from unpoison.benchmark.results import Results
from unpoison.benchmark.tables import MadeTable, as_markdown, plain_markdown

__all__ = ["as_html", "as_text"]


def as_html(results: Results, tables: Sequence[MadeTable], pictures: Sequence[str]) -> str:
    """The page.

    Args:
        results: what is known so far.
        tables: of it.
        pictures: SVG elements of `plots.as_svg`, whose texts are escaped already.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("unpoison.benchmark").joinpath("templates/benchmark.html").read_text(encoding="utf-8")
    )
    return template.render(
        task=results.task, status=_status(results), tables=tables, pictures=pictures, lists=_lists(results)
    )


def as_text(results: Results, tables: Sequence[MadeTable], pictures: Sequence[str]) -> str:
    """The same as Markdown.

    Args:
        results: what is known so far.
        tables: of it.
        pictures: paths of SVG files, relative to the text.
    """
    task = results.task
    parts = [f"# {plain_markdown(task.title)}"]
    if task.about:
        parts.append(plain_markdown(task.about))
    parts.append(_status(results))
    parts += [as_markdown(table) for table in tables]
    parts += [f"![]({path})" for path in pictures]
    for heading, entries in _lists(results):
        lines = (f"- {plain_markdown(what)}: {plain_markdown(reason)}" for what, reason in entries)
        parts.append("\n".join([f"### {heading}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def _status(results: Results) -> str:
    task = results.task
    status = (
        f"{len(results.rows)} of {len(task.cells)} cells, seeds {', '.join(map(str, task.seeds))}. Figures are mean "
        "± the sample's standard deviation over the cells of a row; several triggers of a cell count as their mean."
    )
    about = [row for _, row in results.rows]
    computed = sorted(
        {
            (row["machine"]["gpu"] if row["machine"]["device"] != "cpu" else None) or row["machine"]["cpu"]
            for row in about
        }
    )
    version = sorted(
        {f"unpoison {row['versions']['unpoison']}, torch {row['versions']['torch']}" for row in about}
    )
    if about:
        status += f" Computed on {'; '.join(computed)}, with {'; '.join(version)}."
    if len({row["source"] for row in about}) > 1:
        status += (
            " Cells were computed by different states of the source code; --fresh computes all of them again."
        )
    return status


def _lists(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headed lists of what is missing, and why; without empty ones."""
    failed = [
        (f"{cell.data}, {cell.attack}, {cell.victim}, {cell.defence}, seed {cell.seed}", reason)
        for cell, reason in results.failed
    ]
    both = [("Left out", list(results.task.left_out)), ("Failed", failed)]
    return [(heading, entries) for heading, entries in both if entries]
