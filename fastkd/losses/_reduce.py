"""Weight and reduce per-row losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd.ops.collectives import total
from fastkd.ops.numerics import compute_dtype
from fastkd.ops.torch_state import savable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ATTENTION_TEMPERATURE = 0.5
"""Temperature of the channel-attention weights."""


def channel_attention(teacher_rows: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return weights (B, C), C · softmax over channels of ⟨|F_T|⟩_N / 0.5, from (B, C, N); their mean is 1.

    With ``valid``, (B, 1, N) bool, the mean over N is over the valid pixels; the others hold 0.
    """
    size = teacher_rows.to(compute_dtype(teacher_rows)).abs()
    return attention_of(size.mean(-1) if valid is None else size.sum(-1) / valid.sum(-1).clamp_min(1))


def attention_of(strength: Tensor) -> Tensor:
    """Return the weights (..., C) of channels whose mean |F_T| is ``strength``."""
    return strength.shape[-1] * torch.softmax(strength / ATTENTION_TEMPERATURE, -1)


def reduce_rows(rows: Tensor, weight: Tensor | None, reduction: str, group: ProcessGroup | None = None) -> Tensor:
    """Return w·row ("none"), Σ w·row ("sum"), or Σ w·row / Σ w ("mean"); sums are over the rows of all ranks."""
    if weight is not None:
        weight = savable(weight)[0].to(rows.dtype)
        rows = rows * weight
    if reduction == "none":
        return rows
    if group is not None:
        whole = torch.ones_like(rows) if weight is None else weight
        parts = total(torch.stack([rows.sum(), whole.sum()]), group)
        return parts[0] if reduction == "sum" else parts[0] / parts[1]
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if weight is None else rows.sum() / weight.sum()
