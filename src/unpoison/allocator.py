"""Memory that was freed is used again, instead of being handed to the system and asked for anew.

Training and scanning make and drop the same few megabytes of activations at every step. glibc returns blocks of that
size to the system at once, and the next step pays for them with page faults; benchmarks/allocator.py measures how much.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, in malloc.h
_MIB = 1 << 20
# Whole data sets are larger than this and still go back to the system.
_KEPT = {_MMAP_THRESHOLD: 256 * _MIB, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * _MIB}


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed blocks of up to 256 MiB for this process.

    The command line does so at its start. A program that calls unpoison as a library decides for itself, since the
    setting holds for the whole process.

    Returns:
        Whether the C library takes such a setting; only glibc does. Without it everything runs as before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; on Windows, no such library
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _KEPT.items())
