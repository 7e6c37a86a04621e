"""Plots of benchmarks as small SVGs in results/, drawn by the same code as those of `unpoison benchmark`."""

import json
import math
from html import escape

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


def bars(title, parts_of):
    """Stacked bars from label to part to seconds, one below the other, each part with its seconds where they fit."""
    parts = list(dict.fromkeys(part for seconds in parts_of.values() for part in seconds))
    fills = {part: _FILLS[number % len(_FILLS)] for number, part in enumerate(parts)}
    longest = max(sum(seconds.values()) for seconds in parts_of.values())
    lines = [f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>']
    y = 36
    for label, seconds in parts_of.items():
        lines.append(f'<text x="10" y="{y + 17}">{escape(label)}, {sum(seconds.values()):.0f} s</text>')
        x = 170.0
        for part, value in seconds.items():
            width = 560 * value / longest
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="24" fill="{fills[part]}"/>')
            if width > 30:
                lines.append(f'<text x="{x + 4:.1f}" y="{y + 17}" fill="#fff">{value:.0f}</text>')
            x += width
        y += 32
    x = 10
    for part, fill in fills.items():
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{fill}"/>')
        lines.append(f'<text x="{x + 16}" y="{y + 11}">{escape(part)}</text>')
        x += 28 + 7 * len(part)
    shape = f'width="750" height="{y + 24}" viewBox="0 0 750 {y + 24}"'
    body = "\n".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {shape} font-family="sans-serif" font-size="12">{body}</svg>'


_FILLS = ("#7f7f7f", "#56b4e9", "#cc79a7", "#0072b2", "#a05a00", "#d55e00", "#009e73", "#5b5b9f", "#b07f00")


def draw(name, picture_of):
    """results/NAME.svg, a panel or an SVG, from results/NAME.json; nothing where there are no results yet."""
    path = common.RESULTS / f"{name}.json"
    if not path.exists():
        return
    picture = picture_of(json.loads(path.read_text(encoding="utf-8")))
    svg = as_svg(picture) if isinstance(picture, Panel) else picture
    # A picture in a page of any colour: on its own white paper, in black.
    opening, rest = svg.replace("currentColor", "#222").split(">", 1)
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    (common.RESULTS / f"{name}.svg").write_text(f"{opening}>\n{paper}{rest}\n", encoding="utf-8")


def linked(name, text):
    """The line of a table that shows the picture."""
    return f"![{text}](results/{name}.svg)"
