"""What every operator needs to launch a kernel: its operands made fit, its device and stream, the native modules."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastkd.ops import fork  # noqa: F401 - OpenMP threads across forks


def promoted(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype that they promote to; copies only what differs."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def operands(*tensors: Tensor) -> list[Tensor]:
    """One dtype and inner stride 1, which is all that softmax_kl's kernels ask of their inputs."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in promoted(*tensors)]


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, a view for each that came before: torch.compile traces no autograd.Function given a tensor twice."""
    seen: list[Tensor | None] = []
    for x in tensors:
        seen.append(x.view(x.shape) if x is not None and any(x is y for y in seen) else x)
    return seen


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of losses and row statistics: fp32, or fp64 if an input is fp64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


@functools.cache
def native(backend: str) -> Any:
    """The extension module of the "cpu" or the "cuda" backend, loaded at the first call."""
    return importlib.import_module("fastkd._native").load(backend)


@contextmanager
def launch_on(x: Tensor) -> Iterator[int]:
    """Make the device of ``x`` current; yield a native kernel's last argument: the stream's handle, or the threads."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield torch.cuda.current_stream(x.device).cuda_stream
    else:
        yield torch.get_num_threads()


def dtype_name(x: Tensor) -> str:
    """The dtype as the native kernels name it: "float32", "float16", "bfloat16" or "float64"."""
    return str(x.dtype).removeprefix("torch.")
