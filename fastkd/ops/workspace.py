"""Scratch memory of the kernels: tensors, so that torch counts it, and no more of it than the limit allows."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastkd._compile import constant_result

DEFAULT_MIB = 32.0

_thread = threading.local()  # .default is True where the environment does not count


@contextmanager
def default_limit() -> Iterator[None]:
    """Give this thread the default limit whatever the environment says: a backend's self-test is not a user's call."""
    _thread.default = True
    try:
        yield
    finally:
        _thread.default = False


@constant_result
def limit() -> int:
    """The most bytes of scratch memory a kernel may take: ``FASTKD_WORKSPACE_MIB``, 32 MiB by default."""
    text = "" if getattr(_thread, "default", False) else os.environ.get("FASTKD_WORKSPACE_MIB", "")
    try:
        value = float(text) if text else DEFAULT_MIB
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"FASTKD_WORKSPACE_MIB: expected a number of MiB above 0, got {text!r}")
    return int(value * 2**20)


def check(minimum: int) -> int:
    """The limit; an error that names the least limit that would do if it is below ``minimum``."""
    allowed = limit()
    if minimum > allowed:
        raise ValueError(
            f"FASTKD_WORKSPACE_MIB: a workspace of {allowed / 2**20:.3g} MiB does not hold one block of rows of this "
            f"call, set it to at least {math.ceil(minimum / 2**20 * 100) / 100}, or use backend='reference'"
        )
    return allowed


def allocate(call: Any, backward: bool, like: Tensor) -> Tensor:
    """The workspace of a native call, on the device of ``like``; an error that names the least limit that would do."""
    needed = [call.workspace_bytes(way) for way in (False, True)]
    check(max(least for _, least in needed))  # a forward must not promise what its backward cannot
    return torch.empty(needed[backward][0], dtype=torch.uint8, device=like.device)
