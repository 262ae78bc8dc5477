"""End OpenMP threads before a fork.

A forked child has none of its parent's threads, but GNU OpenMP waits for them there forever, both in torch's operators
and in the C++ kernels, which share the threads. Parent and child start new threads when they need them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

SOFT = 1  # omp_pause_soft: end the threads, keep the settings


@functools.cache
def _pause() -> Callable[[int], Any] | None:
    """Return ``omp_pause_resource_all`` of the OpenMP library that torch links to, or None."""
    try:
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (AttributeError, OSError):
        return None


def _end_threads() -> None:
    pause = _pause()
    if pause is not None:
        pause(SOFT)


if sys.platform == "linux":  # LLVM's OpenMP, on other systems, handles forks itself
    os.register_at_fork(before=_end_threads)
