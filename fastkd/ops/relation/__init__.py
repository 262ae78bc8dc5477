r"""``relation``: a per-row distance between the self-relation matrices of two sets of rows.

For rows :math:`X_S \in \mathbb{R}^{B \times R \times K_S}`, :math:`X_T \in \mathbb{R}^{B \times R \times K_T}` and the
matrices :math:`E_x = \operatorname{sim}(X_x, X_x)` of shape (R, R), one distance per row between :math:`E_S` and
:math:`E_T`. The formulas and their gradients are in ``csrc/common/relation.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.availability import compare
from fastkd.ops.backends import BACKENDS
from fastkd.ops.dispatch import backend_from_env, choose
from fastkd.ops.launch import converted, family_module, promoted, statistics_dtype
from fastkd.ops.numerics import has_fast_fp64
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
from fastkd.ops.relation.plan import Options, Sizes, backward_flops, choose_form, forward_flops
from fastkd.ops.relation.reference import relation as reference
from fastkd.ops.relation.reference import relation_mse_gram
from fastkd.ops.torch_state import savable


def relation(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    distance: str = "kl",
    temperature: float | Tensor = 0.1,
    negate: bool = False,
    cross: bool = False,
    keep: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return the per-row distances (B, R) of the relation matrices of ``student`` and ``teacher``.

    Args:
        student: (B, R, K_S), any floating dtype and strides. Only the student receives gradients.
        teacher: (B, R, K_T) on the same device; another floating dtype is promoted.
        similarity, distance, temperature, negate, cross: as in :func:`fastkd.ops.relation.reference.relation`.
        keep: let kernels store the relation matrices for the backward instead of computing them twice; meant for
            matrices that are small compared with the rows (channels). Without it, no R×R matrix is ever stored.
        backend: "auto", "reference", "cpu", "triton" or "cuda". All but the reference are differentiable once. The mean
            squared error of narrow rows is computed from K×K Gram matrices, which takes less time and memory than R×R
            tiles. "cpu" does so where K ≤ 2/5 of the columns, 1/4 where the widths differ, 1/3 in bfloat16; "auto" does
            so in plain torch, where "cpu" is not used and K ≤ 1/2 (if fp64 is needed, only where it is fast). A
            backend requested here or by ``FASTKD_BACKEND`` always computes the call itself, "reference" by the plain
            formula. "triton" and "cuda" do not support fp64.

    Returns:
        (B, R) in fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: mismatched shapes, dtypes or devices, or a teacher that requires grad.
        fastkd.BackendUnavailable: a backend requested by name cannot compute this here.
    """
    names = ("student", "teacher")
    for name, tensor in zip(names, (student, teacher), strict=True):
        checks.floating(name, tensor, (3,), "(B, R, K) with K ≥ 1", allow_empty=True)
        if tensor.shape[2] == 0:
            raise ValueError(f"{name}: expected shape (B, R, K) with K ≥ 1, got {tuple(tensor.shape)}")
    checks.same_size("(B, R)", names, (student.shape[:2], teacher.shape[:2]), "give the same rows to both")
    checks.same_device(student=student, teacher=teacher)
    checks.teacher("teacher", teacher)
    return relation_unchecked(
        student,
        teacher,
        similarity=similarity,
        distance=distance,
        temperature=checks.temperature(temperature),
        negate=negate,
        cross=cross,
        keep=keep,
        backend=backend,
    )


def relation_unchecked(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str,
    distance: str,
    temperature: float | Tensor,
    negate: bool = False,
    cross: bool = False,
    keep: bool = False,
    backend: str,
) -> Tensor:
    """Return :func:`relation` of checked arguments."""
    student, teacher = savable(student, teacher)

    def plain() -> Tensor:
        return reference(
            student,
            teacher,
            similarity=similarity,
            distance=distance,
            temperature=temperature,
            negate=negate,
            cross=cross,
        )

    if checks.differentiates_temperature(backend, temperature):
        return plain()
    chosen = choose("relation", backend, student, teacher)
    columns = student.shape[1] * (student.shape[0] if cross else 1)
    width = max(student.shape[2], teacher.shape[2])
    narrow = distance == "mse" and 2 * width <= columns
    replaceable = backend == "auto" and chosen != "cpu"  # the C++ kernels have their own Gram form
    if narrow and replaceable and backend_from_env() == "auto" and _has_torch_gram(student, teacher):
        return relation_mse_gram(student, teacher, similarity=similarity, cross=cross)
    if chosen == "reference":
        return plain()
    differentiated = torch.is_grad_enabled() and student.requires_grad
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    sizes = (student.shape[1], columns, student.shape[2], teacher.shape[2])
    form = choose_form(*sizes, dtype, distance, keep and not cross, chosen)
    if form == "stored" and not differentiated:  # no backward to read the matrices
        form = "streamed"
    tau = operator_argument(temperature)
    options = Options(similarity, distance, tau, negate, cross, form, chosen)
    if differentiated:
        return _Relation.apply(student, teacher, *options)
    return operator("relation_forward", tau)(student, teacher, *options)[0]


def _has_torch_gram(student: Tensor, teacher: Tensor) -> bool:
    """Return whether plain torch can use Gram matrices; unequal widths need fp64, which is slow on some GPUs."""
    return student.shape[2] == teacher.shape[2] or has_fast_fp64(student.device)


