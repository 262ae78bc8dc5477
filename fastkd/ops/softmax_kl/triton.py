"""Call the Triton kernels of ``softmax_kl``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.launch import triton_module


def statistics_of(dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """Return the number of statistics per row and their dtype: each network's maximum, and Σ e^{x/τ} relative to it."""
    return 4, dtype


def forward(
    student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, temperature: float, backend: str
) -> None:
    """Fill ``loss`` and ``statistics``."""
    triton_module("softmax_kl", "forward").forward(student, teacher, loss, statistics, temperature)


def backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    grad_student: Tensor,
    temperature: float,
    backend: str,
) -> None:
    """Fill ``grad_student``."""
    triton_module("softmax_kl", "backward").backward(grad_loss, student, teacher, statistics, grad_student, temperature)
