"""The tree in the manual is the tree in the code."""

from __future__ import annotations

import inspect
import re

import pytest

from unpoison import errors

CLASSES = {name: getattr(errors, name) for name in errors.__all__}


def test_the_drawn_tree_names_every_class_with_its_parents_and_exit_code() -> None:
    drawn = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(
            r"(?P<indent>[│├└─ ]*)(?P<name>\w+Error)\s+(?:\((?P<builtin>\w+)\)\s+)?exit (?P<code>\d)", line
        )
        if found:
            depth = len(found["indent"]) // 4
            parents[depth:] = [found["name"]]
            bases = {parents[depth - 1] if depth else "Exception"} | ({found["builtin"]} - {None})
            drawn[found["name"]] = (bases, int(found["code"]))
    real = {
        name: ({base.__name__ for base in kind.__bases__}, kind.exit_code) for name, kind in CLASSES.items()
    }
    assert drawn == real


def test_every_class_of_the_module_is_listed() -> None:
    defined = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_is_caught_as_an_unpoison_error(name: str) -> None:
    with pytest.raises(errors.UnpoisonError, match="one line"):
        raise CLASSES[name]("one line")
