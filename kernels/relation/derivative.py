"""First step of the ``relation`` backward: H, the derivative of the losses with respect to the similarities."""

from __future__ import annotations

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E, round_to
from fastkd.kernels.relation.merge import row_cosine
from fastkd.kernels.relation.tiles import UNSPECIALISED, products, scaled, stored_tile, triangle


# ---------------------------------------------------------------------------------------------------------------------
# With coefficients A and D of each row, from its statistics and its incoming gradient g divided by the samples' number,
#
#     kl            H = f_S (A_i + A_j) − f_T (D_i + D_j),   A = gσ/(τ z_S), D = gσ/(τ z_T), f as in the forward;
#                   with maxima f differs between i and j
#     mse           H = (E^S − E^T) (A_i + A_j),                     A = 2g/R
#     row_cosine    H = E^S (A_i + A_j) − E^T (B_i + B_j),  A = 2gc/n², B = 2g/(n m), c = u_S · u_T, no gradient where
#                   n ≤ 1e-12. With D = A − B a row's part is (E^S − E^T) A + E^T D = (E^S − E^T) B + E^S D: the form
#                   with the smaller coefficient, as the other cancels where n and m differ by orders of magnitude
#
# H is exactly 0 if student and teacher are equal, because the kernel is compiled without fused multiply-adds: with them
# f_S A − f_T D would not cancel. (f_T (A − D) + (f_S − f_T) A would, but z_S may be far smaller than f_T if no
# similarity is near the fixed shift.) The kernel writes s_i H_ij s_j, so that the product reads unnormalised rows: in
# fp32, or rounded to bfloat16 for bfloat16 rows. q is summed from the rounded numbers, so that the rounding error along
# a row is removed with it, and written as s_i q_i. The diagonal of a cosine relation is constant, so it is set to 0
# rather than subtracted again with q. σ is part of s_i, so that in the code e_s and e_t are σE, and h is the derivative
# with respect to them.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(
    do_not_specialize=["rows", "n_rows", "samples", "grad_stride_b", "grad_stride_r"],
    do_not_specialize_on_alignment=["grad_ptr"],
)
def coefficients_kernel(
    grad_ptr,  # (batch, rows), with the strides below, which may be 0
    statistics_ptr,  # (PLANES, samples, batch · rows)
    coefficients_ptr,  # output (2, samples, batch · rows) A, D; row_cosine: 3, the smaller of A and B, D of E^T, of E^S
    rows,
    n_rows,  # batch · rows
    samples,  # of a problem
    grad_stride_b,
    grad_stride_r,
    inv_temperature,
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the coefficients of ``BLOCK`` rows per program, for the columns of one sample."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = row < n_rows
    g = tl.load(grad_ptr + row // rows * grad_stride_b + row % rows * grad_stride_r, mask=in_range, other=0.0) / samples
    plane = n_rows.to(tl.int64) * samples
    index = tl.program_id(1) * n_rows.to(tl.int64) + row
    ptr = statistics_ptr + index
    d = 0.0 * g
    if DISTANCE == "mse":
        a = 2.0 * g / rows
    elif DISTANCE == "row_cosine":
        n2 = tl.load(ptr, mask=in_range, other=1.0)
        m2 = tl.load(ptr + plane, mask=in_range, other=1.0)
        d2 = tl.load(ptr + 2 * plane, mask=in_range, other=0.0)
        sum_d = tl.load(ptr + 3 * plane, mask=in_range, other=0.0)
        dot = tl.load(ptr + 4 * plane, mask=in_range, other=1.0)
        loss, c, n, m, norm_difference = row_cosine(n2, m2, d2, sum_d, dot)
        # c m − n; for close relations computed as −(n − m) − m loss/2, without cancellation
        difference = tl.where((d2 <= n * m) & (m2 > 1e-24), -norm_difference - 0.5 * loss * m, c * m - n)
        a = tl.where(n2 <= 1e-24, 0.0, 2.0 * g / n / n * c)
        b = tl.where(n2 <= 1e-24, 0.0, 2.0 * g / n / m)
        d = tl.where(n2 <= 1e-24, 0.0, 2.0 * g / n / n * (difference / m))
        by_a = tl.abs(a) <= tl.abs(b)
        tl.store(coefficients_ptr + 2 * plane + index, tl.where(by_a, 0.0, d), mask=in_range)
        a = tl.where(by_a, a, b)
        d = tl.where(by_a, d, 0.0)
    else:
        g = g * inv_temperature
        Z: tl.constexpr = 1 if DISTANCE == "kl maxima" else 0  # plane of z_S
        Z_T: tl.constexpr = 3 if DISTANCE == "kl maxima" else 1  # plane of z_T
        a = g / tl.load(ptr + Z * plane, mask=in_range, other=1.0)
        d = g / tl.load(ptr + Z_T * plane, mask=in_range, other=1.0)
    tl.store(coefficients_ptr + index, a, mask=in_range)
    tl.store(coefficients_ptr + plane + index, d, mask=in_range)


@triton.jit
def _h_from_maxima(v_s, v_t, coefficients_ptr, statistics_ptr, plane, index, in_range, kappa, AXIS: tl.constexpr):
    """Return the part of H from the rows' maxima and coefficients (AXIS 1) or the columns' (AXIS 0)."""
    m_s = tl.load(statistics_ptr + index, mask=in_range, other=0.0)
    m_t = tl.load(statistics_ptr + 2 * plane + index, mask=in_range, other=0.0)
    f_s = tl.exp2((v_s - tl.expand_dims(m_s, AXIS)) * kappa)
    f_t = tl.exp2((v_t - tl.expand_dims(m_t, AXIS)) * kappa)
    a = tl.load(coefficients_ptr + index, mask=in_range, other=0.0)
    d = tl.load(coefficients_ptr + plane + index, mask=in_range, other=0.0)
    return f_s * tl.expand_dims(a, AXIS) - f_t * tl.expand_dims(d, AXIS)


@triton.jit(**UNSPECIALISED)
def derivative_kernel(
    student_ptr,
    student_width,
    student_stride_b,
    student_stride_outer,
    student_stride_inner,
    teacher_ptr,
    teacher_width,
    teacher_stride_b,
    teacher_stride_outer,
    teacher_stride_inner,
    coefficients_ptr,  # as coefficients_kernel wrote them
    statistics_ptr,  # (PLANES, samples, batch · rows)
    scale_ptr,  # (2, batch · rows)
    stored_ptr,  # tiles of both relation matrices if STORED (tiles.py)
    h_ptr,  # output (problems, last − first blocks of ROWS, columns of COLS)
    q_ptr,  # output (problems, columns, last − first blocks of ROWS)
    row_units,  # rows / ROW_UNIT
    samples,  # of a problem
    row_blocks,  # of a sample
    first_problem,
    first,  # row blocks of this launch: [first, last)
    last,
    n_rows,  # batch · rows
    tiles,  # of a problem, in this launch
    student_factor,  # of the similarities: their sign σ, divided by the width for "mean"
    teacher_factor,
    inv_temperature,
    STUDENT_UNIT: tl.constexpr,
    STUDENT_ROWS_INNER: tl.constexpr,
    TEACHER_UNIT: tl.constexpr,
    TEACHER_ROWS_INNER: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COSINE: tl.constexpr,
    DISTANCE: tl.constexpr,
    STORED: tl.constexpr,
    MIRROR: tl.constexpr,  # compute tiles I ≤ J of whole problems; else all tiles of some row blocks
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute one tile of H per program, with its mirror image and the partial sums of q of both."""
    Q: tl.constexpr = ROWS // COLS
    rows = row_units * ROW_UNIT
    columns = samples * row_blocks * Q
    band = last - first
    local_problem = (tl.program_id(0) // tiles).to(tl.int64)  # in this launch
    tile = tl.program_id(0) % tiles
    if MIRROR:
        row, col = triangle(tile, first, last, columns, Q)
    else:
        row = first + tile // columns
        col = tile % columns
    problem = first_problem + local_problem
    b_i = problem * samples + row // row_blocks
    b_j = problem * samples + col // (row_blocks * Q)
    r_i = row % row_blocks * ROWS + tl.arange(0, ROWS)
    r_j = col % (row_blocks * Q) * COLS + tl.arange(0, COLS)
    if col % (row_blocks * Q) * COLS < rows:
        mask_i = r_i < rows
        mask_j = r_j < rows
        index_i = b_i * rows + r_i
        index_j = b_j * rows + r_j
        if COSINE:
            s_i = tl.load(scale_ptr + index_i, mask=mask_i, other=1.0) * student_factor
            s_j = tl.load(scale_ptr + index_j, mask=mask_j, other=1.0)
        if STORED:
            tile_ptr = stored_tile(stored_ptr, problem, row, col, columns, row_blocks, ROWS, COLS)
            e_s = tl.load(tile_ptr)
            e_t = tl.load(tile_ptr + ROWS * COLS)
        else:
            e_s = products(student_ptr, student_width, student_stride_b, student_stride_outer, student_stride_inner,
                           b_i, r_i, mask_i, b_j, r_j, mask_j,
                           STUDENT_UNIT, STUDENT_ROWS_INNER, ROWS, COLS, DEPTH, PRECISION)  # fmt: skip
            e_t = products(teacher_ptr, teacher_width, teacher_stride_b, teacher_stride_outer, teacher_stride_inner,
                           b_i, r_i, mask_i, b_j, r_j, mask_j,
                           TEACHER_UNIT, TEACHER_ROWS_INNER, ROWS, COLS, DEPTH, PRECISION)  # fmt: skip
            if COSINE:
                e_s = scaled(e_s, s_i, s_j)
                teacher_scale_ptr = scale_ptr + n_rows.to(tl.int64)
                t_i = tl.load(teacher_scale_ptr + index_i, mask=mask_i, other=0.0) * teacher_factor
                e_t = scaled(e_t, t_i, tl.load(teacher_scale_ptr + index_j, mask=mask_j, other=0.0))
            else:
                e_s = e_s * student_factor
                e_t = e_t * teacher_factor

        kappa = inv_temperature * LOG2E
        plane = n_rows.to(tl.int64) * samples
        # Coefficients of row i for the sample of j, and vice versa.
        index_i += (b_j - problem * samples) * n_rows
        index_j += (b_i - problem * samples) * n_rows
        if DISTANCE == "kl maxima":
            h = _h_from_maxima(e_s, e_t, coefficients_ptr, statistics_ptr, plane, index_i, mask_i, kappa, 1)
            h += _h_from_maxima(e_s, e_t, coefficients_ptr, statistics_ptr, plane, index_j, mask_j, kappa, 0)
        else:
            a_i = tl.load(coefficients_ptr + index_i, mask=mask_i, other=0.0)
            a_j = tl.load(coefficients_ptr + index_j, mask=mask_j, other=0.0)
            a = a_i[:, None] + a_j[None, :]
            if DISTANCE == "mse":
                h = (e_s - e_t) * a
            else:
                d_i = tl.load(coefficients_ptr + plane + index_i, mask=mask_i, other=0.0)
                d_j = tl.load(coefficients_ptr + plane + index_j, mask=mask_j, other=0.0)
                if DISTANCE == "kl":
                    f_s = tl.exp2((e_s - 1.0) * kappa)
                    f_t = tl.exp2((e_t - 1.0) * kappa)
                    h = f_s * a - f_t * (d_i[:, None] + d_j[None, :])
                else:
                    s_side_i = tl.load(coefficients_ptr + 2 * plane + index_i, mask=mask_i, other=0.0)
                    s_side_j = tl.load(coefficients_ptr + 2 * plane + index_j, mask=mask_j, other=0.0)
                    h = e_t * (d_i[:, None] + d_j[None, :]) + e_s * (s_side_i[:, None] + s_side_j[None, :])
                    h += (e_s - e_t) * a
        valid = mask_i[:, None] & mask_j[None, :]
        if COSINE:
            valid = valid & ((row * ROWS + tl.arange(0, ROWS))[:, None] != (col * COLS + tl.arange(0, COLS))[None, :])
        h = tl.where(valid, h, 0.0)

        across = columns.to(tl.int64) * COLS
        down = band.to(tl.int64) * ROWS
        q_ptr += local_problem * columns * down
        h_ptr += local_problem * down * across
        at_i = (row - first) * ROWS + tl.arange(0, ROWS)
        at_j = col * COLS + tl.arange(0, COLS)
        scaled_h = h * s_i[:, None] * s_j[None, :] if COSINE else h * student_factor
        rounded = round_to(tl.where(valid, scaled_h, 0.0), h_ptr.dtype.element_ty)
        tl.store(h_ptr + at_i.to(tl.int64)[:, None] * across + at_j[None, :], rounded)
        mirrored = MIRROR and col >= Q * (row + 1)
        if COSINE:
            # Mask again: in the padding a NaN scale would give 0·NaN.
            q = tl.where(valid, rounded.to(tl.float32) * e_s, 0.0)
            tl.store(q_ptr + col * down + at_i, tl.sum(q * (student_factor / s_j)[None, :], axis=1))
        if mirrored:
            tl.store(h_ptr + at_j.to(tl.int64)[None, :] * across + at_i[:, None], rounded)
            if COSINE:
                tl.store(q_ptr + row * Q * down + at_j, tl.sum(q * (1.0 / s_i)[:, None], axis=0))
