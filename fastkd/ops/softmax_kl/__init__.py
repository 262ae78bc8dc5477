r"""``softmax_kl``: the KL divergence between the softmaxes of matching rows of two arrays.

For student and teacher logits :math:`s, t \in \mathbb{R}^{B \times R \times N}` and a temperature τ, per row

.. math:: \mathrm{KL}(\operatorname{softmax}(t/\tau) \,\|\, \operatorname{softmax}(s/\tau)), \qquad
          \partial / \partial s = (p_s - p_t) / \tau .

The file reads downwards: the function, its autograd, its two operators, and what each backend is called with. Every
other family follows it. One operator carries the backend as a string rather than one operator per backend: its schema,
fake and autograd then exist once, and a graph captured by torch.compile still says which backend it runs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastkd._compile import number_of, operator_argument
from fastkd.ops import flops
from fastkd.ops.dispatch import choose
from fastkd.ops.launch import dtype_name, launch_on, native, operands, statistics_dtype
from fastkd.ops.registration import Work, operator, register, saved
from fastkd.ops.softmax_kl.reference import softmax_kl as reference
from fastkd.ops.torch_state import check_dense, check_temperature, refuse_tangent, savable


def softmax_kl(student: Tensor, teacher: Tensor, *, temperature: float | Tensor, backend: str = "auto") -> Tensor:
    """Per-row KL(softmax(teacher/τ) ‖ softmax(student/τ)), without the factor τ².

    Args:
        student: (B, R, N) logits, floating, any strides. Gradients flow to it alone.
        teacher: (B, R, N) logits on the same device; another floating dtype is promoted.
        temperature: τ > 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda". All but the reference are differentiable once.

    Returns:
        (B, R) in fp32 (fp64 if an input is fp64). 0·log 0 counts as 0, also for logits of −inf; NaN and Inf propagate.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that don't fit, an empty row, τ ≤ 0, a teacher requiring grad.
        fastkd.BackendUnavailable: the backend asked for by name cannot compute this here.
    """
    _check(student, teacher, temperature)
    student, teacher = savable(student, teacher)
    chosen = choose("softmax_kl", backend, student, teacher)
    if chosen == "reference":
        return reference(student, teacher, temperature)
    given = operator_argument(temperature)
    if torch.is_grad_enabled() and student.requires_grad:
        return _SoftmaxKL.apply(student, teacher, given, chosen)
    return operator("softmax_kl_forward", given)(student, teacher, given, chosen)[0]


def _check(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> None:
    for name, given in (("student", student), ("teacher", teacher)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor (B, R, N), got {type(given).__name__}")
        check_dense(name, given)
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher: expected the same shape (B, R, N), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; reshape both to (batch, rows, columns)"
        )
    if student.shape[2] == 0:
        raise ValueError(f"student: a softmax over an empty row is undefined, got shape {tuple(student.shape)}")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise TypeError(f"student and teacher: expected floating dtypes, got {student.dtype} and {teacher.dtype}")
    if student.device != teacher.device:
        raise ValueError(
            f"teacher: expected on the student's device {student.device}, got {teacher.device}; use teacher.to(...)"
        )
    check_temperature(temperature)
    if torch.is_grad_enabled() and teacher.requires_grad:
        raise ValueError("teacher: gradients flow to the student only, got a teacher that requires grad; detach() it")


class _SoftmaxKL(torch.autograd.Function):
    """Saves the inputs and a few numbers per row; the gradient is recomputed from them."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float | Tensor, backend: str) -> Tensor:
        loss, statistics = operator("softmax_kl_forward", temperature)(student, teacher, temperature, backend)
        tensors, ctx.temperature = saved(temperature)
        ctx.save_for_backward(student, teacher, statistics, *tensors)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_tangent("softmax_kl", ctx.backend, grad_loss)
        student, teacher, statistics, *tensors = ctx.saved_tensors
        temperature = tensors[0] if tensors else ctx.temperature
        arguments = (grad_loss, student, teacher, statistics, temperature, ctx.backend)
        if torch.is_grad_enabled():  # create_graph=True: someone may differentiate the gradient
            return _SoftmaxKLGradient.apply(*arguments), None, None, None
        return operator("softmax_kl_backward", temperature)(*arguments), None, None, None


class _SoftmaxKLGradient(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it again ends in a clear error, not in zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_loss: Tensor,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        temperature: float | Tensor,
        backend: str,
    ) -> Tensor:
        ctx.backend = backend
        arguments = (grad_loss, student, teacher, statistics, temperature, backend)
        return operator("softmax_kl_backward", temperature)(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f'softmax_kl: the {ctx.backend} backend is differentiable once; for double backward use backend="reference"'
        )


# --- the operators ----------------------------------------------------------------------------------------------------


