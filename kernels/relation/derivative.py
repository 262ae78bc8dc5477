"""The first half of ``relation``'s backward: H, the losses' derivative by the similarities."""

from __future__ import annotations

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E
from fastkd.kernels.relation.merge import row_cosine
from fastkd.kernels.relation.tiles import kept_tile, products, scaled, triangle


# ---------------------------------------------------------------------------------------------------------------------
# H. With each row's coefficients from its statistics and its gradient g (over the samples, where they are averaged),
#
#     kl            H = f_S (A_i + A_j) − f_T (D_i + D_j),   A = gσ/(τ z_S), D = gσ/(τ z_T), f as in the forward;
#                   with maxima f differs between i and j
#     mse           H = (E^S − E^T) (A_i + A_j),                     A = 2g/R
#     row_cosine    H = (E^S − E^T) (A_i + A_j) + E^T (D_i + D_j),
#                   A = 2gc/n²,  D = A − 2g/(n m),  c = u_S · u_T;   no gradient where n ≤ 1e-12
#
# which is exactly 0 where the student is the teacher: the kernel is compiled without fused multiply-adds, in which
# f_S A − f_T D would not be. (As f_T (A − D) + (f_S − f_T) A it would, but z_S may be far smaller than f_T where no
# similarity is near the fixed shift.) What is stored is s_i H_ij s_j, so that the product takes rows as
# they are: in fp32, or for bfloat16 rows as the sum of two bfloat16 numbers, 16 bits of H, multiplied one by one.
# A cosine's diagonal is 1 whatever x: it is left out, instead of being subtracted again with q.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["rows", "n_rows", "samples", "grad_stride_b", "grad_stride_r"])
def coefficients_kernel(
    grad_ptr,  # (batch, rows), strides below, possibly 0
    statistics_ptr,  # (PLANES, samples, batch · rows)
    coefficients_ptr,  # (2, samples, batch · rows): A, D
    rows,
    n_rows,  # batch · rows
    samples,  # of a problem
    grad_stride_b,
    grad_stride_r,
    inv_temperature,
    DISTANCE: tl.constexpr,
    NEGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``BLOCK`` rows to a program, against one sample."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < n_rows
    g = tl.load(grad_ptr + row // rows * grad_stride_b + row % rows * grad_stride_r, mask=here, other=0.0) / samples
    plane = n_rows.to(tl.int64) * samples
    index = tl.program_id(1) * n_rows.to(tl.int64) + row
    ptr = statistics_ptr + index
    d = 0.0 * g
    if DISTANCE == "mse":
        a = 2.0 * g / rows
    elif DISTANCE == "row_cosine":
        n2 = tl.load(ptr, mask=here, other=1.0)
        m2 = tl.load(ptr + plane, mask=here, other=1.0)
        d2 = tl.load(ptr + 2 * plane, mask=here, other=0.0)
        sum_d = tl.load(ptr + 3 * plane, mask=here, other=0.0)
        dot = tl.load(ptr + 4 * plane, mask=here, other=1.0)
        loss, c, n, m, apart = row_cosine(n2, m2, d2, sum_d, dot)
        # c m − n: near each other −(n − m) − m loss/2
        difference = tl.where((d2 <= n * m) & (m2 > 1e-24), -apart - 0.5 * loss * m, c * m - n)
        a = tl.where(n2 <= 1e-24, 0.0, 2.0 * g / n / n * c)
        d = tl.where(n2 <= 1e-24, 0.0, 2.0 * g / n / n * (difference / m))
    else:
        g = (-g if NEGATE else g) * inv_temperature
        Z: tl.constexpr = 1 if DISTANCE == "kl maxima" else 0  # the plane of z_S; z_T's
        Z_T: tl.constexpr = 3 if DISTANCE == "kl maxima" else 1
        a = g / tl.load(ptr + Z * plane, mask=here, other=1.0)
        d = g / tl.load(ptr + Z_T * plane, mask=here, other=1.0)
    tl.store(coefficients_ptr + index, a, mask=here)
    tl.store(coefficients_ptr + plane + index, d, mask=here)


@triton.jit
def _one_sided(v_s, v_t, coefficients_ptr, statistics_ptr, plane, index, here, kappa, AXIS: tl.constexpr):
    """With maxima, the rows' part of H (AXIS 1) or the columns' (AXIS 0)."""
    m_s = tl.load(statistics_ptr + index, mask=here, other=0.0)
    m_t = tl.load(statistics_ptr + 2 * plane + index, mask=here, other=0.0)
    f_s = tl.exp2((v_s - tl.expand_dims(m_s, AXIS)) * kappa)
    f_t = tl.exp2((v_t - tl.expand_dims(m_t, AXIS)) * kappa)
    a = tl.load(coefficients_ptr + index, mask=here, other=0.0)
    d = tl.load(coefficients_ptr + plane + index, mask=here, other=0.0)
    return f_s * tl.expand_dims(a, AXIS) - f_t * tl.expand_dims(d, AXIS)


@triton.jit
def _store_h(h, ptr, plane, SPLIT: tl.constexpr):
    if SPLIT:
        high = h.to(tl.bfloat16)
        tl.store(ptr, high)
        tl.store(ptr + plane, (h - high.to(tl.float32)).to(tl.bfloat16))
    else:
        tl.store(ptr, h)


@triton.jit(
    do_not_specialize=[
        "row_units",
        "samples",
        "row_blocks",
        "first_problem",
        "problems",
        "first",
        "last",
        "tiles",
        "n_rows",
    ]
)
def derivative_kernel(
    student_ptr,
    student_width,
    student_stride_b,
    student_stride_r,
    student_stride_k,
    teacher_ptr,
    teacher_width,
    teacher_stride_b,
    teacher_stride_r,
    teacher_stride_k,
    coefficients_ptr,  # (2, samples, batch · rows)
    statistics_ptr,  # (PLANES, samples, batch · rows)
    scale_ptr,  # (2, batch · rows)
    kept_ptr,
    h_ptr,  # (1 or 2 if SPLIT, problems, last − first blocks of ROWS, columns of COLS)
    q_ptr,  # (problems, columns, last − first blocks of ROWS)
    row_units,  # rows / ROW_UNIT
    samples,  # of a problem
    row_blocks,  # of a sample
    first_problem,
    problems,  # in this launch
    first,  # its row blocks: [first, last)
    last,
    n_rows,  # batch · rows
    tiles,  # of a problem, in this launch
    student_factor,
    teacher_factor,
    inv_temperature,
    STUDENT_UNIT: tl.constexpr,
    STUDENT_ROWS_INNER: tl.constexpr,
    TEACHER_UNIT: tl.constexpr,
    TEACHER_ROWS_INNER: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COSINE: tl.constexpr,
    DISTANCE: tl.constexpr,
    NEGATE: tl.constexpr,
    KEPT: tl.constexpr,
    MIRROR: tl.constexpr,  # the tiles I ≤ J of whole problems, else all tiles of some row blocks
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of H to a program, its mirror image, and their parts of q."""
    Q: tl.constexpr = ROWS // COLS
    rows = row_units * ROW_UNIT
    columns = samples * row_blocks * Q
    band = last - first
    here_problem = (tl.program_id(0) // tiles).to(tl.int64)  # in this launch
    tile = tl.program_id(0) % tiles
    if MIRROR:
        row, col = triangle(tile, first, last, columns, Q)
    else:
        row = first + tile // columns
        col = tile % columns
    problem = first_problem + here_problem
    b_i = problem * samples + row // row_blocks
    b_j = problem * samples + col // (row_blocks * Q)
    r_i = row % row_blocks * ROWS + tl.arange(0, ROWS)
    r_j = col % (row_blocks * Q) * COLS + tl.arange(0, COLS)
    if col % (row_blocks * Q) * COLS < rows:
        here_i = r_i < rows
        here_j = r_j < rows
        index_i = b_i * rows + r_i
        index_j = b_j * rows + r_j
        if COSINE:
            s_i = tl.load(scale_ptr + index_i, mask=here_i, other=0.0)
            s_j = tl.load(scale_ptr + index_j, mask=here_j, other=0.0)
        if KEPT:
            kept = kept_tile(kept_ptr, problem, row, col, columns, row_blocks, ROWS, COLS)
            e_s = tl.load(kept)
            e_t = tl.load(kept + ROWS * COLS)
        else:
            e_s = products(student_ptr, student_width, student_stride_b, student_stride_r, student_stride_k,
                           b_i, r_i, here_i, b_j, r_j, here_j,
                           STUDENT_UNIT, STUDENT_ROWS_INNER, ROWS, COLS, DEPTH, PRECISION)  # fmt: skip
            e_t = products(teacher_ptr, teacher_width, teacher_stride_b, teacher_stride_r, teacher_stride_k,
                           b_i, r_i, here_i, b_j, r_j, here_j,
                           TEACHER_UNIT, TEACHER_ROWS_INNER, ROWS, COLS, DEPTH, PRECISION)  # fmt: skip
            if COSINE:
                e_s = scaled(e_s, s_i, s_j)
                e_t = scaled(e_t, tl.load(scale_ptr + n_rows.to(tl.int64) + index_i, mask=here_i, other=0.0),
                             tl.load(scale_ptr + n_rows.to(tl.int64) + index_j, mask=here_j, other=0.0))  # fmt: skip
            else:
                e_s = e_s * student_factor
                e_t = e_t * teacher_factor

        kappa = inv_temperature * LOG2E
        plane = n_rows.to(tl.int64) * samples
        # Row i's coefficients against the sample of j, and the other way round.
        index_i += (b_j - problem * samples) * n_rows
        index_j += (b_i - problem * samples) * n_rows
        if DISTANCE == "kl maxima":
            v_s = -e_s if NEGATE else e_s
            v_t = -e_t if NEGATE else e_t
            h = _one_sided(v_s, v_t, coefficients_ptr, statistics_ptr, plane, index_i, here_i, kappa, 1)
            h += _one_sided(v_s, v_t, coefficients_ptr, statistics_ptr, plane, index_j, here_j, kappa, 0)
        else:
            a_i = tl.load(coefficients_ptr + index_i, mask=here_i, other=0.0)
            a_j = tl.load(coefficients_ptr + index_j, mask=here_j, other=0.0)
            a = a_i[:, None] + a_j[None, :]
            if DISTANCE == "mse":
                h = (e_s - e_t) * a
            else:
                d_i = tl.load(coefficients_ptr + plane + index_i, mask=here_i, other=0.0)
                d_j = tl.load(coefficients_ptr + plane + index_j, mask=here_j, other=0.0)
                if DISTANCE == "kl":
                    f_s = tl.exp2(((-e_s if NEGATE else e_s) - 1.0) * kappa)
                    f_t = tl.exp2(((-e_t if NEGATE else e_t) - 1.0) * kappa)
                    h = f_s * a - f_t * (d_i[:, None] + d_j[None, :])
                else:
                    h = e_t * (d_i[:, None] + d_j[None, :]) + (e_s - e_t) * a
        valid = here_i[:, None] & here_j[None, :]
        if COSINE:
            valid = valid & ((row * ROWS + tl.arange(0, ROWS))[:, None] != (col * COLS + tl.arange(0, COLS))[None, :])
        h = tl.where(valid, h, 0.0)

        across = columns.to(tl.int64) * COLS
        down = band.to(tl.int64) * ROWS
        q_ptr += here_problem * columns * down
        h_ptr += here_problem * down * across
        plane = problems.to(tl.int64) * down * across
        at_i = (row - first) * ROWS + tl.arange(0, ROWS)
        at_j = col * COLS + tl.arange(0, COLS)
        if COSINE:
            # Padding holds 0·NaN of a row's scale otherwise.
            q = tl.where(valid, h * e_s, 0.0)
            h = tl.where(valid, h * s_i[:, None] * s_j[None, :], 0.0)
            tl.store(q_ptr + col * down + at_i, tl.sum(q, axis=1))
        else:
            h = h * student_factor
        _store_h(h, h_ptr + at_i.to(tl.int64)[:, None] * across + at_j[None, :], plane, SPLIT)
        if MIRROR and col >= Q * (row + 1):
            if COSINE:
                tl.store(q_ptr + row * Q * down + at_j, tl.sum(q, axis=0))
            _store_h(h, h_ptr + at_j.to(tl.int64)[None, :] * across + at_i[:, None], plane, SPLIT)
