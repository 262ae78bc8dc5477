r"""``relation``: a distance, row by row, between the self-relation matrices of two row sets.

For rows :math:`X_S \in \mathbb{R}^{B \times R \times K_S}`, :math:`X_T \in \mathbb{R}^{B \times R \times K_T}` and the
matrices :math:`E_x = \operatorname{sim}(X_x, X_x)` of shape (R, R), one number per row of :math:`E_S` against
:math:`E_T`. The formulas and their gradients are in ``csrc/common/relation.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._compile import operator_argument
from fastkd.ops import flops
from fastkd.ops.dispatch import backend_from_env, choose
from fastkd.ops.numerics import computes_fp64
from fastkd.ops.registration import Work, operator, register, saved
from fastkd.ops.relation.native import Options, backward, forward, outputs
from fastkd.ops.relation.plan import choose_form
from fastkd.ops.relation.reference import relation as reference
from fastkd.ops.relation.reference import relation_mse_gram
from fastkd.ops.torch_state import check_dense, check_temperature, refuse_tangent, savable


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
    """Per-row distances (B, R) of the relation matrices of ``student`` (B, R, K_S) and ``teacher`` (B, R, K_T).

    Args:
        student: (B, R, K_S), floating, any strides. Gradients flow to it alone.
        teacher: (B, R, K_T) on the same device; another floating dtype is promoted.
        similarity, distance, temperature, negate, cross: as in :func:`fastkd.ops.relation.reference.relation`.
        keep: the relation matrices are small beside the rows (channels), so kernels may keep them for the backward
            instead of computing them twice. Without it no R×R matrix is ever held.
        backend: "auto", "reference", "cpu", "triton" or "cuda". All but the reference are differentiable once. The mean
            squared error of narrow rows is computed from K×K Gram matrices, which costs less time and memory than R×R
            tiles: on a CPU where K ≤ 2/5 of the columns, 1/4 where the widths differ, 1/3 in bfloat16, on a GPU in
            plain torch, under "auto" alone, where K ≤ 1/2 (and the device has fp64, if the widths differ); a backend
            asked for, here or by ``FASTKD_BACKEND``, computes all itself, "reference" always by the plain formula.
            "triton" and "cuda" take no fp64.

    Returns:
        (B, R) in fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that don't fit, a teacher requiring grad.
        fastkd.BackendUnavailable: the backend asked for by name cannot compute this here.
    """
    _check(student, teacher, temperature)
    student, teacher = savable(student, teacher)
    chosen = choose("relation", backend, student, teacher)
    columns = student.shape[1] * (student.shape[0] if cross else 1)
    width = max(student.shape[2], teacher.shape[2])
    narrow = distance == "mse" and 2 * width <= columns
    free = backend == "auto" and chosen != "cpu"
    if narrow and free and backend_from_env("relation") == "auto" and _gram_possible(student, teacher):
        return relation_mse_gram(student, teacher, similarity=similarity, cross=cross)
    if chosen == "reference":
        return reference(
            student,
            teacher,
            similarity=similarity,
            distance=distance,
            temperature=temperature,
            negate=negate,
            cross=cross,
        )
    differentiated = torch.is_grad_enabled() and student.requires_grad
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    sizes = (student.shape[1], columns, student.shape[2], teacher.shape[2])
    form = choose_form(*sizes, dtype, distance, keep and not cross, chosen)
    if form == "stored" and not differentiated:  # for a backward that will not come
        form = "streamed"
    given = operator_argument(temperature)
    options = (similarity, distance, given, negate, cross, form, chosen)
    if differentiated:
        return _Relation.apply(student, teacher, *options)
    return operator("relation_forward", given)(student, teacher, *options)[0]


def _gram_possible(student: Tensor, teacher: Tensor) -> bool:
    """Return whether plain torch has the Gram form: unequal widths are combined in fp64."""
    return student.shape[2] == teacher.shape[2] or computes_fp64(student.device)


def _check(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> None:
    for name, given in (("student", student), ("teacher", teacher)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor (B, R, K), got {type(given).__name__}")
        check_dense(name, given)
        if not given.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {given.dtype}")
        if given.dim() != 3 or given.shape[2] == 0:
            raise ValueError(f"{name}: expected a shape (B, R, K) with K ≥ 1, got {tuple(given.shape)}")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student and teacher: expected the same (B, R), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher: expected on the student's device {student.device}, got {teacher.device}; use teacher.to(...)"
        )
    check_temperature(temperature)
    if torch.is_grad_enabled() and teacher.requires_grad:
        raise ValueError("teacher: gradients flow to the student only, got a teacher that requires grad; detach() it")


class _Relation(torch.autograd.Function):
    """Saves the inputs, a few numbers per row, and the small matrices of the form."""

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
        tensors, ctx.temperature = saved(temperature)
        ctx.save_for_backward(student, teacher, statistics, stored, *tensors)
        ctx.similarity, ctx.distance, ctx.others = similarity, distance, others
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_tangent("relation", ctx.others[-1], grad_loss)
        student, teacher, statistics, stored, *tensors = ctx.saved_tensors
        temperature = tensors[0] if tensors else ctx.temperature
        options = (ctx.similarity, ctx.distance, temperature, *ctx.others)
        arguments = (grad_loss, student, teacher, statistics, stored, *options)
        if torch.is_grad_enabled():  # create_graph=True: someone may differentiate the gradient
            grad = _RelationGradient.apply(temperature, *arguments)
        else:
            grad = operator("relation_backward", temperature)(*arguments)
        return (grad, *(None,) * (1 + len(options)))


class _RelationGradient(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it again ends in a clear error, not in zeros."""

    @staticmethod
    def forward(ctx: Any, temperature: float | Tensor, *arguments: Any) -> Tensor:
        ctx.backend = arguments[-1]
        return operator("relation_backward", temperature)(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f'relation: the {ctx.backend} backend is differentiable once; for double backward use backend="reference"'
        )


