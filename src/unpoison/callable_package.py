"""Packages that share their name with a public function, and may be called like it.

`unpoison.scan` is a function and a package. Once any part of the package is imported, Python binds the package to that
name, and `unpoison.scan(...)` would no longer work; so the package takes calls and hands them to the function.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["make_callable"]


class _CallablePackage(ModuleType):
    """A package that is called as the function named by its `_function`, "module:name"."""

    _function: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, name = self._function.split(":")
        return getattr(import_module(module), name)(*args, **kwargs)


def make_callable(package: str, function: str) -> None:
    """Let calls of a package go to a function, which is imported at the first call.

    Args:
        package: full name of a package that is being imported.
        function: "module:name".
    """
    module = sys.modules[package]
    module.__class__ = _CallablePackage
    module._function = function  # type: ignore[attr-defined]
