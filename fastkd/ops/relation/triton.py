"""Call the Triton kernels of ``relation``."""

from __future__ import annotations

from torch import Tensor

from fastkd.ops.launch import check_workspace, statistics_dtype, triton_module, workspace_limit
from fastkd.ops.relation.plan import Options, Sizes


def sizes(student: Tensor, teacher: Tensor, options: Options) -> Sizes:
    """Return the sizes of statistics and stored matrices."""
    batch, rows = student.shape[:2]
    plan, dtype = triton_module("relation", "plan"), statistics_dtype(student, teacher)
    others = batch if options.cross else 1
    planes = plan.statistics_planes(options.similarity, options.distance, options.temperature, others)
    stored = plan.stored_elements(batch, rows) if options.form == "stored" else 0
    return Sizes(planes, stored, dtype, dtype)


def forward(
    student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, stored: Tensor, options: Options
) -> None:
    """Fill ``loss``, ``statistics`` and ``stored``."""
    call = triton_module("relation", "call").call_of(student, teacher, options, stored)
    limit = check_workspace(call.min_bytes, workspace_limit(student.device))
    triton_module("relation", "forward").forward(
        call, student, teacher, loss, statistics, stored, options.temperature, limit
    )


def backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    stored: Tensor,
    grad_student: Tensor,
    options: Options,
) -> None:
    """Fill ``grad_student``."""
    call = triton_module("relation", "call").call_of(student, teacher, options, stored)
    limit = check_workspace(call.min_bytes, workspace_limit(student.device))
    triton_module("relation", "backward").backward(
        call, grad_loss, student, teacher, statistics, stored, grad_student, options.temperature, limit
    )
