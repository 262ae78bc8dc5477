"""What every Triton kernel here shares: constants, launch guards and shape helpers."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
"""log2(e): the hardware's exponential is 2^x."""


@triton.jit
def _interpreted() -> None:
    """Nothing; its type tells whether Triton interprets (TRITON_INTERPRET=1) or compiles."""


INTERPRETED: bool = not isinstance(_interpreted, triton.runtime.JITFunction)
"""True when kernels are interpreted on CPU tensors; Triton fixes this when a kernel is defined, once per process."""


@triton.jit
def float64(x):
    """A scalar argument ``x: tl.float64`` as a tensor (the interpreter hands it over as a Python float)."""
    return tl.full((), 0.0, tl.float64) + x


_TRUNCATES = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """``x`` in ``dtype``, rounded to nearest even (the interpreter's own cast from fp32 to bf16 truncates)."""
    if _TRUNCATES and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN keeps its bits
    return x.to(dtype)


def launching_on(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of ``x`` current, so that Triton launches there, on that device's current stream."""
    if INTERPRETED:
        import numpy  # which would warn of every −inf − (−inf) that a kernel computes and masks

        return numpy.errstate(all="ignore")
    return torch.cuda.device(x.device)


def capability(x: Tensor) -> int:
    """The major compute capability of the chip that ``x`` is on; 9 under the interpreter."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9


MOST_REGISTERS = {"maxnreg": 255}
"""Launch option of kernels that would spill otherwise under some version of Triton. Left to itself ptxas stops at the
register count with which one more program fits a multiprocessor, even if that is one or two registers too few; with a
stated limit it takes what the kernel needs."""


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉ for positive integers."""
    return -(-a // b)
