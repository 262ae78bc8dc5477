"""OpenMP threads across a fork.

A child has none of its parent's threads, but GNU's OpenMP still believes in them there and waits for them forever: in
torch's own operators as in the C++ kernels, which share its threads. So they are ended before a fork; parent and child
start new ones when they need some.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

SOFT = 1  # OpenMP's omp_pause_soft: threads end, settings stay


@functools.cache
def _pause() -> Callable[[int], Any] | None:
    """Return ``omp_pause_resource_all`` of the OpenMP that torch is linked to, or None."""
    try:
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (AttributeError, OSError):
        return None


def _end_threads() -> None:
    pause = _pause()
    if pause is not None:
        pause(SOFT)


if sys.platform == "linux":  # LLVM's OpenMP, of other systems, sees to forks itself
    os.register_at_fork(before=_end_threads)
