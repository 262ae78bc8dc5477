"""Logit distillation: match the class distribution of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.losses._module import LossModule
from fastkd.losses._reduce import reduce_rows
from fastkd.losses._temperatures import Temperature, at_student_temperature
from fastkd.ops import checks
from fastkd.ops.dispatch import backend_from_env, choose
from fastkd.ops.softmax_kl import softmax_kl_unchecked
from fastkd.ops.softmax_kl.reference import softmax_kl as softmax_kl_reference

LAYOUT = "(B, K, H, W), (B, K, N) or (B, K)"
FEW_CLASSES = 8
"""With fewer classes, "auto" uses plain torch on the CPU. Compared with transposing the logits for the C++ kernel, it
was measured 5 times as fast at K = 2, equally fast at K = 8 and 12, and slower at K = 16."""
IGNORE_INDEX = -100
"""The default label of rows to skip, as in ``torch.nn.functional.cross_entropy``."""


def logit_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 1.0,
    class_dim: int = 1,
    pixel_mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compare the class distributions of every pixel: τ²·KL(softmax_K(z_T/τ) ‖ softmax_K(z_S/τ)).

    A reconstruction of "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), pixel by pixel. A single
    channel (K = 1) is treated as the two-class logits (0, z), that is, as a sigmoid.

    Args:
        student_logits: (B, K, H, W), (B, K, N) or (B, K), any floating dtype; the softmax runs over ``class_dim``.
        teacher_logits: the same shape. Must not require grad.
        temperature: τ > 0, or (τ_S, τ_T) for z_S/τ_S and z_T/τ_T, with the factor τ_S².
        class_dim: the dimension of the K classes. It is not inferred from the shape: logits of a language model,
            (B, T, V), need ``class_dim=-1``.
        pixel_mask: None or bool, the shape of the logits without K, or (B, N): True = valid. The values of masked
            pixels affect neither loss nor gradient.
        labels: None or integers of the mask's shape; rows labelled ``ignore_index`` are masked.
        ignore_index: the label to skip; any value but -100 needs ``labels``.
        reduction: "mean" over all valid pixels of the batch, "sum", or "none": the shape of the logits without K, 0 at
            masked pixels.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        The loss in fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: an invalid argument; the message names it and the fix. A mask without any valid pixel
            is an error on the CPU; on a GPU, where reading it would stall the stream, the mean is NaN.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> loss = logit_kd(student(x), teacher(x).detach(), temperature=2.0, pixel_mask=labels != 255)
        >>> loss = logit_kd(words_s, words_t.detach(), class_dim=-1, labels=targets)  # (B, T, V), targets (B, T)
    """
    student_temperature, teacher_temperature = _check_options(temperature, class_dim, ignore_index, reduction)
    checks.floating("student_logits", student_logits, (2, 3, 4), LAYOUT)
    checks.floating("teacher_logits", teacher_logits, (2, 3, 4), LAYOUT)
    checks.teacher("teacher_logits", teacher_logits)
    checks.same_device(student_logits=student_logits, teacher_logits=teacher_logits)
    shape = tuple(student_logits.shape)
    checks.same_size(
        "shapes",
        ("student_logits", "teacher_logits"),
        (shape, tuple(teacher_logits.shape)),
        "resize one to the other's size; the classes must be the same",
    )
    if not -len(shape) <= class_dim < len(shape):
        raise ValueError(f"class_dim: expected a dimension of logits of shape {shape}, got {class_dim}")
    student, teacher = (x.movedim(class_dim, 1) for x in (student_logits, teacher_logits))
    outer = (student.shape[0], *student.shape[2:])  # the shape of the logits without K
    student, teacher = (x.reshape(*x.shape[:2], -1) for x in (student, teacher))  # (B, K, N)
    mask = _valid(pixel_mask, labels, ignore_index, outer, student)
    if mask is not None:
        zero = torch.zeros((), dtype=student.dtype, device=student.device)
        student = torch.where(mask.unsqueeze(1), student, zero)
        teacher = torch.where(mask.unsqueeze(1), teacher, zero.to(teacher.dtype))
    if student.shape[1] == 1:
        student = torch.cat([torch.zeros_like(student), student], 1)  # (B, 2, N)
        teacher = torch.cat([torch.zeros_like(teacher), teacher], 1)

    if teacher_temperature is not None:
        teacher, backend = at_student_temperature(teacher, student_temperature, teacher_temperature, backend, student)

    # Plain torch computes the softmax over dimension 1 directly; the kernels need a row's classes contiguous.
    differentiated = checks.differentiates_temperature(backend, student_temperature)
    if backend == "auto" and student.shape[1] < FEW_CLASSES and student.device.type == "cpu":
        backend = "reference" if backend_from_env() == "auto" else "auto"
    if differentiated or choose("softmax_kl", backend, student, teacher) == "reference":
        rows = softmax_kl_reference(student, teacher, student_temperature, dim=1)  # (B, N)
    else:
        rows = softmax_kl_unchecked(student.mT, teacher.mT, student_temperature, backend)
    rows = rows * student_temperature**2
    if mask is not None and reduction == "mean":
        return rows.sum() / mask.sum()  # masked rows are 0
    if reduction == "none":
        return rows.reshape(outer)
    return reduce_rows(rows, None, reduction)


def _valid(
    pixel_mask: Tensor | None, labels: Tensor | None, ignore_index: int, outer: tuple[int, ...], like: Tensor
) -> Tensor | None:
    """Return the (B, N) mask of the valid rows, or None if all are valid."""
    flat = (like.shape[0], like.shape[2])
    shapes = [outer, flat][: len(outer)]
    mask = None
    if pixel_mask is not None:
        mask = checks.bool_mask("pixel_mask", pixel_mask, shapes, like).reshape(flat)
    if labels is not None:
        labelled = checks.integers("labels", labels, shapes, like).reshape(flat) != ignore_index
        mask = labelled if mask is None else mask & labelled
    elif ignore_index != IGNORE_INDEX:
        raise ValueError(f"ignore_index: {ignore_index} marks rows by their labels; pass labels= as well")
    if mask is not None and checks.readable(mask) and not bool(mask.any()):
        name = "pixel_mask" if labels is None else "labels" if pixel_mask is None else "pixel_mask and labels"
        raise ValueError(f"{name}: no valid pixel in the batch; skip this loss for such a batch")
    return mask


def _check_options(
    temperature: Temperature, class_dim: int, ignore_index: int, reduction: str
) -> tuple[float | Tensor, float | Tensor | None]:
    for name, value in (("class_dim", class_dim), ("ignore_index", ignore_index)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    checks.option("reduction", reduction, checks.REDUCTIONS)
    return checks.temperatures(temperature)


class LogitKD(LossModule):
    """:func:`logit_kd` as a module with the same arguments; ``pixel_mask`` and ``labels`` are passed to each call.

    Example:
        >>> kd = LogitKD(temperature=2.0, ignore_index=255)
        >>> loss = kd(student(x), teacher(x).detach(), labels=labels)
    """

    def __init__(
        self,
        *,
        temperature: Temperature = 1.0,
        class_dim: int = 1,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        _check_options(temperature, class_dim, ignore_index, reduction)
        super().__init__(
            {
                "temperature": temperature,
                "class_dim": class_dim,
                "ignore_index": ignore_index,
                "reduction": reduction,
                "backend": backend,
            }
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return logit_kd(student_logits, teacher_logits, pixel_mask=pixel_mask, labels=labels, **self._options())
