"""Numerical rules of the plain-torch formulas: compute dtype, autocast, row norms."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastkd.ops.torch_state import constant_result

NORM_FLOOR = 1e-12
"""Lower bound of row norms, so that an all-zero row has cosine 0 with every row instead of NaN."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return fp64 if any tensor is fp64, else fp32 (also for fp16, bf16 and fp8 inputs)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def fp64_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in fp64 if one of them is, else unchanged.

    For what is computed from one network alone, such as weights and means, which the other may require in fp64.
    """
    for t in tensors:  # a loop, as any(...) would double the time
        if t.dtype != tensors[0].dtype:
            return tuple(x.to(torch.float64) for x in tensors) if compute_dtype(*tensors) == torch.float64 else tensors
    return tensors


_fp64: dict[torch.device, bool] = {}
FAST_FP64_CAPABILITIES = ((8, 0), (9, 0), (10, 0))


def computes_fp64(device: torch.device) -> bool:
    """Return whether ``device`` computes in fp64; Apple's GPUs and some of Intel's do not. Tested once per device."""
    return _computes_fp64(device.type, device.index)


def has_fast_fp64(device: torch.device) -> bool:
    """Return whether ``device`` computes in fp64, and is not an NVIDIA GPU with 1/32 or 1/64 of its fp32 rate.

    Of the supported NVIDIA GPUs, the A100, H100 and B200 have half of the rate.
    """
    return _has_fast_fp64(device.type, device.index) and computes_fp64(device)


@constant_result
def _has_fast_fp64(device_type: str, index: int | None) -> bool:
    if device_type == "cuda" and torch.cuda.is_available():  # else fake tensors
        return torch.cuda.get_device_capability(index) in FAST_FP64_CAPABILITIES
    return True


@constant_result
def _computes_fp64(device_type: str, index: int | None) -> bool:
    """Implement :func:`computes_fp64`; under torch.compile the result is a constant of the graph."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    tracing = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
    if any(torch._C._get_dispatch_mode(key) is not None for key in tracing):
        with _disable_current_modes():  # fake tensors always support fp64, and a tracer would record the test
            return _computes_fp64(device_type, index)
    if torch._C._len_torch_dispatch_stack():  # the result depends on the dispatch mode too: do not cache it
        return _try_fp64(device)
    if device not in _fp64:
        _fp64[device] = _try_fp64(device)
    return _fp64[device]


def _try_fp64(device: torch.device) -> bool:
    try:
        ones = torch.ones(2, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError):  # fake tensors on a device that this machine lacks
        return True
    try:
        (ones.double() * 2).sum()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # which one depends on the device
        return False
    return True


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast, which would run matrix products of fp32 tensors in half precision."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


@constant_result  # torch 2.11 cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def normalise_rows(rows: Tensor) -> Tensor:
    """Return ``rows / max(‖rows‖₂, 1e-12)`` over the last dimension.

    A row with a smaller norm gets no gradient: its cosine is undefined, and the formula's slope of 1e12 there would
    make training diverge.
    """
    square = (rows * rows).sum(-1, keepdim=True)
    small = square <= NORM_FLOOR**2
    norm = torch.where(small, torch.ones_like(square), square).sqrt()
    return torch.where(small, rows.detach() / NORM_FLOOR, rows / norm)
