"""Tables and plots of the studies in tasks/, from the cells that are in store/: results/tasks/NAME.md.

Computes no cell; a study of which none is finished is left alone.

python benchmarks/task_tables.py [NAME ...]
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import common

from unpoison.benchmark.cells import Bench
from unpoison.benchmark.results import Results
from unpoison.benchmark.run import write_results
from unpoison.benchmark.task import read_task
from unpoison.errors import DataError

TASKS = common.ROOT / "benchmarks" / "tasks"
STORE = common.ROOT / "benchmarks" / "store"
TABLES = common.RESULTS / "tasks"


def write(name, store=STORE, tables=TABLES):
    """The number of finished cells, and that of all; nothing is written where none is finished."""
    task = read_task(TASKS / f"{name}.toml")
    bench = Bench(task, store)
    rows = [(cell, row) for cell in task.cells if (row := bench.find(bench.key(cell))) is not None]
    if rows:
        with tempfile.TemporaryDirectory() as folder:
            write_results(Results(task, tuple(rows), ()), Path(folder))
            text = (Path(folder) / "results.md").read_text(encoding="utf-8")
            tables.mkdir(parents=True, exist_ok=True)
            (tables / f"{name}.md").write_text(text.replace("(plots/", f"({name}/"), encoding="utf-8")
            if (Path(folder) / "plots").is_dir():
                shutil.rmtree(tables / name, ignore_errors=True)
                shutil.copytree(Path(folder) / "plots", tables / name)
    return len(rows), len(task.cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(path.stem for path in TASKS.glob("*.toml"))
    parser.add_argument(
        "names", nargs="*", default=known, metavar="NAME", help="of a task file; default: all"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    for name in options.names:
        try:
            done, total = write(name)
            common.say(f"{name}: {done} of {total} cells")
        except DataError as error:
            common.say(f"{name}: {error}")
    sys.exit(0)