class _Relation(torch.autograd.Function):
    """Saves the inputs, a few statistics per row, and the matrices of the forms "stored" and "gram"."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        similarity: str,
        distance: str,
        temperature: float | Tensor,
        *others: Any,
    ) -> Tensor:
        options = (similarity, distance, temperature, *others)
        loss, statistics, stored = operator("relation_forward", temperature)(student, teacher, *options)
        ctx.save_for_backward(student, teacher, statistics, stored, *save_temperature(ctx, temperature))
        ctx.similarity, ctx.distance, ctx.others = similarity, distance, others
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        temperature = saved_temperature(ctx)
        options = (ctx.similarity, ctx.distance, temperature, *ctx.others)
        inputs = ctx.saved_tensors[:4]  # student, teacher, statistics, stored
        grad = gradient("relation", temperature, grad_loss, *inputs, *options)
        return (grad, *(None,) * (1 + len(options)))


# --- the operators ----------------------------------------------------------------------------------------------------


def _forward(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*arguments)
    loss, statistics, stored = _allocate(student, teacher, options)
    if loss.numel():
        used = _used_at_temperature(student, teacher, statistics, stored, options)
        if isinstance(options.temperature, Tensor):
            for whole, part in zip((statistics, stored), used[:2], strict=True):
                whole[len(part) :].zero_()  # an operator must write every element of its output
        student, teacher = promoted(student, teacher)
        _kernels(options.backend).forward(student, teacher, loss, *used)
    return loss, statistics, stored


def _backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, stored: Tensor, *arguments: Any
) -> Tensor:
    dtype = student.dtype
    grad_loss = converted(grad_loss, statistics_dtype(student, teacher))
    statistics, stored, options = _used_at_temperature(student, teacher, statistics, stored, Options(*arguments))
    student, teacher = promoted(student, teacher)
    grad_student = torch.empty_like(student)
    if grad_student.numel():
        _kernels(options.backend).backward(grad_loss, student, teacher, statistics, stored, grad_student, options)
    return converted(grad_student, dtype)


def _forward_fake(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(student, teacher, Options(*arguments))


def _backward_fake(grad_loss: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _allocate(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unfilled loss, statistics and stored matrices, large enough for any value of a tensor temperature."""
    if isinstance(options.temperature, Tensor):
        # High temperatures need no row maxima, so sizes depend on the temperature: allocate the larger of both.
        low, high = (_sizes(student, teacher, options._replace(temperature=t)) for t in (0.0, float("inf")))
        sizes = low._replace(planes=max(low.planes, high.planes), stored=_larger(low.stored, high.stored))
    else:
        sizes = _sizes(student, teacher, options)
    rows, device = student.shape[:2], student.device
    return (
        torch.empty(rows, dtype=statistics_dtype(student, teacher), device=device),
        torch.empty((sizes.planes, *rows), dtype=sizes.statistics_dtype, device=device),
        torch.empty((sizes.stored,), dtype=sizes.stored_dtype, device=device),
    )


def _sizes(student: Tensor, teacher: Tensor, options: Options) -> Sizes:
    return _kernels(options.backend).sizes(student, teacher, options)


def _larger(a: int, b: int) -> int:
    """Return the larger of two sizes; ``max`` would specialise a traced graph to the result of the comparison."""
    return torch.sym_max(a, b)  # type: ignore[return-value]


def _used_at_temperature(
    student: Tensor, teacher: Tensor, statistics: Tensor, stored: Tensor, options: Options
) -> tuple[Tensor, Tensor, Options]:
    """Return the parts of statistics and stored matrices used at this temperature, and the options with its value."""
    if not isinstance(options.temperature, Tensor):
        return statistics, stored, options
    options = options._replace(temperature=number_of(options.temperature))
    sizes = _sizes(student, teacher, options)
    return statistics[: sizes.planes], stored[: sizes.stored], options


def _kernels(backend: str) -> Any:
    """Return the module that calls the backend's kernels, which fill preallocated outputs."""
    return family_module("relation", BACKENDS[backend].module)


_OPTIONS = "str similarity, str distance, float temperature, bool negate, bool cross, str form, str backend"
register(
    "relation_forward",
    f"(Tensor student, Tensor teacher, {_OPTIONS}) -> (Tensor loss, Tensor statistics, Tensor stored)",
    Implementation(_forward, _forward_fake, forward_flops),
)
register(
    "relation_backward",
    f"(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, Tensor stored, {_OPTIONS}) -> Tensor",
    Implementation(_backward, _backward_fake, backward_flops),
)


def self_test(backend: str, device: torch.device) -> str | None:
    """Run ``backend`` on a few short rows on ``device``; return the error found, or None."""
    wave = torch.arange(2 * 7 * 9, dtype=torch.float64).reshape(2, 7, 9)  # (B, R, K)
    exact_student, exact_teacher = (wave.sin() * 3).requires_grad_(), wave.cos() * 2
    with torch.enable_grad():
        exact_loss = reference(exact_student, exact_teacher, temperature=0.5)
        (exact_grad,) = torch.autograd.grad(exact_loss.sum(), exact_student)
    student, teacher = (x.detach().to(device, torch.float32) for x in (exact_student, exact_teacher))
    for form in ("streamed", "stored"):
        options = Options("cosine", "kl", 0.5, False, False, form, backend)
        loss, statistics, stored = _forward(student, teacher, *options)
        grad = _backward(torch.ones_like(loss), student, teacher, statistics, stored, *options)
        reason = compare({"loss": (loss, exact_loss), "gradient": (grad, exact_grad)}, device)
        if reason is not None:
            return reason
    return None
