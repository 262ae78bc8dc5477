"""Tools of the contract suite: errors and their bounds, recorded operator calls, poisoned memory."""

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
    """Return the largest error; inf for a NaN."""
    assert got.shape == exact.shape
    worst = (got.detach().cpu().double() - exact).abs().max().item()
    return worst if worst == worst else float("inf")


def rounding(magnitude: float | Tensor, dtype: torch.dtype) -> float:
    """Return half a unit in the last place of ``magnitude`` in ``dtype``."""
    size = magnitude.abs().max().item() if isinstance(magnitude, Tensor) else magnitude
    return max(size, torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps / 2


def roundings(family: str, backend: str, dtype: torch.dtype) -> int:
    """Return how many roundings to ``dtype`` a gradient undergoes.

    Two for relations of bfloat16 in the kernels, which also round the matrix that the rows are multiplied with (on a
    CPU with bfloat16 instructions); else one, of the result.
    """
    return 2 if family == "relation" and backend != "reference" and dtype == torch.bfloat16 else 1


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Assert that tensors have the same bits, NaN included."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Recorder(TorchDispatchMode):
    """Record the calls of fastkd's operators, with arguments and results, and the names of all other operators."""

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
    """Collect the tensors that autograd saves."""
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
    """Fill uninitialised tensors of every floating dtype with ``value``, clamped to its range.

    Byte tensors, which are workspaces, are filled with 255: NaN in every floating dtype.
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
    """Halve the time of Triton's interpreter for thousands of small calls.

    The interpreter patches all of ``triton.language`` whenever a kernel calls a function, although the launch has just
    done so; here it does so once for each of Triton's own modules. It also checks integers for overflow, which only the
    tests of single kernels (``ops/test_*_triton.py``) need.
    """
    from triton.runtime import interpreter

    function, builder = interpreter.InterpretedFunction, interpreter.interpreter_builder
    original_call = function.__call__
    seen: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in seen:
            seen.add(module)
            return original_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    options = replace(builder.options, sanitize_overflow=checks_overflow)
    with mock.patch.object(function, "__call__", call), mock.patch.object(builder, "options", options):
        yield
