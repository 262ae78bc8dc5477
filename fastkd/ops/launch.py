"""Helpers to launch kernels: operands of one dtype, device and stream, scratch memory, and the backends' modules."""

from __future__ import annotations

import functools
import importlib
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
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
    first = dtype = tensors[0].dtype
    mixed = False
    for x in tensors:
        if x.dtype != first:
            dtype, mixed = torch.promote_types(dtype, x.dtype), True
    return [x.to(dtype) for x in tensors] if mixed else list(tensors)


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors with repeats replaced by views: torch.compile cannot trace a Function given a tensor twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    seen: list[Tensor | None] = []
    for x in tensors:
        seen.append(x.view(x.shape) if x is not None and any(x is y for y in seen) else x)
    return seen


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype)``, without calling torch if that is ``x``."""
    return x if x.dtype == dtype else x.to(dtype)


def statistics_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of losses and row statistics: fp32, or fp64 if an input is fp64."""
    for x in tensors:  # a loop, as any(...) would double the time
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


@functools.cache
def family_module(family: str, module: str) -> Any:
    """Return the module ``fastkd.ops.<family>.<module>``, which calls the family's kernels; see ``Backend.module``."""
    return importlib.import_module(f"fastkd.ops.{family}.{module}")


@functools.cache
def triton_module(family: str, module: str) -> Any:
    """Return the module ``fastkd.kernels.<family>.<module>``, imported at the first call."""
    return importlib.import_module(f"fastkd.kernels.{family}.{module}")


@functools.cache
def native(backend: str) -> Any:
    """Return the extension module of the "cpu" or the "cuda" backend, loaded at the first call."""
    return importlib.import_module("fastkd._native").load(backend)


class launch_on:
    """Make the device of ``x`` current and return its stream handle, or on the CPU the number of threads to use.

    As a class, and without the object ``torch.cuda.device``, it takes a fraction of the time.
    """

    __slots__ = ("_before", "_index")

    def __init__(self, x: Tensor) -> None:
        self._index = x.get_device() if x.is_cuda else None

    def __enter__(self) -> int:
        if self._index is None:
            return torch.get_num_threads()
        self._before = torch.cuda._exchange_device(self._index)
        return torch._C._cuda_getCurrentRawStream(self._index)  # without a Stream object, as Triton does

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._index is not None:
            torch.cuda._maybe_exchange_device(self._before)


@functools.cache
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
    return int((_parsed_mib(text) if text else default_workspace_mib(device)) * 2**20)


@functools.lru_cache(16)
def _parsed_mib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"FASTKD_WORKSPACE_MIB: expected a number of MiB above 0, got {text!r}")
    return value


def check_workspace(minimum: int, limit: int) -> int:
    """Return the workspace limit; if it is below ``minimum`` bytes, raise a ``ValueError`` that states the minimum."""
    if minimum > limit:
        raise ValueError(
            f"FASTKD_WORKSPACE_MIB: a workspace of {limit / 2**20:.3g} MiB does not hold one block of rows of this "
            f"call; set it to at least {math.ceil(minimum / 2**20 * 100) / 100}, or use backend='reference'"
        )
    return limit


def allocate_workspace(call: Any, backward: bool, like: Tensor, limit: int) -> Tensor:
    """Return the workspace of a native call on the device of ``like``, as a tensor so that torch accounts for it."""
    (size, minimum), (backward_size, backward_minimum) = call.workspace_bytes(False), call.workspace_bytes(True)
    check_workspace(max(minimum, backward_minimum), limit)  # the forward already fails if its backward would
    return torch.empty(backward_size if backward else size, dtype=torch.uint8, device=like.device)
