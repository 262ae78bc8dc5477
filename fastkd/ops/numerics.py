"""Numerical rules shared by the plain-torch formulas: the dtype of the arithmetic, autocast, row norms."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastkd.ops.torch_state import constant_result

NORM_FLOOR = 1e-12
"""Norms are floored here, so that an all-zero row has cosine 0 with every row instead of NaN."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp64 if any tensor is fp64, else fp32 (also for fp16, bf16 and fp8 inputs)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


_fp64: dict[torch.device, bool] = {}


def computes_fp64(device: torch.device) -> bool:
    """Return whether ``device`` computes in fp64, as Apple's GPUs and some of Intel's do not; tried once per device."""
    return _computes_fp64(device.type, device.index)


@constant_result
def _computes_fp64(device_type: str, index: int | None) -> bool:
    """:func:`computes_fp64` on plain values: under torch.compile its answer is a constant of the compiled graph."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    tracing = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
    if any(torch._C._get_dispatch_mode(key) is not None for key in tracing):
        with _disable_current_modes():  # fake tensors would say yes, and a tracer write the trial down
            return _computes_fp64(device_type, index)
    if torch._C._len_torch_dispatch_stack():  # a dispatch mode answers for itself, not for the device
        return _try_fp64(device)
    if device not in _fp64:
        _fp64[device] = _try_fp64(device)
    return _fp64[device]


def _try_fp64(device: torch.device) -> bool:
    try:
        ones = torch.ones(2, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError):  # of fake tensors alone: this machine lacks the device
        return True
    try:
        (ones.double() * 2).sum()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # which of them is the device's choice
        return False
    return True


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast off: inside ``torch.autocast`` a matrix product of fp32 tensors would run in half precision."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


@constant_result  # torch 2.11 cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def normalise_rows(rows: Tensor) -> Tensor:
    """``rows / max(‖rows‖₂, 1e-12)`` over the last dimension.

    A row whose norm is below the floor gets no gradient. Its cosine is undefined, and the slope of the floored formula
    there, 1e12, would wreck the training of everything else.
    """
    square = (rows * rows).sum(-1, keepdim=True)
    small = square <= NORM_FLOOR**2
    norm = torch.where(small, torch.ones_like(square), square).sqrt()
    return torch.where(small, rows.detach() / NORM_FLOOR, rows / norm)
