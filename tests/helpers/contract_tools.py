"""What the contract suite measures with: errors and their allowances, recorded operators, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def error(got: Tensor, exact: Tensor) -> float:
    """The largest; inf for a NaN, which no allowance covers."""
    assert got.shape == exact.shape
    worst = (got.detach().cpu().double() - exact).abs().max().item()
    return worst if worst == worst else float("inf")


def rounding(magnitude: float | Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of ``magnitude``: what storing it in ``dtype`` may cost."""
    size = magnitude.abs().max().item() if isinstance(magnitude, Tensor) else magnitude
    return max(size, torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps / 2


def roundings(family: str, backend: str, dtype: torch.dtype) -> int:
    """How many factors of a gradient are rounded to ``dtype``: itself, and for relations of bfloat16 rows in C++ and
    CUDA the matrix that they are multiplied with, on a CPU where the machine multiplies bfloat16."""
    return 2 if family == "relation" and backend in ("cpu", "cuda") and dtype == torch.bfloat16 else 1


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """The same bits, NaN included."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Recorder(TorchDispatchMode):
    """Notes every call of an operator of this library, with its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fastkd":
            self.calls.append((func, args, result))
        else:
            self.others.add(func.overloadpacket.__name__)
        return result


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for each in x:
            yield from tensors_in(each)


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """Every tensor that autograd keeps."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        yield saved


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned(value: float) -> Iterator[None]:
    """Memory that torch hands out uninitialised holds ``value``, in every floating dtype, as far as it fits.

    Bytes, which are workspaces, are all ones: NaN, whatever a kernel takes them for.
    """

    def filled(make: Any) -> Any:
        def poison(*args: Any, **kwargs: Any) -> Any:
            x = make(*args, **kwargs)
            if x.is_floating_point() and x.device.type != "meta":
                x.fill_(value if value != value else min(value, torch.finfo(x.dtype).max))
            elif x.dtype == torch.uint8 and x.device.type != "meta":
                x.fill_(255)
            return x

        return poison

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


@contextmanager
def quick_interpreter(checks_overflow: bool = False) -> Iterator[None]:
    """Triton's interpreter in half the time, for thousands of small calls.

    Whenever a kernel calls a function it looks through all of ``triton.language`` once more, which the launch has just
    done (and for Triton's own functions once is enough); and it checks all integers for overflow, which the tests of
    single kernels (``test_*_triton.py``) leave it to do.
    """
    from triton.runtime import interpreter

    function, builder = interpreter.InterpretedFunction, interpreter.interpreter_builder
    as_it_is = function.__call__
    seen: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in seen:
            seen.add(module)
            return as_it_is(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    options = replace(builder.options, sanitize_overflow=checks_overflow)
    with mock.patch.object(function, "__call__", call), mock.patch.object(builder, "options", options):
        yield
