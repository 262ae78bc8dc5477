"""Call the Triton kernels of ``softmax_kl``."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def statistics_of(dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """Return the number of statistics per row and their dtype: each network's maximum, and Σ e^{x/τ} relative to it."""
    return 4, dtype


def forward(
    student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, temperature: float, backend: str
) -> None:
    """Fill ``loss`` and ``statistics``."""
    _kernels("forward").forward(student, teacher, loss, statistics, temperature)


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
    _kernels("backward").backward(grad_loss, student, teacher, statistics, grad_student, temperature)


def _kernels(name: str) -> Any:
    return importlib.import_module(f"fastkd.kernels.softmax_kl.{name}")
