"""Every deliberate error, drawn as a tree.

A message says what was expected, what came, and what to do next; it fits on one line, because the command line
shows exactly that line. The exit code that the command line returns for each kind stands beside it.

UnpoisonError                  exit 3   the run failed
├── ConfigError  (ValueError)  exit 2   a setting is out of range or contradicts another
├── ShapeError   (ValueError)  exit 3   a tensor has the wrong shape, dtype or device
├── DataError                  exit 3   an image, manifest or data set cannot be read
│   └── NothingToScanError     exit 4   too few readable images for any answer
├── CheckpointError            exit 3   weights are refused, missing or do not fit
└── NoVerdictError             exit 4   a method ran but its assumptions do not hold
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NoVerdictError",
    "NothingToScanError",
    "ShapeError",
    "UnpoisonError",
]


class UnpoisonError(Exception):
    """Any failure that unpoison foresaw; `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 3


class ConfigError(UnpoisonError, ValueError):
    """A setting is out of range, contradicts another, or names something that does not exist."""

    exit_code: ClassVar[int] = 2


class ShapeError(UnpoisonError, ValueError):
    """A tensor has the wrong shape, dtype or device."""


class DataError(UnpoisonError):
    """An image, manifest or data set cannot be read."""


class NothingToScanError(DataError):
    """The source holds too few readable images for any answer."""

    exit_code: ClassVar[int] = 4


class CheckpointError(UnpoisonError):
    """Weights are refused, missing, or do not fit the network."""


class NoVerdictError(UnpoisonError):
    """A method ran, but its assumptions do not hold, so it has no answer."""

    exit_code: ClassVar[int] = 4
