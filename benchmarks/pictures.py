"""Plots of benchmarks as small SVGs in results/, drawn by the same code as those of `unpoison benchmark`."""

import json
import math

import common

from unpoison.benchmark.plots import Panel, Point, Series, as_svg


def series(name, points):
    """A line from (x, y) pairs; several y of one x become their mean and deviation. Pairs without a y are left out."""
    by_x = {}
    for x, y in points:
        if y is not None:
            by_x.setdefault(float(x), []).append(float(y))
    made = []
    for x, values in sorted(by_x.items()):
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0
        made.append(Point(x, mean, spread, len(values)))
    return Series(name, tuple(made))


def panel(title, x_title, y_title, lines, *, log=True, top=None):
    return Panel(title, x_title, y_title, tuple(line for line in lines if line.points), log, top)


def draw(name, panel_of):
    """results/NAME.svg from results/NAME.json; nothing where there are no results yet."""
    path = common.RESULTS / f"{name}.json"
    if not path.exists():
        return
    svg = as_svg(panel_of(json.loads(path.read_text(encoding="utf-8"))))
    # A picture in a page of any colour: on its own white paper, in black.
    opening, rest = svg.replace("currentColor", "#222").split(">", 1)
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    (common.RESULTS / f"{name}.svg").write_text(f"{opening}>\n{paper}{rest}\n", encoding="utf-8")


def linked(name, text):
    """The line of a table that shows the picture."""
    return f"![{text}](results/{name}.svg)"
