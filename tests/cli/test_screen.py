import json
import sys

import pytest

from unpoison.cli import screen
from unpoison.cli.screen import Screen, log_into, printable, read_ids
from unpoison.errors import ConfigError


def test_a_result_is_text_or_json_or_nothing(capsys):
    Screen(as_json=False, quiet=False).finish({"a": 1}, "two\nlines\x07")
    assert capsys.readouterr().out == "two\nlines\\x07\n"
    Screen(as_json=True, quiet=False).finish({"a": "\x1b"}, lambda: 1 / 0)
    assert json.loads(capsys.readouterr().out) == {"a": "\x1b"}
    Screen(as_json=False, quiet=True).finish({"a": 1}, lambda: 1 / 0)
    assert capsys.readouterr().out == ""
    Screen(as_json=True, quiet=True).finish({"a": 1}, "")
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_json_carries_no_raw_control_character(capsys):
    Screen(as_json=True, quiet=False).finish({"id": "\x1b[2J\u202e\x9b"}, "")
    assert all(c == "\n" or 32 <= ord(c) < 127 for c in capsys.readouterr().out)


def test_without_a_terminal_there_is_one_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    beat = screen._Heartbeat(clock=lambda: now[0])
    for done in range(200):
        beat("search", done, 1000)
        now[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "unpoison: search: 0 of 1000",
        "unpoison: search: 60 of 1000, 1/s, 15:40 left",
        "unpoison: search: 120 of 1000, 1/s, 14:40 left",
        "unpoison: search: 180 of 1000, 1/s, 13:40 left",
    ]


def test_quiet_is_silent(capsys):
    quiet = Screen(as_json=False, quiet=True)
    quiet.note("x")
    with quiet.progress() as progress:
        progress("search", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_notes_and_progress_go_to_stderr(capsys):
    loud = Screen(as_json=True, quiet=False)
    loud.note("x\x1b")
    with loud.progress() as progress:
        progress("search", 1, 2)
    assert capsys.readouterr() == ("", "unpoison: x\\x1b\nunpoison: search: 1 of 2\n")


def test_bars_show_stages_with_rates_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Screen(as_json=False, quiet=False).progress() as progress:
        progress("[bold]search", 0, 20)
        progress("[bold]search", 20, 20)
    assert capsys.readouterr().out == ""


def test_a_table_shows_names_as_they_are():
    text = Screen(as_json=False, quiet=False).table("t", ["name", "n"], [["[red]x[/red]\x1b", "1"]])
    assert "[red]x[/red]\\x1b" in text and "name" in text


def test_an_unforeseen_error_remembers_its_run_folder(tmp_path):
    with pytest.raises(RuntimeError) as caught, log_into(tmp_path):
        raise RuntimeError
    assert caught.value.log_folder == tmp_path


def test_ids_are_read_line_by_line(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("a b.png\nc.png\n", encoding="utf-8")
    assert read_ids(path) == ("a b.png", "c.png") and read_ids(None) is None
    path.write_text("\n")
    with pytest.raises(ConfigError, match="names no image: expected one id a line"):
        read_ids(path)
    with pytest.raises(ConfigError, match="cannot be read: expected a text file with one id a line"):
        read_ids(tmp_path / "missing")


def test_printable_agrees_with_the_sources_escape():
    from unpoison.data.sources import escape

    for text in ("a\nb", "größe 1.png", "\u202e", "\x9b", "日本.png"):
        assert printable(text) == escape(text)
