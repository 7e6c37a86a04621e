"""Running the command line inside a test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import unpoison
from unpoison.cli.main import app


@pytest.fixture
def run() -> Callable[..., Result]:
    """run("scan", folder, ...): what the command line prints, and its exit code."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="unpoison")

    return invoke


@pytest.fixture
def replace_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """replace_module("pipeline", scan=f): a stand-in for a module of the package."""

    def replace(name: str, **content: Any) -> None:
        module = ModuleType(f"unpoison.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(unpoison, name, module, raising=False)

    return replace
