"""Weight and reduce per-row losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.numerics import compute_dtype
from fastkd.ops.torch_state import savable

ATTENTION_TEMPERATURE = 0.5
"""Temperature of the channel-attention weights."""


def channel_attention(teacher_rows: Tensor) -> Tensor:
    """Return weights (B, C), C · softmax over channels of ⟨|F_T|⟩_N / 0.5, from (B, C, N); their mean is 1."""
    strength = teacher_rows.to(compute_dtype(teacher_rows)).abs().mean(-1)
    return strength.shape[-1] * torch.softmax(strength / ATTENTION_TEMPERATURE, -1)


def reduce_rows(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Return w·row ("none"), Σ w·row ("sum"), or Σ w·row / Σ w ("mean")."""
    if weight is not None:
        weight = savable(weight)[0].to(rows.dtype)
        rows = rows * weight
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if weight is None else rows.sum() / weight.sum()
