"""Helpers to launch kernels: operands of one dtype, device and stream, scratch memory, and the backends' modules."""

from __future__ import annotations

import functools
import importlib
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastkd.ops import fork  # noqa: F401 - ends OpenMP threads before a fork
from fastkd.ops.torch_state import constant_result

CPU_WORKSPACE_MIB = 32.0
MAX_GPU_WORKSPACE_MIB = 512.0
"""A GPU's default is 1 % of its memory, at most this: kernels then run in few launches, each of which fills the GPU."""

_thread = threading.local()  # .default_limit is True where FASTKD_WORKSPACE_MIB is ignored


def promoted(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors converted to their common dtype; those that have it are not copied."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors with repeats replaced by views: torch.compile cannot trace a Function given a tensor twice."""
    seen: list[Tensor | None] = []
    for x in tensors:
        seen.append(x.view(x.shape) if x is not None and any(x is y for y in seen) else x)
    return seen


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of losses and row statistics: fp32, or fp64 if an input is fp64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


@functools.cache
def family_module(family: str, module: str) -> Any:
    """Return the module ``fastkd.ops.<family>.<module>``, which calls the family's kernels; see ``Backend.module``."""
    return importlib.import_module(f"fastkd.ops.{family}.{module}")


@functools.cache
def native(backend: str) -> Any:
    """Return the extension module of the "cpu" or the "cuda" backend, loaded at the first call."""
    return importlib.import_module("fastkd._native").load(backend)


@contextmanager
def launch_on(x: Tensor) -> Iterator[int]:
    """Make the device of ``x`` current and yield its stream handle, or on the CPU the number of threads to use."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield torch.cuda.current_stream(x.device).cuda_stream
    else:
        yield torch.get_num_threads()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the native modules' name of a dtype: "float32", "float16", "bfloat16" or "float64"."""
    return str(dtype).removeprefix("torch.")


# --- scratch memory ---------------------------------------------------------------------------------------------------


@contextmanager
def default_workspace_limit() -> Iterator[None]:
    """Ignore ``FASTKD_WORKSPACE_MIB`` in this thread: a self-test must not depend on the user's limit."""
    _thread.default_limit = True
    try:
        yield
    finally:
        _thread.default_limit = False


@functools.cache
def default_workspace_mib(device: torch.device) -> float:
    """Return the default of ``FASTKD_WORKSPACE_MIB`` for kernels on ``device``."""
    if device.type != "cuda":
        return CPU_WORKSPACE_MIB
    memory = torch.cuda.get_device_properties(device).total_memory / 2**20
    return min(MAX_GPU_WORKSPACE_MIB, memory / 100)


@constant_result
def workspace_limit(device: torch.device) -> int:
    """Return the maximum bytes of scratch memory of a kernel on ``device``: ``FASTKD_WORKSPACE_MIB`` or the default."""
    text = "" if getattr(_thread, "default_limit", False) else os.environ.get("FASTKD_WORKSPACE_MIB", "")
    try:
        value = float(text) if text else default_workspace_mib(device)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"FASTKD_WORKSPACE_MIB: expected a number of MiB above 0, got {text!r}")
    return int(value * 2**20)


def check_workspace(minimum: int, device: torch.device) -> int:
    """Return the workspace limit; if it is below ``minimum`` bytes, raise a ``ValueError`` that states the minimum."""
    limit = workspace_limit(device)
    if minimum > limit:
        raise ValueError(
            f"FASTKD_WORKSPACE_MIB: a workspace of {limit / 2**20:.3g} MiB does not hold one block of rows of this "
            f"call; set it to at least {math.ceil(minimum / 2**20 * 100) / 100}, or use backend='reference'"
        )
    return limit


def allocate_workspace(call: Any, backward: bool, like: Tensor) -> Tensor:
    """Return the workspace of a native call on the device of ``like``, as a tensor so that torch accounts for it."""
    needed = [call.workspace_bytes(direction) for direction in (False, True)]  # (bytes, minimum) each
    check_workspace(
        max(minimum for _, minimum in needed), like.device
    )  # the forward already fails if its backward would
    return torch.empty(needed[backward][0], dtype=torch.uint8, device=like.device)
