"""Call the Triton kernels of ``relation``."""

from __future__ import annotations

from collections.abc import Callable

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
    triton_module("relation", "forward").forward(
        student, teacher, loss, statistics, stored, options, _limit_for(student)
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
    triton_module("relation", "backward").backward(
        grad_loss, student, teacher, statistics, stored, grad_student, options, _limit_for(student)
    )


def _limit_for(x: Tensor) -> Callable[[int], int]:
    """Return a function from the smallest sufficient workspace to the workspace limit on the device of ``x``."""
    return lambda minimum: check_workspace(minimum, workspace_limit(x.device))
