"""Backward of ``softmax_kl`` in Triton, from the inputs and the statistics of the forward."""

from __future__ import annotations

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E, float64, launching_on, round_to
from fastkd.kernels.softmax_kl.plan import plan_for
from torch import Tensor


# ---------------------------------------------------------------------------------------------------------------------
# KL = Σ_j p_{t,j} (t_j − s_j)/τ − ℓ_t + ℓ_s is linear in s except for ℓ_s, and ∂ℓ_s/∂s_j = p_{s,j}/τ. So for the
# incoming gradient g of a row,
#
#     ∂(g·KL)/∂s_j = (g/τ) (p_{s,j} − p_{t,j}),      p_{x,j} = e^{(x_j − m_x)/τ} / z_x.
#
# Each element is computed by one program, independently of the others, so results are bit-identical between runs.
# ---------------------------------------------------------------------------------------------------------------------
# Gradients of any layout share one compilation: a CUDA graph may be captured with another layout than the warm-up's.
@triton.jit(
    do_not_specialize=[
        "n_rows",
        "rows_per_batch",
        "cols",
        "grad_stride_b",
        "grad_stride_r",
        "student_stride_b",
        "student_stride_r",
        "teacher_stride_b",
        "teacher_stride_r",
    ],
    do_not_specialize_on_alignment=["grad_loss_ptr"],
)
def backward_kernel(
    grad_loss_ptr,  # (batch, rows), with the strides below, which may be 0
    student_ptr,
    teacher_ptr,
    statistics_ptr,  # (4, batch · rows) contiguous
    grad_student_ptr,  # output (batch, rows, cols), contiguous
    n_rows,
    rows_per_batch,
    cols,  # in units of UNIT elements, like the inputs' strides
    grad_stride_b,
    grad_stride_r,
    student_stride_b,
    student_stride_r,
    teacher_stride_b,
    teacher_stride_r,
    inv_temperature: tl.float64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Compute the gradient of one ``ROWS`` × ``COLS`` block per program."""
    ACC: tl.constexpr = grad_loss_ptr.dtype.element_ty
    cols *= UNIT
    inv_tau = float64(inv_temperature).to(ACC)
    scale = inv_tau * LOG2E

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = row < n_rows
    b = row // rows_per_batch
    r = row % rows_per_batch
    j = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    mask = in_range[:, None] & (j < cols)

    g = tl.load(grad_loss_ptr + b * grad_stride_b + r * grad_stride_r, mask=in_range, other=0.0).to(ACC)
    m_s = tl.load(statistics_ptr + row, mask=in_range, other=0.0)
    z_s = tl.load(statistics_ptr + n_rows.to(tl.int64) + row, mask=in_range, other=1.0)
    m_t = tl.load(statistics_ptr + 2 * n_rows.to(tl.int64) + row, mask=in_range, other=0.0)
    z_t = tl.load(statistics_ptr + 3 * n_rows.to(tl.int64) + row, mask=in_range, other=1.0)
    student_row = student_ptr + ((b * student_stride_b + r * student_stride_r) * UNIT)[:, None]
    teacher_row = teacher_ptr + ((b * teacher_stride_b + r * teacher_stride_r) * UNIT)[:, None]
    s = tl.load(student_row + j, mask=mask, other=0.0).to(ACC)
    t = tl.load(teacher_row + j, mask=mask, other=0.0).to(ACC)

    p_s = tl.exp2((s - m_s[:, None]) * scale) * (1.0 / z_s)[:, None]
    p_t = tl.exp2((t - m_t[:, None]) * scale) * (1.0 / z_t)[:, None]
    grad = (g * inv_tau)[:, None] * (p_s - p_t)
    # grad_student is contiguous: row · cols is the row's offset (int64, like row).
    tl.store(grad_student_ptr + row[:, None] * cols + j, round_to(grad, grad_student_ptr.dtype.element_ty), mask=mask)


def backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    grad_student: Tensor,
    temperature: float,
) -> None:
    """Fill ``grad_student`` (B, R, N), contiguous, from a per-row gradient (B, R) of any strides."""
    plan = plan_for(student.shape, student.stride(), teacher.stride(), student.dtype)
    with launching_on(student):
        backward_kernel.run(
            grad_loss,
            student,
            teacher,
            statistics,
            grad_student,
            *plan.sizes,
            *grad_loss.stride(),
            *plan.strides,
            1.0 / temperature,
            **plan.backward,
        )
