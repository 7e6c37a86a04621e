"""All cells of a task, the finished ones skipped, and the files that come of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unpoison.benchmark.cells import Bench
from unpoison.benchmark.page import as_html, as_text
from unpoison.benchmark.plots import as_svg, make_panels
from unpoison.benchmark.results import Results, collect, to_json, write_parquet
from unpoison.benchmark.tables import as_json, make_tables
from unpoison.benchmark.task import Cell, DefenceConfig, Task
from unpoison.data.export import atomic_file, write_json_atomically
from unpoison.errors import ConfigError, UnpoisonError
from unpoison.runtime import Progress, silent
from unpoison.scan.cost import expected_cost

__all__ = ["PlannedCell", "plan_benchmark", "run_benchmark"]

_MARK = "unpoison_benchmark"
Say = Callable[[str], None]


@dataclass(frozen=True)
class PlannedCell:
    """What one cell would take.

    Attributes:
        cell: which.
        done: finished already.
        training: images shown in training, epochs × images, of encoders that no earlier cell of the plan trains.
        passes: images shown to encoders by its scan and its probes, about.
    """

    cell: Cell
    done: bool
    training: int
    passes: int


def run_benchmark(
    task: Task,
    out: str | Path,
    *,
    store: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    fresh: bool = False,
    say: Say = lambda line: None,
    progress: Progress = silent,
) -> Results:
    """Compute what is missing and write everything; results are written after every cell.

    Args:
        task: from `task.read_task`.
        out: gets results.parquet, results.json, results.md, results.html and plots/.
        store: cells, encoders and scans, which several tasks may share; None = `out`.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.
        fresh: compute finished cells and scans again; trained encoders are kept.
        say: told one line per cell.
        progress: called by every long loop.

    Returns:
        Finished cells, and those that failed with the reason; a failure costs no other cell.

    Raises:
        ConfigError: `out` holds something else.
        DataError: none of the task's images are there.
    """
    out = Path(out)
    store = out if store is None else Path(store)
    bench = Bench(task, store, device=device, precision=precision, fresh=fresh)
    _find_data(bench)
    _claim(out, task)
    rows: list[tuple[Cell, dict[str, Any]]] = []
    failed: list[tuple[Cell, str]] = []
    for number, cell in enumerate(task.cells, start=1):
        where = f"cell {number} of {len(task.cells)}"
        name = f"{cell.data}, {cell.attack}, {cell.victim}, {cell.defence}, seed {cell.seed}"
        try:
            row = bench.find(bench.key(cell))
            if row is None:
                say(f"{where}: {name}")
                row = bench.compute(cell, progress=_named(progress, where))
                say(f"{where}: {row['seconds']['cell']:.0f} s")
            else:
                say(f"{where}: {name}: finished earlier")
        except Exception as error:  # a night of cells must not be lost to one of them
            reason = str(error).split("\n")[0][:300]
            if not isinstance(error, UnpoisonError):
                reason = f"unexpected {type(error).__name__}: {reason}; the traceback is in failures.txt"
                _note_failure(out, name, error)
            say(f"{where} failed: {reason}")
            failed.append((cell, reason))
            continue
        rows.append((cell, row))
        write_results(Results(task, tuple(rows), tuple(failed)), out)
    results = Results(task, tuple(rows), tuple(failed))
    write_results(results, out)
    return results


def write_results(results: Results, out: Path) -> None:
    """All files that people and programs read; each appears in one step."""
    tables = make_tables(results)
    svgs = [as_svg(panel) for plot in results.task.plots for panel in make_panels(plot, results)]
    names = [f"plots/{number}.svg" for number in range(1, len(svgs) + 1)]
    for name, svg in zip(names, svgs, strict=True):
        _write(out / name, svg)
    write_parquet(collect(results), out / "results.parquet")
    _write(out / "results.md", as_text(results, tables, names))
    _write(out / "results.html", as_html(results, tables, svgs))
    write_json_atomically(out / "results.json", to_json(results, [as_json(table) for table in tables]))


def plan_benchmark(task: Task, out: str | Path, *, store: str | Path | None = None) -> list[PlannedCell]:
    """What `run_benchmark` would do; reads names and labels of images, decodes none, writes nothing.

    Done cells are recognised once a run has read the images of this store.

    Raises:
        DataError: the images are not there.
    """
    bench = Bench(task, Path(out if store is None else store))
    planned = []
    trained: set[tuple[object, ...]] = set()
    for cell in task.cells:
        key = bench.key(cell, may_decode=False)
        done = bench.find(key) is not None
        chosen = bench.chosen(cell)
        defence: DefenceConfig = task.axes["defence"][cell.defence].config
        recipe = task.axes["victim"][cell.victim].config
        n_images, n_test = len(chosen.train), len(chosen.test)
        clean = defence.kind == "clean-trained"
        # The attack is part of a victim, not of the control; names serve here, since nothing is decoded.
        known = (cell.data, "" if clean else cell.attack, cell.victim, cell.seed)
        trains = {("", *known): recipe.epochs * n_images}  # what is trained, and how many images that shows
        if defence.distill is not None:
            student = defence.distill
            trains[cell.defence, *known] = student.epochs * int(student.share * n_images)
        elif defence.kind == "scan" and defence.retrain:
            trains[cell.defence, *known] = recipe.epochs * n_images
        elif defence.i_cutmix:
            trains = {("i-CutMix", *known): recipe.epochs * n_images}
        training = 0
        for name, shown in trains.items():
            if name not in trained and not done:
                trained.add(name)
                training += shown
        passes = 0
        if defence.kind == "scan":
            size = task.axes["data"][cell.data].config.size
            passes += expected_cost(defence.scan.resolve(n_images, size), n_images, size).expected
        if task.evaluate.encoders and defence.measures_encoder:
            n_triggers = len(bench.attack(cell).make_triggers(chosen.class_names))
            passes += int(task.evaluate.labelled * n_images) + n_test * (1 + n_triggers)
        planned.append(PlannedCell(cell, done, training, 0 if done else passes))
    return planned


def _find_data(bench: Bench) -> None:
    """Raises what is wrong with the images when that is so of all of them; else cells of the others are computed."""
    wrong: dict[str, UnpoisonError] = {}
    for cell in bench.task.cells:
        if cell.data not in wrong:
            try:
                bench.chosen(cell)
            except UnpoisonError as error:
                wrong[cell.data] = error
    if wrong and len(wrong) == len({cell.data for cell in bench.task.cells}):
        raise next(iter(wrong.values()))


def _named(progress: Progress, where: str) -> Progress:
    """The same callback, told which cell it is."""

    def named(stage: str, done: int, total: int) -> None:
        progress(f"{where}: {stage}", done, total)

    return named


def _claim(out: Path, task: Task) -> None:
    """Refuse a folder that holds something else; note whose it is."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; --out names a folder")
    mark = out / "benchmark.json"
    if out.is_dir() and any(out.iterdir()) and not mark.exists():
        raise ConfigError(f"{out}: exists and holds no benchmark; choose another --out, nothing was changed")
    write_json_atomically(mark, {_MARK: 1, "name": task.name})


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _note_failure(out: Path, name: str, error: Exception) -> None:
    with (out / "failures.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{name}\n{''.join(traceback.format_exception(error))}\n")
