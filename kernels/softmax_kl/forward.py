r"""Forward of ``softmax_kl`` in Triton: KL between the softmaxes of matching rows; each pass reads each input once.

With :math:`p_x = \operatorname{softmax}(x / \tau)` and :math:`\ell_x = \log \sum_j e^{x_j / \tau}`, where x is the
student's s or the teacher's t,

.. math:: \mathrm{KL}(p_t \| p_s) = \sum_j p_{t,j} \frac{t_j - s_j}{\tau} - \ell_t + \ell_s .

Per row the forward writes the loss and, for each input, ℓ as two numbers: the maximum m and z = Σ e^{(x−m)/τ}. These
keep full precision at logits of 1e4 and at τ = 20, where a single fp32 number would not. The backward needs only these
and the inputs. Arithmetic is fp32 (fp64 for fp64 inputs). On a GPU 2^x is the hardware approximation (about 2 ulp;
subnormal results are flushed to 0).
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E, exact_quotient, float64, launching_on
from fastkd.kernels.softmax_kl.plan import plan_for
from torch import Tensor


# ---------------------------------------------------------------------------------------------------------------------
# One pass accumulates the maximum m and z = Σ e^{(x−m)/τ} of each input, and a = Σ e^{(t−m_t)/τ} (t − s); then
#
#     KL = a / (z_t τ) + (m_s − m_t)/τ + log z_s − log z_t,      ℓ_x = m_x/τ + log z_x.
#
# Each lane (column of the block) accumulates (m, z, a) over its columns; lanes are merged once at the end, in a fixed
# order. For each new x a lane rescales its sums or the new term, whichever belongs to the smaller maximum, so that one
# exponential, of −|x − m|, suffices. Subtracting before scaling by 1/τ keeps (x − m)/τ accurate for large logits at
# small τ. If several programs share a row, a second kernel merges their parts in the same way.
#
# Edge cases. −inf has weight 0, and 0·(t − s) counts as 0 even if t − s is ±inf or NaN; columns past the end of the row
# are loaded as −inf. s = −inf where p_t > 0 gives a = +inf and an infinite loss. A row of only −inf has z = 0 and the
# loss 0/0 = NaN. NaN: tl.max ignores it, but m, e^{...} or z of its lane is NaN and reaches the final sums. +inf: the
# e^{inf − inf} of its lane is NaN in the merge.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def _merge_lanes(m_s, z_s, m_t, z_t, a, scale):
    """Merge the lanes of each row: return its maxima and its sums relative to them."""
    top_s = tl.max(m_s, axis=1)
    top_t = tl.max(m_t, axis=1)
    z_s = tl.sum(z_s * tl.exp2((m_s - top_s[:, None]) * scale), axis=1)
    weight = tl.exp2((m_t - top_t[:, None]) * scale)
    z_t = tl.sum(z_t * weight, axis=1)
    a = tl.sum(tl.where(weight == 0.0, 0.0, a * weight), axis=1)
    return top_s, z_s, top_t, z_t, a


@triton.jit
def _store_results(loss_ptr, statistics_ptr, n_rows, row, in_range, top_s, z_s, top_t, z_t, a, inv_tau):
    """Store the loss and the statistics of each row."""
    loss = (a / z_t + (top_s - top_t)) * inv_tau + tl.log(exact_quotient(z_s, z_t))
    tl.store(loss_ptr + row, loss, mask=in_range)
    tl.store(statistics_ptr + row, top_s, mask=in_range)
    tl.store(statistics_ptr + n_rows.to(tl.int64) + row, z_s, mask=in_range)
    tl.store(statistics_ptr + 2 * n_rows.to(tl.int64) + row, top_t, mask=in_range)
    tl.store(statistics_ptr + 3 * n_rows.to(tl.int64) + row, z_t, mask=in_range)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "rows_per_batch",
        "cols",
        "part_blocks",
        "student_stride_b",
        "student_stride_r",
        "teacher_stride_b",
        "teacher_stride_r",
    ]
)
def forward_kernel(
    student_ptr,  # (batch, rows, cols), with the strides below and inner stride 1
    teacher_ptr,
    loss_ptr,  # output (batch · rows,), contiguous
    statistics_ptr,  # output (4, batch · rows) m_s, z_s, m_t, z_t, contiguous
    parts_ptr,  # output if SPLIT: (parts, 5, batch · rows) m_s, z_s, m_t, z_t, a of each part, contiguous
    n_rows,  # batch · rows
    rows_per_batch,
    cols,  # in units of UNIT elements, like the inputs' strides
    part_blocks,  # columns of a part, in units of COLS
    student_stride_b,
    student_stride_r,
    teacher_stride_b,
    teacher_stride_r,
    inv_temperature: tl.float64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LOOP: tl.constexpr,  # cols > COLS
    SPLIT: tl.constexpr,  # several programs per row
    UNIT: tl.constexpr,
):
    """Compute the losses and statistics of ``ROWS`` rows per program, or if SPLIT the sums of one part of a row."""
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    inv_tau = float64(inv_temperature).to(ACC)
    scale = inv_tau * LOG2E

    cols *= UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = row < n_rows
    b = row // rows_per_batch
    r = row % rows_per_batch
    student_row = student_ptr + ((b * student_stride_b + r * student_stride_r) * UNIT)[:, None]
    teacher_row = teacher_ptr + ((b * teacher_stride_b + r * teacher_stride_r) * UNIT)[:, None]
    lane = tl.arange(0, COLS)[None, :]
    end = cols
    if SPLIT:
        part_cols = part_blocks * COLS
        begin = tl.program_id(1) * part_cols
        student_row += begin
        teacher_row += begin
        end = tl.minimum(cols - begin, part_cols)
    minus_inf = float("-inf")
    # Initialise maxima with the lowest finite number: −inf − (−inf) would be NaN.
    LOWEST: tl.constexpr = -3.4028234663852886e38 if ACC.is_fp32() else -1.7976931348623157e308

    mask = in_range[:, None] & (lane < end)
    s = tl.load(student_row + lane, mask=mask, other=minus_inf).to(ACC)
    t = tl.load(teacher_row + lane, mask=mask, other=minus_inf).to(ACC)
    m_s = tl.where(s == minus_inf, LOWEST, s)
    m_t = tl.where(t == minus_inf, LOWEST, t)
    z_s = tl.where(s == minus_inf, 0.0, 1.0).to(ACC)
    z_t = tl.where(t == minus_inf, 0.0, 1.0).to(ACC)
    a = tl.where(t == minus_inf, 0.0, t - s)

    if LOOP:
        for start in range(COLS, end, COLS):
            j = start + lane
            mask = in_range[:, None] & (j < end)
            s = tl.load(student_row + j, mask=mask, other=minus_inf).to(ACC)
            t = tl.load(teacher_row + j, mask=mask, other=minus_inf).to(ACC)

            e = tl.exp2(-tl.abs(s - m_s) * scale)
            new = s > m_s
            z_s = tl.where(new, z_s * e + 1.0, z_s + e)
            m_s = tl.where(new, s, m_s)

            e = tl.exp2(-tl.abs(t - m_t) * scale)
            new = t > m_t
            old_weight = tl.where(new, e, 1.0)
            weight = tl.where(new, 1.0, e)
            z_t = z_t * old_weight + weight
            a = tl.where(old_weight == 0.0, 0.0, a * old_weight) + tl.where(weight == 0.0, 0.0, weight * (t - s))
            m_t = tl.where(new, t, m_t)

    top_s, z_s, top_t, z_t, a = _merge_lanes(m_s, z_s, m_t, z_t, a, scale)
    if SPLIT:
        plane = n_rows.to(tl.int64)
        out = parts_ptr + tl.program_id(1) * 5 * plane + row
        tl.store(out, top_s, mask=in_range)
        tl.store(out + plane, z_s, mask=in_range)
        tl.store(out + 2 * plane, top_t, mask=in_range)
        tl.store(out + 3 * plane, z_t, mask=in_range)
        tl.store(out + 4 * plane, a, mask=in_range)
    else:
        _store_results(loss_ptr, statistics_ptr, n_rows, row, in_range, top_s, z_s, top_t, z_t, a, inv_tau)


@triton.jit(do_not_specialize=["n_rows", "parts"])
def merge_kernel(
    parts_ptr,  # (parts, 5, n_rows) contiguous
    loss_ptr,
    statistics_ptr,
    n_rows,
    parts,
    inv_temperature: tl.float64,
    PARTS: tl.constexpr,
):
    """Compute the loss and statistics of one row per program from its parts."""
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    inv_tau = float64(inv_temperature).to(ACC)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    part = tl.arange(0, PARTS)[None, :]
    plane = n_rows.to(tl.int64)
    part_sums = parts_ptr + row[:, None] + part * 5 * plane
    in_range = part < parts
    LOWEST: tl.constexpr = -3.4028234663852886e38 if ACC.is_fp32() else -1.7976931348623157e308
    m_s = tl.load(part_sums, mask=in_range, other=LOWEST)
    z_s = tl.load(part_sums + plane, mask=in_range, other=0.0)
    m_t = tl.load(part_sums + 2 * plane, mask=in_range, other=LOWEST)
    z_t = tl.load(part_sums + 3 * plane, mask=in_range, other=0.0)
    a = tl.load(part_sums + 4 * plane, mask=in_range, other=0.0)
    top_s, z_s, top_t, z_t, a = _merge_lanes(m_s, z_s, m_t, z_t, a, inv_tau * LOG2E)
    _store_results(loss_ptr, statistics_ptr, n_rows, row, row < n_rows, top_s, z_s, top_t, z_t, a, inv_tau)


def forward(student: Tensor, teacher: Tensor, loss: Tensor, statistics: Tensor, temperature: float) -> None:
    """Fill ``loss`` (B, R) and ``statistics`` (4, B, R) from inputs (B, R, N) with inner stride 1."""
    plan = plan_for(student.shape, student.stride(), teacher.stride(), student.dtype)
    n_rows, inv_temperature = plan.sizes[0], 1.0 / temperature
    # With one part per row the kernel does not use this argument.
    sums = loss.new_empty((plan.parts, 5, n_rows)) if plan.parts > 1 else loss
    with launching_on(student):
        forward_kernel.run(
            student,
            teacher,
            loss,
            statistics,
            sums,
            *plan.sizes,
            plan.part_blocks,
            *plan.strides,
            inv_temperature,
            **plan.forward,
        )
        if plan.parts > 1:
            merge_kernel.run(sums, loss, statistics, n_rows, plan.parts, inv_temperature, **plan.merge)
