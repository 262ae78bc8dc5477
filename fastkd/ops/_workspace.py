"""Scratch memory of the native kernels: a tensor, so that torch counts it, and no more of it than the limit allows."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

DEFAULT_MIB = 32.0


def limit() -> int:
    """The most bytes of scratch memory a kernel may take: ``FASTKD_WORKSPACE_MIB``, 32 MiB by default."""
    text = os.environ.get("FASTKD_WORKSPACE_MIB", "")
    try:
        value = float(text) if text else DEFAULT_MIB
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"FASTKD_WORKSPACE_MIB: expected a number of MiB above 0, got {text!r}")
    return int(value * 2**20)


def allocate(call: Any, backward: bool, like: Tensor) -> Tensor:
    """The workspace of a native call, on the device of ``like``; an error that names the least limit that would do."""
    size, minimum = call.workspace_bytes(backward)
    allowed = limit()
    if minimum > allowed:
        raise ValueError(
            f"FASTKD_WORKSPACE_MIB: a workspace of {allowed / 2**20:g} MiB does not hold one block of rows of this "
            f"call, set it to at least {minimum / 2**20:.2f}, or use backend='reference'"
        )
    return torch.empty(size, dtype=torch.uint8, device=like.device)
