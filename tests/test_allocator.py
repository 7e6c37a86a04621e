"""The setting of the C library that keeps freed memory."""

from __future__ import annotations

import ctypes
import platform

import pytest

from unpoison.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_glibc_takes_the_setting_as_often_as_it_is_asked() -> None:
    assert keep_freed_memory() and keep_freed_memory()


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_without_the_setting_nothing_happens(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def absent(name: None) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert not keep_freed_memory()
