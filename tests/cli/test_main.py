import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import unpoison
from unpoison.cli import main
from unpoison.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NothingToScanError,
    NoVerdictError,
    UnpoisonError,
)

SOURCE = Path(unpoison.__file__).parents[1]


@pytest.mark.parametrize(
    "verb", [*([v] for v in main.VERBS), ["attack", "patch"], ["repair", "retrain"]], ids=" ".join
)
def test_every_verb_explains_itself_with_examples(run, verb):
    done = run(*verb, "--help")
    assert done.exit_code == 0
    assert done.output.count("Example: unpoison") >= (1 if verb == ["repair"] else 2)


def test_every_command_takes_the_options_of_all():
    group = typer.main.get_command(main.app)
    context = typer.Context(group)
    commands = []
    for name in main.VERBS:
        verb = group.get_command(context, name)
        commands += getattr(verb, "commands", {name: verb}).items()
    assert {"scan", "ctrl", "clip", "distill"} <= {name for name, _ in commands}
    for name, command in commands:
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--seed", "--device", "--json", "--quiet", "--config", "--offline"} <= options, name


def test_help_lists_the_verbs_and_the_exit_codes(run):
    text = " ".join(run("--help").output.split())
    assert all(verb in text for verb in main.VERBS)
    assert "130 interrupted" in text


def test_the_version(run):
    assert run("--version").output == f"unpoison {unpoison.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["scan"], ["scan", "images", "--no-such-option"], ["attack", "x"]]
)
def test_wrong_usage_is_2(run, arguments):
    done = run(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("unpoison: error: ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(" --help\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnpoisonError("a"), 3),
        (ConfigError("a"), 2),
        (DataError("a"), 3),
        (NothingToScanError("a"), 4),
        (CheckpointError("a"), 3),
        (NoVerdictError("a"), 4),
    ],
)
def test_a_foreseen_error_is_one_line_and_its_code(run, monkeypatch, error, code):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("unpoison.cli.schema.Screen", fail)
    done = run("schema", "verdict")
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", "unpoison: error: a\n")


def test_an_error_cannot_steer_the_terminal(run, monkeypatch):
    def fail(*_args, **_kwargs):
        raise DataError("id \x1b[2J\nsecond line")

    monkeypatch.setattr("unpoison.cli.schema.Screen", fail)
    assert run("schema", "verdict").stderr == "unpoison: error: id \\x1b[2J\\nsecond line\n"


def test_an_unforeseen_error_is_3_and_names_the_log(run, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("surprise\nmore")

    monkeypatch.setattr("unpoison.cli.schema.Screen", fail)
    done = run("schema", "verdict")
    assert done.exit_code == 3 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("unpoison: error: unexpected RuntimeError: surprise; the traceback is in ")
    log = Path(done.stderr.strip().rsplit(" ", 1)[1])
    assert "Traceback" in log.read_text() and "surprise" in log.read_text()
    log.unlink()


def test_an_interrupt_is_130_and_says_how_to_go_on(run, monkeypatch):
    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("unpoison.cli.schema.Screen", fail)
    done = run("schema", "verdict")
    assert (done.exit_code, done.stderr) == (130, "unpoison: interrupted; the same command resumes\n")


def test_an_interrupt_that_a_library_makes_another_error_of_is_130_too(run, monkeypatch):
    def fail(*_args, **_kwargs):
        with contextlib.suppress(KeyboardInterrupt):
            main._interrupt(2, None)
        raise RecursionError("in the middle of an import")

    monkeypatch.setattr(main, "_interrupted", [])
    monkeypatch.setattr("unpoison.cli.schema.Screen", fail)
    done = run("schema", "verdict")
    assert (done.exit_code, done.stderr) == (130, "unpoison: interrupted; the same command resumes\n")


@pytest.mark.parametrize("verb", ["scan", "audit", "clean", "report", "schema", "doctor", "demo", "evaluate"])
def test_help_of_light_verbs_does_not_import_torch(verb):
    code = f"import sys; from unpoison.cli.main import app; app(['{verb}', '--help'], standalone_mode=False)"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "unpoison", "schema", "nothing"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "unpoison: error: schema 'nothing': expected verdict or findings or plan or benchmark or audit\n"
    )


def test_a_reader_that_has_seen_enough_leaves_the_exit_code_alone(tmp_path):
    code = "from unpoison.cli.screen import Screen; import typer\n"
    code += "Screen(as_json=False, quiet=False).finish({}, 'line\\n' * 100000); raise SystemExit(4)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(SOURCE)}
    ) as program:
        program.stdout.read(5)
        program.stdout.close()
        assert program.wait() == 4


def test_a_log_that_cannot_be_written_costs_the_log_alone(run, monkeypatch, tmp_path):
    class Forbidden(type(tmp_path)):
        def is_dir(self, **_):
            raise PermissionError(13, "Permission denied")

    def fail(*_args, **_kwargs):
        error = ZeroDivisionError("surprise")
        error.log_folder = Forbidden(tmp_path)
        raise error

    monkeypatch.setattr("unpoison.cli.schema.Screen", fail)
    done = run("schema", "verdict")
    assert (
        done.exit_code == 3 and "unexpected ZeroDivisionError: surprise; the traceback is in" in done.stderr
    )
