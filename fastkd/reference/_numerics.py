"""Numerical rules shared by the plain-torch formulas: the dtype of the arithmetic, autocast, row norms."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastkd._compile import constant_result

NORM_FLOOR = 1e-12
"""Norms are floored here, so that an all-zero row has cosine 0 with every row instead of NaN."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp64 if any tensor is fp64, else fp32 (also for fp16, bf16 and fp8 inputs)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


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
