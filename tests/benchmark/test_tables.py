import math

import pytest

from unpoison.benchmark.measures import MEASURES, TOP, read_measure
from unpoison.benchmark.plots import Panel, Point, Series, as_svg, make_panels
from unpoison.benchmark.results import Results, collect, values_of
from unpoison.benchmark.tables import as_json, as_markdown, make_tables, mean_of, plain_markdown
from unpoison.errors import ConfigError


def entry(measure, value, at=None, trigger=None):
    probe = "linear" if MEASURES[measure].of == "probe" else None
    unit = MEASURES[measure].unit
    return {"measure": measure, "probe": probe, "trigger": trigger, "at": at, "value": value, "unit": unit}


def finished(*measurements):
    about = {"machine": {"gpu": None, "cpu": "a", "device": "cpu"}, "versions": {}, "source": "s", "key": "k"}
    return {**about, "measurements": list(measurements)}


@pytest.fixture
def results(tiny):
    """Cells of two seeds with numbers made by hand: ACC 60 + 10 · seed, top-k accuracy 100 / k."""
    task = tiny()
    rows = [
        (
            cell,
            finished(
                entry("accuracy", 60.0 + 10 * cell.seed, trigger=0),
                entry("attack_success", 20.0, trigger=0),
                entry("attack_success", 40.0, trigger=1),
                entry("removed", None),
                *(entry("top_accuracy", 100 / k, at=float(k)) for k in TOP),
            ),
        )
        for cell in task.cells
        if cell.defence != "clean-trained"
    ]
    return Results(task, tuple(rows), ())


def test_mean_and_deviation_over_cells_of_the_mean_over_triggers(results):
    rows = [row for _, row in results.rows]
    said = mean_of(rows[:1] + rows[-1:], read_measure("accuracy"))
    assert (said.mean, said.n) == (65, 2) and said.deviation == pytest.approx(math.sqrt(50))
    assert values_of(rows[0], read_measure("attack_success")) == [(None, 30.0)]
    assert mean_of(rows, read_measure("removed")) is None
    assert mean_of(rows[:1], read_measure("top_accuracy@20")).deviation is None


def test_the_paper_s_figure_stands_beside_ours(results):
    table = make_tables(results)[0]
    assert table.head[:5] == ("images", "defence", "cells", "ACC clean %", "paper")
    by_name = {row[1]: row for row in table.body}
    assert by_name["PoisonCAM"][2:6] == ("2", "65.0 ± 7.1", "69.7 [1]", "30.0 ± 0.0")
    assert by_name["no defence"][4] == "–"  # published for another defence
    assert by_name["clean-trained"][2:4] == ("0 of 2", "–")  # not computed yet
    assert table.notes[0] == "[1] PoisonCAM, Table I"
    assert as_json(table)["rows"][1]["accuracy published"] == 69.7


def test_markdown_rows_have_as_many_cells_as_the_head(results):
    lines = [line for line in as_markdown(make_tables(results)[0]).split("\n") if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and lines[1].startswith("|---|---|---:|")
    assert plain_markdown("a|b<c>&\n") == "a\\|b&lt;c&gt;&amp; "


def test_tidy_rows_have_types_that_parquet_keeps(results, tmp_path):
    frame = collect(results)
    assert len(frame) == len(results.rows) * (4 + len(TOP)) and frame["trigger"].isna().any()
    assert frame.dtypes["value"] == "float64" and frame.dtypes["seed"] == "int64"
    assert len(collect(Results(results.task, (), ()))) == 0


def test_a_curve_has_one_point_per_k_and_one_line_per_defence(results):
    (panel,) = make_panels(results.task.plots[0], results)
    assert [series.name for series in panel.series] == ["no defence", "PoisonCAM"]
    assert panel.series[0].points[:2] == (Point(5, 20, 0, 2), Point(10, 10, 0, 2))
    assert panel.log and panel.top == 100 and panel.y_title == "top-k accuracy, %"


def test_a_sensitivity_curve_follows_a_setting(tiny):
    changes = ("window = 9", "vary = [{ window = 5 }, { window = 9 }]", 'x = "k"', 'x = "defence.window"')
    task = tiny(*changes, 'y = ["top_accuracy"]', 'y = ["recall"]', "[0, 1]", "[0]")
    rows = tuple(
        (cell, finished(entry("recall", 10.0 * task.value(cell, "defence.window"))))
        for cell in task.cells
        if task.value(cell, "defence.family") == "PoisonCAM"
    )
    (panel,) = make_panels(task.plots[0], Results(task, rows, ()))
    assert [(series.name, [(p.x, p.y) for p in series.points]) for series in panel.series] == [
        ("PoisonCAM", [(5, 50), (9, 90)])
    ]


def panel(points, **more):
    settings = {"title": "<t>", "x_title": "k", "y_title": "&y", "log": True, "top": None, **more}
    return Panel(series=(Series('a "b" <c>', tuple(points)),) if points else (), **settings)


def test_a_picture_escapes_its_texts_and_is_the_same_bytes_again():
    points = [Point(5, 10, 2, 3), Point(500, 40, 0, 1)]
    svg = as_svg(panel(points))
    assert svg == as_svg(panel(points)) and "<t>" not in svg and "&lt;c&gt;" in svg and "&amp;y" in svg
    assert svg.count("<circle") == 2 and svg.count("<polyline") == 1


@pytest.mark.parametrize("points", [[], [Point(20, 0, 0, 1)], [Point(0, 3, 0, 1), Point(1, 4, 1, 2)]])
@pytest.mark.parametrize("log", [True, False])
def test_pictures_of_little_are_drawn_too(points, log):
    svg = as_svg(panel(points, log=log))
    assert svg.endswith("</svg>") and "nan" not in svg
    assert ("nothing measured yet" in svg) == (not points)


@pytest.mark.parametrize("name", [*MEASURES])
def test_every_measure_can_be_named(name):
    at = {"top": "@20", "roc": "@0.01"}.get(MEASURES[name].of, "")
    read = read_measure(name + at)
    assert read.key == name + at and "{at}" not in read.title
    assert read_measure(name, whole_curve=True).measure == name


def test_nonsense_is_no_measure():
    with pytest.raises(ConfigError, match="unknown measure '!!'; expected one of accuracy"):
        read_measure("!!")
