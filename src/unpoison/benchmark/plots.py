"""Pictures of a study as small SVGs, drawn here.

No plotting library: matplotlib would be 80 MB for lines with error bars, its files differ from version to version, and
an inline SVG opens offline in the page, follows its colours, and is the same bytes for the same numbers. Every text is
escaped: names of classes and settings come from files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from unpoison.benchmark.measures import MEASURES, MeasureName
from unpoison.benchmark.results import Results, values_of
from unpoison.benchmark.tables import row_groups
from unpoison.benchmark.task import Cell, Plot

__all__ = ["Panel", "Point", "Series", "as_svg", "make_panels"]

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 30, 46
_LEGEND_ROW = 18
# Okabe and Ito's colours, which people with any colour vision can tell apart; then the same ones with dashes.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_DASHES = ("", "6 3", "2 3")


@dataclass(frozen=True)
class Point:
    """A mean over n cells with the sample's standard deviation (0 for a single one)."""

    x: float
    y: float
    deviation: float
    n: int


@dataclass(frozen=True)
class Series:
    """One line."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: above it.
        x_title, y_title: beside its axes.
        series: its lines; empty while nothing is measured.
        log: whether x is drawn by its logarithm.
        top: upper end of y, None = fits.
    """

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    log: bool
    top: float | None


def make_panels(plot: Plot, results: Results) -> tuple[Panel, ...]:
    """One panel per measure and per value of `panels`."""
    made = []
    for keys, cells in row_groups(results.task, plot.panels, plot.where).items():
        for name in plot.y:
            measure = MEASURES[name.measure]
            words = [plot.title, ", ".join(map(_text, keys))]
            lines = []
            inside = set(cells)
            for line_keys, line_cells in row_groups(results.task, plot.lines, plot.where).items():
                points = _points(plot, name, [cell for cell in line_cells if cell in inside], results)
                if points:
                    lines.append(Series(", ".join(map(_text, line_keys)), points))
            made.append(
                Panel(
                    title=" – ".join(word for word in words if word),
                    x_title=plot.x.rpartition(".")[2].replace("_", " "),
                    y_title=_y_title(name),
                    series=tuple(lines),
                    log=plot.log,
                    top={"%": 100.0, "share": 1.0}.get(measure.unit),
                )
            )
    return tuple(made)


def _points(plot: Plot, name: MeasureName, cells: Sequence[Cell], results: Results) -> tuple[Point, ...]:
    by_x: dict[float, list[float]] = {}
    wanted = set(cells)
    for cell, row in results.rows:
        if cell not in wanted:
            continue
        for at, value in values_of(row, name):
            x = at if plot.x in ("k", "false_positive_rate") else _number(results.task.value(cell, plot.x))
            if x is not None and (x > 0 or not plot.log):
                by_x.setdefault(x, []).append(value)
    return tuple(
        Point(x, statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v))
        for x, v in sorted(by_x.items())
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _y_title(name: MeasureName) -> str:
    measure = MEASURES[name.measure]
    title = name.title.replace("top-{at} ", "top-k ").replace("@{at}", "").replace(" at FPR {at}", "")
    return f"{title}, %" if measure.unit == "%" else title


def as_svg(panel: Panel) -> str:
    """A panel as one SVG element; a pure function, the same bytes for the same numbers."""
    legend = len(panel.series) * _LEGEND_ROW
    height = _HEIGHT + legend
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>{escape(panel.title or panel.y_title)}</title>",
        _words(_LEFT, 18, panel.title, 'font-weight="bold"'),
    ]
    points = [point for series in panel.series for point in series.points]
    if not points:
        parts.append(_words(_LEFT, _TOP + 40, "nothing measured yet", 'opacity="0.7"'))
        return "\n".join([*parts, "</svg>"])
    x_scale = _Scale(
        [point.x for point in points], _LEFT, _WIDTH - _RIGHT, panel.log and min(p.x for p in points) > 0
    )
    highest = panel.top if panel.top is not None else max(p.y + p.deviation for p in points)
    y_scale = _Scale([0.0, highest or 1.0], _HEIGHT - _BOTTOM, _TOP, False)
    for tick in y_scale.ticks():
        y = y_scale(tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
            'stroke-opacity="0.15"/>'
        )
        parts.append(_words(_LEFT - 6, y + 4, f"{tick:g}", 'text-anchor="end"'))
    marks = sorted({point.x for point in points})
    for tick in marks if len(marks) <= 8 else x_scale.ticks():
        x = x_scale(tick)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM + 4}" '
            'stroke="currentColor"/>'
        )
        parts.append(_words(x, _HEIGHT - _BOTTOM + 17, f"{tick:g}", 'text-anchor="middle"'))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_words(middle, _HEIGHT - 8, panel.x_title, 'text-anchor="middle"'))
    centre = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        _words(14, centre, panel.y_title, f'text-anchor="middle" transform="rotate(-90 14 {centre:.1f})"')
    )
    for number, series in enumerate(panel.series):
        parts += _drawn(series, number, x_scale, y_scale, panel.top)
    return "\n".join([*parts, "</svg>"])


def _drawn(series: Series, number: int, x_scale: _Scale, y_scale: _Scale, top: float | None) -> list[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    style = f'stroke="{colour}" stroke-width="2" fill="none"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )
    path = " ".join(f"{x_scale(point.x):.1f},{y_scale(point.y):.1f}" for point in series.points)
    parts = [f'<polyline points="{path}" {style}/>']
    for point in series.points:
        x = x_scale(point.x)
        if point.deviation:
            low = y_scale(max(0.0, point.y - point.deviation))
            high = y_scale(min(point.y + point.deviation, top if top is not None else math.inf))
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" '
                'stroke-opacity="0.6"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y_scale(point.y):.1f}" r="3" fill="{colour}"/>')
    y = _HEIGHT + number * _LEGEND_ROW + 6
    parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + 22}" y1="{y}" y2="{y}" {style}/>')
    parts.append(_words(_LEFT + 28, y + 4, series.name))
    return parts


class _Scale:
    """From values to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.low, self.high = min(values), max(values)
        self.log = log
        if self.low == self.high:  # a single value stands in the middle
            self.low, self.high = (self.low / 2, self.high * 2) if log else (self.low - 1, self.high + 1)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            candidates = [10.0**power for power in range(first, last + 1)]
        else:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step = next(
                step * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6
            )
            first = math.ceil(self.low / step - 1e-9)
            candidates = [round(step * index, 10) for index in range(first, first + 8)]
        return [value for value in candidates if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def _words(x: float, y: float, text: str, more: str = "") -> str:
    clean = "".join(c if c.isprintable() else " " for c in text)
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(clean)}</text>'


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(_text(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
