"""Logit distillation: the class distribution of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.losses import _checks
from fastkd.losses._module import LossModule
from fastkd.losses._reduce import reduce_rows
from fastkd.ops._backends import choose, wished
from fastkd.ops.softmax_kl import softmax_kl
from fastkd.reference.softmax_kl import softmax_kl as reference_softmax_kl

LAYOUT = "(B, K, H, W), (B, K, N) or (B, K)"
FEW_CLASSES = 8
"""Below this, "auto" takes plain torch on the CPU: for K = 2 it was measured 5 times as fast as copying the classes of
each pixel side by side for the C++ kernel, at K = 8 and 12 as fast, at K = 16 slower."""


def logit_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    pixel_mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compare the class distributions of every pixel: τ²·KL(softmax_K(z_T/τ) ‖ softmax_K(z_S/τ)).

    A reconstruction of "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), pixel by pixel. A single
    channel (K = 1) is read as the two-class logits (0, z), that is, as a sigmoid.

    Args:
        student_logits: (B, K, H, W), (B, K, N) or (B, K), any floating dtype; the softmax runs over dimension 1.
        teacher_logits: the same shape. Must not require grad.
        temperature: τ > 0.
        pixel_mask: None or bool, (B, H, W) or (B, N): True = valid. What masked pixels hold touches neither loss nor
            gradient.
        reduction: "mean" over all valid pixels of the batch, "sum", or "none": the shape of the logits without K, 0 at
            masked pixels.
        backend: "auto", or the name of a backend.

    Returns:
        fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and the mend. A mask without any
            valid pixel is refused on the CPU; on a GPU, where looking would stall the stream, its mean is NaN.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> loss = logit_kd(student(x), teacher(x).detach(), temperature=2.0, pixel_mask=labels != 255)
    """
    _check_options(temperature, reduction)
    _checks.floating("student_logits", student_logits, (2, 3, 4), LAYOUT)
    _checks.floating("teacher_logits", teacher_logits, (2, 3, 4), LAYOUT)
    _checks.teacher("teacher_logits", teacher_logits)
    _checks.same_device(student_logits=student_logits, teacher_logits=teacher_logits)
    shape = tuple(student_logits.shape)
    _checks.same_size(
        "shapes",
        ("student_logits", "teacher_logits"),
        (shape, tuple(teacher_logits.shape)),
        "resize one to the other's size; the classes must be the same",
    )
    student, teacher = student_logits.reshape(*shape[:2], -1), teacher_logits.reshape(*shape[:2], -1)  # (B, K, N)
    mask = None
    if pixel_mask is not None:
        if len(shape) == 2:
            raise ValueError(f"pixel_mask: logits of shape {shape} have no pixels; leave pixel_mask out")
        flat = (shape[0], student.shape[2])
        shapes = [(shape[0], *shape[2:]), flat][: len(shape) - 2]
        mask = _checks.bool_mask("pixel_mask", pixel_mask, shapes, student).reshape(flat)
        if _checks.values_visible(mask) and not bool(mask.any()):
            raise ValueError("pixel_mask: no valid pixel in the batch; leave this loss out for such a batch")
        zero = torch.zeros((), dtype=student.dtype, device=student.device)
        student = torch.where(mask.unsqueeze(1), student, zero)
        teacher = torch.where(mask.unsqueeze(1), teacher, zero.to(teacher.dtype))
    if shape[1] == 1:
        student = torch.cat([torch.zeros_like(student), student], 1)
        teacher = torch.cat([torch.zeros_like(teacher), teacher], 1)

    # Plain torch takes the softmax over dimension 1 where it lies; the kernels want a row's classes side by side.
    if backend == "auto" and student.shape[1] < FEW_CLASSES and student.device.type == "cpu":
        backend = "reference" if wished("softmax_kl") == "auto" else "auto"
    if choose("softmax_kl", backend, student, teacher) == "reference":
        rows = reference_softmax_kl(student, teacher, temperature, dim=1)
    else:
        rows = softmax_kl(student.mT, teacher.mT, temperature=temperature, backend=backend)
    rows = rows * temperature**2
    if mask is not None and reduction == "mean":
        return rows.sum() / mask.sum()  # masked rows are 0: both sides are equal there
    if reduction == "none":
        return rows.reshape(shape[0], *shape[2:])
    return reduce_rows(rows, None, reduction)


def _check_options(temperature: float, reduction: str) -> None:
    _checks.temperature(temperature)
    _checks.option("reduction", reduction, _checks.REDUCTIONS)


class LogitKD(LossModule):
    """:func:`logit_kd` as a module; see there for the arguments."""

    def __init__(self, *, temperature: float = 1.0, reduction: str = "mean", backend: str = "auto") -> None:
        _check_options(temperature, reduction)
        super().__init__({"temperature": temperature, "reduction": reduction, "backend": backend})

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, *, pixel_mask: Tensor | None = None) -> Tensor:
        """The loss."""
        return logit_kd(student_logits, teacher_logits, pixel_mask=pixel_mask, **self._options())