# --- the operators ----------------------------------------------------------------------------------------------------


def _forward(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward(student, teacher, Options(*options))


def _backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, stored: Tensor, *options: Any
) -> Tensor:
    return backward(grad_loss, student, teacher, statistics, stored, Options(*options))


def _forward_fake(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(student, teacher, Options(*options))


def _backward_fake(grad_loss: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


_OPTIONS = "str similarity, str distance, float temperature, bool negate, bool cross, str form, str backend"
register(
    "relation_forward",
    f"(Tensor student, Tensor teacher, {_OPTIONS}) -> (Tensor loss, Tensor statistics, Tensor stored)",
    Work(_forward, _forward_fake, flops.relation_forward),
)
register(
    "relation_backward",
    f"(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, Tensor stored, {_OPTIONS}) -> Tensor",
    Work(_backward, _backward_fake, flops.relation_backward),
)


def self_test(backend: str, device: torch.device) -> str | None:
    """Run ``backend`` once on a few short rows on ``device``; return what is wrong with it, or None."""
    wave = torch.arange(2 * 7 * 9, dtype=torch.float64).reshape(2, 7, 9)
    exact_student, exact_teacher = (wave.sin() * 3).requires_grad_(), wave.cos() * 2
    with torch.enable_grad():
        exact = reference(exact_student, exact_teacher, temperature=0.5)
        (exact_grad,) = torch.autograd.grad(exact.sum(), exact_student)
    student, teacher = (x.detach().to(device, torch.float32) for x in (exact_student, exact_teacher))
    for form in ("streamed", "stored"):
        options = ("cosine", "kl", 0.5, False, False, form, backend)
        loss, statistics, stored = _forward(student, teacher, *options)
        grad = _backward(torch.ones_like(loss), student, teacher, statistics, stored, *options)
        for name, got, right in (("loss", loss, exact), ("gradient", grad, exact_grad)):
            error = (got.cpu().double() - right.detach()).abs().max().item()
            if not error < 1e-5:
                return f"its self-test on {device} got a wrong {name} (off by {error:.1e})"
    return None
