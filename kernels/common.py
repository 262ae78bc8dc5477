"""Constants, device functions and launch helpers shared by all Triton kernels."""

from __future__ import annotations

import functools
from types import TracebackType

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.errors import BackendUnavailable

LOG2E = tl.constexpr(1.4426950408889634)
"""log2(e), as the hardware computes 2^x, not e^x."""


@triton.jit
def _interpreted() -> None:
    """Do nothing; the type of this function shows whether Triton interprets kernels (TRITON_INTERPRET=1)."""


INTERPRETED: bool = not isinstance(_interpreted, triton.runtime.JITFunction)
"""True if kernels are interpreted on CPU tensors. Triton decides this when a kernel is defined, once per process."""


@triton.jit
def float64(x):
    """Return a scalar argument ``x: tl.float64`` as a tensor (the interpreter passes a Python float)."""
    return tl.full((), 0.0, tl.float64) + x


CAST_TRUNCATES = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Cast ``x`` to ``dtype``, rounding to nearest even (the interpreter's cast from fp32 to bf16 truncates)."""
    if CAST_TRUNCATES and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN stays NaN
    return x.to(dtype)


@triton.jit
def exact_quotient(x, y):
    """Return x / y rounded to nearest: in fp32 ``/`` is approximate on a GPU, and x / x need not be 1."""
    if x.dtype.is_fp32():
        q = tl.div_rn(x, y)
    else:
        q = x / y
    return q


@triton.jit
def dot_add(x, y, acc, PRECISION: tl.constexpr):
    """Return acc + x y, added in fp32: tensor cores truncate sums, so each product starts from 0."""
    if PRECISION == "tf32x3":
        return tl.dot(x, y, acc, input_precision=PRECISION)  # Triton adds acc to the sum of the three products
    # Triton would make acc the accumulator of a product without a limit on imprecise sums.
    return acc + tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=32)


def is_capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is being captured on the current stream of the device of ``x``."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class launching_on:
    """Make the device of ``x`` current, so that Triton launches on that device's current stream.

    An error while a CUDA graph is captured becomes a `BackendUnavailable` with the fix: a dtype or layout that has not
    run before needs another kernel, which the driver refuses to load then.

    As a class, and without the object ``torch.cuda.device``, it takes a fraction of the time.
    """

    __slots__ = ("_before", "_quiet", "_x")

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def __enter__(self) -> None:
        if INTERPRETED:
            import numpy  # silence its warnings about −inf − (−inf), which the kernels mask

            self._quiet = numpy.errstate(all="ignore")
            self._quiet.__enter__()
        else:
            self._before = torch.cuda._exchange_device(self._x.get_device())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, torch.OutOfMemoryError) and is_capturing(self._x):
                raise BackendUnavailable(
                    f"triton on {self._x.device}: a kernel failed while a CUDA graph was captured: {error}; other "
                    "dtypes and layouts need other kernels, which cannot be loaded then: call the loss once on such "
                    "inputs, with its backward, before the capture"
                ) from error
        finally:
            if INTERPRETED:
                self._quiet.__exit__(kind, error, trace)
            else:
                torch.cuda._maybe_exchange_device(self._before)


def capability(x: Tensor) -> int:
    """Return the major compute capability of the device of ``x``, or 9 under the interpreter."""
    return _capability(x.get_device()) if x.is_cuda else 9


@functools.cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]
