r"""``softmax_kl``: the KL divergence between the softmaxes of matching rows of two arrays.

For student and teacher logits :math:`s, t \in \mathbb{R}^{B \times R \times N}` and a temperature τ, per row

.. math:: \mathrm{KL}(\operatorname{softmax}(t/\tau) \,\|\, \operatorname{softmax}(s/\tau)), \qquad
          \partial / \partial s = (p_s - p_t) / \tau .

As in the other families, this file contains the function, its autograd and its two operators, in this order. The
backend is an argument of the operators, so that there is one schema, fake implementation and autograd for all, and a
graph captured by torch.compile shows which backend it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.availability import compare
from fastkd.ops.backends import BACKENDS
from fastkd.ops.dispatch import choose
from fastkd.ops.launch import converted, family_module, promoted, statistics_dtype
from fastkd.ops.registration import (
    Implementation,
    gradient,
    number_of,
    operator,
    operator_argument,
    register,
    save_temperature,
    saved_temperature,
)
from fastkd.ops.softmax_kl.reference import softmax_kl as reference
from fastkd.ops.torch_state import savable


def softmax_kl(student: Tensor, teacher: Tensor, *, temperature: float | Tensor, backend: str = "auto") -> Tensor:
    """Return per-row KL(softmax(teacher/τ) ‖ softmax(student/τ)), without the factor τ².

    Args:
        student: (B, R, N) logits, any floating dtype and strides. Only the student receives gradients.
        teacher: (B, R, N) logits on the same device; another floating dtype is promoted.
        temperature: τ > 0. Its gradient is computed by the reference only.
        backend: "auto", "reference", "cpu", "triton" or "cuda". All but the reference are differentiable once.

    Returns:
        (B, R) in fp32 (fp64 if an input is fp64). 0·log 0 counts as 0, also for logits of −inf; NaN and Inf propagate.

    Raises:
        ValueError, TypeError: mismatched shapes, dtypes or devices, an empty row, τ ≤ 0, a teacher that requires grad.
        fastkd.BackendUnavailable: a backend requested by name cannot compute this here.
    """
    names = ("student", "teacher")
    for name, tensor in zip(names, (student, teacher), strict=True):
        checks.floating(name, tensor, (3,), "(B, R, N)", allow_empty=True)
    checks.same_size(
        "shapes",
        names,
        (student.shape, teacher.shape),
        "expected the same shape; reshape both to (batch, rows, columns)",
    )
    if student.shape[2] == 0:
        raise ValueError(f"student: a softmax over an empty row is undefined, got shape {tuple(student.shape)}")
    checks.same_device(student=student, teacher=teacher)
    checks.teacher("teacher", teacher)
    return softmax_kl_unchecked(student, teacher, checks.temperature(temperature), backend)


def softmax_kl_unchecked(student: Tensor, teacher: Tensor, temperature: float | Tensor, backend: str) -> Tensor:
    """Return :func:`softmax_kl` of checked arguments."""
    student, teacher = savable(student, teacher)
    if checks.differentiates_temperature(backend, temperature):
        return reference(student, teacher, temperature)
    chosen = choose("softmax_kl", backend, student, teacher)
    if chosen == "reference":
        return reference(student, teacher, temperature)
    tau = operator_argument(temperature)
    if torch.is_grad_enabled() and student.requires_grad:
        return _SoftmaxKL.apply(student, teacher, tau, chosen)
    return operator("softmax_kl_forward", tau)(student, teacher, tau, chosen)[0]


class _SoftmaxKL(torch.autograd.Function):
    """Saves the inputs and a few statistics per row, from which the backward recomputes the softmaxes."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float | Tensor, backend: str) -> Tensor:
        loss, statistics = operator("softmax_kl_forward", temperature)(student, teacher, temperature, backend)
        ctx.save_for_backward(student, teacher, statistics, *save_temperature(ctx, temperature))
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        temperature = saved_temperature(ctx)
        inputs = ctx.saved_tensors[:3]  # student, teacher, statistics
        grad = gradient("softmax_kl", temperature, grad_loss, *inputs, temperature, ctx.backend)
        return grad, None, None, None


# --- the operators ----------------------------------------------------------------------------------------------------


def _forward(student: Tensor, teacher: Tensor, temperature: float | Tensor, backend: str) -> tuple[Tensor, Tensor]:
    kernels = _kernels(backend)
    loss, statistics = _allocate(student, teacher, kernels)
    if loss.numel():
        student, teacher = _operands(student, teacher)
        kernels.forward(student, teacher, loss, statistics, number_of(temperature), backend)
    return loss, statistics


def _backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float | Tensor, backend: str
) -> Tensor:
    dtype = student.dtype
    grad_loss = converted(grad_loss, statistics_dtype(student, teacher))
    student, teacher = _operands(student, teacher)
    grad_student = student.new_empty(*student.shape)  # contiguous
    if grad_student.numel():
        tau = number_of(temperature)
        _kernels(backend).backward(grad_loss, student, teacher, statistics, grad_student, tau, backend)
    return converted(grad_student, dtype)


def _forward_fake(student: Tensor, teacher: Tensor, temperature: float | Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _allocate(student, teacher, _kernels(backend))


def _backward_fake(grad_loss: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _flops(*_: Any) -> int:
    """Return 0: there are no matrix products."""
    return 0


def _allocate(student: Tensor, teacher: Tensor, kernels: Any) -> tuple[Tensor, Tensor]:
    """Return the unfilled loss and statistics."""
    shape, dtype, device = student.shape[:2], statistics_dtype(student, teacher), student.device
    planes, of_statistics = kernels.statistics_of(dtype)
    return (
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty((planes, *shape), dtype=of_statistics, device=device),
    )


def _operands(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in their common dtype, with stride 1 along the rows."""
    if student.dtype != teacher.dtype:
        student, teacher = promoted(student, teacher)
    if student.stride(2) != 1:
        student = student.contiguous()
    if teacher.stride(2) != 1:
        teacher = teacher.contiguous()
    return student, teacher


def _kernels(backend: str) -> Any:
    """Return the module that calls the backend's kernels, which fill preallocated outputs."""
    return family_module("softmax_kl", BACKENDS[backend].module)


register(
    "softmax_kl_forward",
    "(Tensor student, Tensor teacher, float temperature, str backend) -> (Tensor loss, Tensor statistics)",
    Implementation(_forward, _forward_fake, _flops),
)
register(
    "softmax_kl_backward",
    "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, float temperature, str backend) -> Tensor",
    Implementation(_backward, _backward_fake, _flops),
)


def self_test(backend: str, device: torch.device) -> str | None:
    """Run ``backend`` on a few short rows on ``device``; return the error found, or None."""
    wave = torch.arange(2 * 3 * 37, dtype=torch.float64).reshape(2, 3, 37)  # (B, R, N)
    exact_student, exact_teacher = wave.sin() * 3, wave.cos() * 2
    student, teacher = (x.to(device, torch.float32) for x in (exact_student, exact_teacher))
    loss, statistics = _forward(student, teacher, 2.0, backend)
    grad = _backward(torch.ones_like(loss), student, teacher, statistics, 2.0, backend)
    exact_loss = reference(exact_student, exact_teacher, 2.0)
    exact_grad = ((exact_student / 2).softmax(-1) - (exact_teacher / 2).softmax(-1)) / 2
    return compare({"loss": (loss, exact_loss), "gradient": (grad, exact_grad)}, device)
