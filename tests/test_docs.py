"""The documents say what the code does: commands, flags, links, tables."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import unpoison
from unpoison import errors
from unpoison.cli.main import VERBS, app
from unpoison.cli.scan import EXIT_CODES
from unpoison.pretrain.loop import METHODS
from unpoison.report.schemas import SCHEMAS
from unpoison.scan.config import ScanConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
OTHER_PROGRAMS = {
    "--no-deps",
    "--version",
    "--write-reference",
}  # of pip, of unpoison itself, of benchmarks/zoo.py


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return [(m[1], m[2]) for m in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def commands(text: str) -> list[str]:
    """Every `unpoison …` that a reader could type, from fenced blocks and from inline code."""
    found = []
    for language, content in fences(text):
        if language in ("sh", "console", "yaml"):
            for line in content.replace("\\\n", " ").splitlines():
                start = re.match(r"(?:\s*- run: |\s*run: |\$ |\s*)(unpoison .*)", line)
                if start and (language != "console" or line.startswith("$ ")):
                    found.append(start[1])
    found += re.findall(r"`(unpoison [^`]*)`", prose(text))
    return [line for line in found if re.match(r"unpoison [a-z]", line)]


@functools.cache
def root_command() -> Any:
    return typer.main.get_command(app)


def verb_and_rest(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, sub-commands followed, and its own arguments."""
    verb, *rest = words
    assert verb in VERBS, f"no verb {verb!r}"
    command = root_command().get_command(None, verb)
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def flags_of(command: Any) -> set[str]:
    own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return {flag for flag in own if flag.startswith("-")} | {"--help", "-h"}


def without_redirections(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    for stop in (">", "|", "&&", "||", ";"):
        if stop in words:
            words = words[: words.index(stop)]
    return words[1:]


COMMANDS = [(name, line) for name in NAMES for line in commands(read(name))]


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_every_flag_of_every_command_exists(name: str, line: str) -> None:
    command, rest = verb_and_rest(without_redirections(line))
    used = {word.split("=")[0] for word in rest if word.startswith("-") and word != "-"}
    assert used - flags_of(command) == set(), f"{name}: {line}"


SHELL = [
    (name, line)
    for name in NAMES
    for language, content in fences(read(name))
    if language == "sh"
    for line in commands(f"```sh\n{content}```")
]


@pytest.mark.parametrize(("name", "line"), SHELL)
def test_every_command_in_a_shell_block_is_complete(name: str, line: str) -> None:
    command, rest = verb_and_rest(without_redirections(line))
    command.make_context("unpoison", rest)  # raises on a missing or malformed argument; runs nothing


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_in_the_prose_belongs_to_some_verb(name: str) -> None:
    known = set(OTHER_PROGRAMS)
    for verb in VERBS:
        command = root_command().get_command(None, verb)
        for each in (command, *getattr(command, "commands", {}).values()):
            known |= flags_of(each)
    code = " ".join(re.findall(r"`([^`\n]+)`", prose(read(name))))
    used = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code))
    assert used - known == set()


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading.

    >>> slug("(a) The `directed` score"), slug("`--faithful`")
    ('a-the-directed-score', '--faithful')
    """
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(file: Path) -> set[str]:
    return {
        slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(file.read_text(encoding="utf-8")), re.M)
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_resolves(name: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_no_marked_place_is_left_empty(name: str) -> None:
    """`<!-- tour:N -->` is followed by real output in a fenced block, not by a promise."""
    for number in re.findall(r"<!-- tour:(\d+) -->", read(name)):
        block = re.search(rf"<!-- tour:{number} -->\n+```text\n(.*?)```", read(name), re.S)
        assert block, f"tour:{number} has no block"
        assert "to be filled" not in block[1], f"tour:{number} still waits for real output"


def table(name: str, first_column: str) -> list[list[str]]:
    """The body of the first table of a document whose first column is called so; cells without code marks."""
    lines = prose(read(name)).splitlines()
    for number, line in enumerate(lines):
        if line.startswith(f"| {first_column} |"):
            body = []
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    break
                body.append([cell.strip().replace("`", "") for cell in row.strip("|").split("|")])
            return body
    raise AssertionError(f"{name} has no table with the first column {first_column!r}")


@pytest.mark.parametrize("name", ["README.md", "docs/outputs.md"])
def test_the_exit_code_table_holds_exactly_the_codes(name: str) -> None:
    from_errors = {getattr(errors, kind).exit_code for kind in errors.__all__}
    assert [int(row[0]) for row in table(name, "code")] == sorted(
        from_errors | set(EXIT_CODES.values()) | {130}
    )


def test_the_table_of_errors_equals_the_code() -> None:
    drawn = {row[0]: int(row[1]) for row in table("docs/outputs.md", "error")}
    assert drawn == {kind: getattr(errors, kind).exit_code for kind in errors.__all__}


def test_the_verdicts_have_their_exit_codes() -> None:
    assert {row[0]: int(row[1]) for row in table("docs/outputs.md", "verdict")} == EXIT_CODES


@pytest.mark.parametrize(("schema", "first_column"), [("verdict", "field"), ("findings", "column")])
def test_every_field_is_described(schema: str, first_column: str) -> None:
    described = [row[0] for row in table("docs/outputs.md", first_column)]
    assert len(described) == len(set(described))
    assert set(SCHEMAS[schema]["properties"]) <= set(described)
    if schema == "findings":
        assert described == list(SCHEMAS[schema]["properties"])


def test_the_settings_table_holds_the_defaults() -> None:
    written = {row[0]: row[1] for row in table("docs/methods.md", "setting")}
    real = {}
    for field in dataclasses.fields(ScanConfig):
        value = field.default
        if isinstance(value, bool):  # before the numbers: True == 1
            real[field.name] = "on" if value else "off"
        else:
            real[field.name] = "fits" if value is None else str(value)
    assert written == real


def test_the_readme_names_every_pretraining_method_and_verb() -> None:
    text = read("README.md")
    assert [m for m in METHODS if m not in text] == []
    assert [verb for verb in VERBS if f"unpoison {verb}" not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_python_examples_use_public_names_only(name: str) -> None:
    code = [ast.parse(content) for language, content in fences(read(name)) if language == "python"]
    used = {
        node.attr
        for tree in code
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "unpoison"
    }
    assert used - set(unpoison.__all__) == set()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CONTRIBUTING.md"])  # it also names plans
def test_named_source_files_exist(name: str) -> None:
    """`scan/search.py` in the prose is a file of the package, of the tests or of the repository."""
    places = (ROOT, ROOT / "src/unpoison", ROOT / "tests")
    named = set(re.findall(r"`([\w./-]+\.py)`", prose(read(name))))
    assert [path for path in sorted(named) if not any((place / path).is_file() for place in places)] == []
