"""Temperatures that differ between student and teacher.

The operators take one temperature for both networks. At the student's, a teacher whose logits are multiplied by τ_S/τ_T
has softmax(E_T/τ_T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.numerics import compute_dtype, computes_fp64
from fastkd.ops.relation.reference import scaled_rows
from fastkd.ops.softmax_kl.reference import tempered
from fastkd.ops.torch_state import is_transformed, savable

Temperature = float | Tensor | tuple[float | Tensor, float | Tensor]
"""τ of both networks, or (τ_S, τ_T)."""


def temperature_ratio(student: float | Tensor, teacher: float | Tensor, device: torch.device) -> Tensor:
    """Return τ_S/τ_T, 0-d, in fp64 if the device computes in it.

    As tensors: in bf16 a quotient would change every logit by up to 0.4 %, and torch 2.11 compiles a graph per value of
    a divisor.
    """
    one = fp64_where_supported(device)
    return (one * student) / (one * teacher)


def fp64_where_supported(device: torch.device) -> Tensor:
    """Return 1, 0-d, in fp64 if the device computes in it, else in fp32."""
    return torch.ones((), dtype=torch.float64 if computes_fp64(device) else torch.float32, device=device)


def scaled(logits: Tensor, ratio: Tensor) -> Tensor:
    """Return ``logits * ratio``; logits that are not finite add nothing to the gradient of the ratio (0·inf is NaN)."""
    return tempered(logits, 1 / ratio) if ratio.requires_grad or is_transformed(ratio) else logits * ratio


def at_student_temperature(
    teacher: Tensor,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    backend: str,
    *like: Tensor,
) -> tuple[Tensor, str]:
    """Return the teacher's logits times τ_S/τ_T, and the backend for this call.

    The product has the dtype of the loss: fp64 if ``teacher`` or one of ``like``, the other inputs, is fp64, else fp32.
    """
    backend = differentiable(backend, student_temperature, teacher_temperature)
    ratio = temperature_ratio(student_temperature, teacher_temperature, teacher.device)
    return scaled(savable(teacher)[0].to(compute_dtype(teacher, *like)), ratio), backend


def rows_at_student_temperature(
    student: Tensor,
    teacher: Tensor,
    similarity: str,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, str]:
    """Return rows (B, R, K) whose dot products are the similarities, the teacher's times τ_S/τ_T, and the backend.

    The operator would divide the factor out of cosines again, so rows are scaled here, in the dtype of the loss.
    """
    backend = differentiable(backend, student_temperature, teacher_temperature)
    dtype = compute_dtype(student, teacher)
    ratio = temperature_ratio(student_temperature, teacher_temperature, teacher.device)
    x_s, x_t = (scaled_rows(x.to(dtype), similarity) for x in savable(student, teacher))
    return x_s, x_t * ratio.sqrt(), backend


def differentiable(backend: str, *temperatures: float | Tensor | None) -> str:
    """Return ``backend``, or "reference" if a temperature is learned, since kernels have no gradient for it.

    Raises:
        BackendUnavailable: another backend was requested by name.
    """
    given = [t for t in temperatures if t is not None]
    return "reference" if checks.differentiates_temperature(backend, *given) else backend