def _forward(student: Tensor, teacher: Tensor, temperature: float | Tensor, backend: str) -> tuple[Tensor, Tensor]:
    loss, statistics = _forward_fake(student, teacher, temperature, backend)
    if loss.numel():
        student, teacher = operands(student, teacher)
        _kernels(backend).forward(student, teacher, loss, statistics, number_of(temperature))
    return loss, statistics


def _backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float | Tensor, backend: str
) -> Tensor:
    dtype = student.dtype
    grad_loss = grad_loss.to(statistics_dtype(student, teacher))
    student, teacher = operands(student, teacher)
    grad_student = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if grad_student.numel():
        tau = number_of(temperature)
        _kernels(backend).backward(grad_loss, student, teacher, statistics, grad_student, tau)
    return grad_student.to(dtype)


def _forward_fake(student: Tensor, teacher: Tensor, temperature: float | Tensor, backend: str) -> tuple[Tensor, Tensor]:
    shape, dtype = student.shape[:2], statistics_dtype(student, teacher)
    loss = torch.empty(shape, dtype=dtype, device=student.device)
    # What the backward needs of each row's log Σ e^{x/τ}. Triton keeps the maximum and the sum relative to it. The C++
    # and CUDA kernels keep one float64: in fp32 it would be wrong by 5e-4 at logits of 1e4, and the gradient with it.
    parts, dtype = (4, dtype) if backend == "triton" else (2, torch.float64)
    return loss, torch.empty((parts, *shape), dtype=dtype, device=student.device)


def _backward_fake(grad_loss: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


register(
    "softmax_kl_forward",
    "(Tensor student, Tensor teacher, float temperature, str backend) -> (Tensor loss, Tensor statistics)",
    Work(_forward, _forward_fake, flops.softmax_kl),
)
register(
    "softmax_kl_backward",
    "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, float temperature, str backend) -> Tensor",
    Work(_backward, _backward_fake, flops.softmax_kl),
)


# --- the backends -----------------------------------------------------------------------------------------------------


def _kernels(backend: str) -> Any:
    """Return what computes: an object with ``forward`` and ``backward``, filling the outputs that it is given."""
    if backend != "triton":
        return _Native(backend)
    passes = {name: importlib.import_module(f"fastkd.kernels.softmax_kl.{name}") for name in ("forward", "backward")}
    return SimpleNamespace(**{name: getattr(module, name) for name, module in passes.items()})


@dataclass(frozen=True)
class _Native:
    """``csrc/cpu`` or ``csrc/cuda``: raw pointers and element strides, so that one build serves every torch."""

    backend: str

    def forward(self, student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, temperature: float) -> None:
        with launch_on(student) as extra:
            native(self.backend).softmax_kl_forward(
                student.data_ptr(),
                teacher.data_ptr(),
                loss.data_ptr(),
                statistics[0].data_ptr(),
                statistics[1].data_ptr(),
                *student.shape,
                student.stride()[:2],
                teacher.stride()[:2],
                dtype_name(student),
                temperature,
                extra,
            )

    def backward(
        self,
        grad_loss: Tensor,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        grad_student: Tensor,
        temperature: float | Tensor,
    ) -> None:
        with launch_on(student) as extra:
            native(self.backend).softmax_kl_backward(
                grad_loss.data_ptr(),
                grad_loss.stride(),
                student.data_ptr(),
                teacher.data_ptr(),
                statistics[0].data_ptr(),
                statistics[1].data_ptr(),
                grad_student.data_ptr(),
                *student.shape,
                student.stride()[:2],
                teacher.stride()[:2],
                dtype_name(student),
                temperature,
                extra,
            )


def self_test(backend: str, device: torch.device) -> str | None:
    """Run ``backend`` once on a few short rows on ``device``; return what is wrong with it, or None."""
    wave = torch.arange(2 * 3 * 37, dtype=torch.float64).reshape(2, 3, 37)
    exact_student, exact_teacher = wave.sin() * 3, wave.cos() * 2
    student, teacher = (x.to(device, torch.float32) for x in (exact_student, exact_teacher))
    loss, statistics = _forward(student, teacher, 2.0, backend)
    grad = _backward(torch.ones_like(loss), student, teacher, statistics, 2.0, backend)
    exact_grad = ((exact_student / 2).softmax(-1) - (exact_teacher / 2).softmax(-1)) / 2
    for name, got, exact in (
        ("loss", loss, reference(exact_student, exact_teacher, 2.0)),
        ("gradient", grad, exact_grad),
    ):
        error = (got.cpu().double() - exact).abs().max().item()
        if not error < 1e-5:
            return f"its self-test on {device} got a wrong {name} (off by {error:.1e})"
    return None
