r"""The backward of ``relation``: H, the derivative by the similarities, and the product H X.

E is symmetric, so with :math:`H_{ij}` = ∂/∂E_ij + ∂/∂E_ji of the losses times their gradients g,

.. math:: \partial / \partial x_i = s_i \Bigl( \sum_j H_{ij} \hat x_j - \hat x_i q_i \Bigr), \qquad
          q_i = \sum_j H_{ij} E_{ij} = \hat x_i \cdot \sum_j H_{ij} \hat x_j

for cosines, s being the scales 1/max(|x|, 1e-12) and q what makes the gradient orthogonal to x_i; otherwise
:math:`\sum_j H_{ij} x_j` times 1/K or 1. A row of norm ≤ 1e-12 gets none.

H is written for as many problems, or as many row blocks of one problem, as the workspace holds: whole problems from the
tiles I ≤ J alone, each stored with its mirror image. Every sum has one owner and a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from fastkd.kernels._common import LOG2E, cdiv, launching_on, round_to
from fastkd.kernels._relation_tiles import (
    WIDENS,
    Operand,
    kept_tile,
    products,
    scaled,
    triangle,
)
from fastkd.kernels.relation import Call, Options, row_cosine
from torch import Tensor


# ---------------------------------------------------------------------------------------------------------------------
# H. With each row's coefficients from its statistics and its gradient g (over the samples, where they are averaged),
#
#     kl            H = f_T (D_i + D_j) + (f_S − f_T) (A_i + A_j),   f as in the forward,
#                   A = gσ/(τ z_S),  D = gσ/(τ z_S) − gσ/(τ z_T);    with maxima f differs between i and j
#     mse           H = (E^S − E^T) (A_i + A_j),                     A = 2g/R
#     row_cosine    H = (E^S − E^T) (A_i + A_j) + E^T (D_i + D_j),
#                   A = 2gc/n²,  D = A − 2g/(n m),  c = u_S · u_T;   no gradient where n ≤ 1e-12
#
# which is exactly 0 where the student is the teacher. What is stored is s_i H_ij s_j, so that the product takes rows as
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
        d = a - g / tl.load(ptr + Z_T * plane, mask=here, other=1.0)
    tl.store(coefficients_ptr + index, a, mask=here)
    tl.store(coefficients_ptr + plane + index, d, mask=here)


@triton.jit
def _derivative(
    e_s, e_t, a_i, d_i, ms_i, mt_i, a_j, d_j, ms_j, mt_j, kappa, DISTANCE: tl.constexpr, NEGATE: tl.constexpr
):
    """H of one tile."""
    if DISTANCE == "mse":
        return (e_s - e_t) * (a_i[:, None] + a_j[None, :])
    if DISTANCE == "row_cosine":
        return (e_s - e_t) * (a_i[:, None] + a_j[None, :]) + e_t * (d_i[:, None] + d_j[None, :])
    v_s = -e_s if NEGATE else e_s
    v_t = -e_t if NEGATE else e_t
    if DISTANCE == "kl":
        f_s = tl.exp2((v_s - 1.0) * kappa)
        f_t = tl.exp2((v_t - 1.0) * kappa)
        return f_t * (d_i[:, None] + d_j[None, :]) + (f_s - f_t) * (a_i[:, None] + a_j[None, :])
    f_s = tl.exp2((v_s - ms_i[:, None]) * kappa)
    f_t = tl.exp2((v_t - mt_i[:, None]) * kappa)
    h = f_t * d_i[:, None] + (f_s - f_t) * a_i[:, None]
    f_s = tl.exp2((v_s - ms_j[None, :]) * kappa)
    f_t = tl.exp2((v_t - mt_j[None, :]) * kappa)
    return h + (f_t * d_j[None, :] + (f_s - f_t) * a_j[None, :])


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
        a_i = tl.load(coefficients_ptr + index_i, mask=here_i, other=0.0)
        a_j = tl.load(coefficients_ptr + index_j, mask=here_j, other=0.0)
        d_i, d_j, ms_i, ms_j, mt_i, mt_j = a_i, a_j, a_i, a_j, a_i, a_j
        if DISTANCE != "mse":
            d_i = tl.load(coefficients_ptr + plane + index_i, mask=here_i, other=0.0)
            d_j = tl.load(coefficients_ptr + plane + index_j, mask=here_j, other=0.0)
        if DISTANCE == "kl maxima":
            ms_i = tl.load(statistics_ptr + index_i, mask=here_i, other=0.0)
            ms_j = tl.load(statistics_ptr + index_j, mask=here_j, other=0.0)
            mt_i = tl.load(statistics_ptr + 2 * plane + index_i, mask=here_i, other=0.0)
            mt_j = tl.load(statistics_ptr + 2 * plane + index_j, mask=here_j, other=0.0)
        h = _derivative(e_s, e_t, a_i, d_i, ms_i, mt_i, a_j, d_j, ms_j, mt_j, kappa, DISTANCE, NEGATE)
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


# ---------------------------------------------------------------------------------------------------------------------
# The product. For a block of rows i and of columns k
#
#     dX_ik = Σ_j (s_i H_ij s_j) x_jk − s_i² q_i x_ik     ("mean" and "dot": without the last term)
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(
    do_not_specialize=["row_units", "samples", "row_blocks", "first_problem", "problems", "first", "last", "n_rows"]
)
def product_kernel(
    h_ptr,  # as derivative_kernel wrote them
    q_ptr,
    scale_ptr,  # (2, batch · rows)
    student_ptr,
    student_width,
    student_stride_b,
    student_stride_r,
    student_stride_k,
    grad_ptr,
    grad_width,
    grad_stride_b,
    grad_stride_r,
    grad_stride_k,
    row_units,
    samples,
    row_blocks,
    first_problem,
    problems,
    first,
    last,
    n_rows,
    STUDENT_UNIT: tl.constexpr,
    STUDENT_ROWS_INNER: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    GRAD_ROWS_INNER: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COSINE: tl.constexpr,
    MIRROR: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # of the tiles of H
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,  # divides COLS
):
    """``ROWS`` rows and ``WIDTH`` columns of the gradient to a program."""
    Q: tl.constexpr = ROWS // COLS
    rows = row_units * ROW_UNIT
    columns = samples * row_blocks * Q
    band = last - first
    R_UNIT: tl.constexpr = 1 if STUDENT_ROWS_INNER else STUDENT_UNIT
    K_UNIT: tl.constexpr = STUDENT_UNIT if STUDENT_ROWS_INNER else 1
    GRAD_R_UNIT: tl.constexpr = 1 if GRAD_ROWS_INNER else GRAD_UNIT
    GRAD_K_UNIT: tl.constexpr = GRAD_UNIT if GRAD_ROWS_INNER else 1
    width = student_width * R_UNIT
    across_blocks = (width + WIDTH - 1) // WIDTH
    index = tl.program_id(0)
    k = index % across_blocks * WIDTH + tl.arange(0, WIDTH)
    index = index // across_blocks
    local = index % band
    here_problem = (index // band).to(tl.int64)
    problem = first_problem + here_problem
    row = first + local
    b_i = problem * samples + row // row_blocks
    r_i = row % row_blocks * ROWS + tl.arange(0, ROWS)
    here_i = r_i < rows

    across = columns.to(tl.int64) * COLS
    down = band.to(tl.int64) * ROWS
    at_i = local * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    h_row = h_ptr + here_problem * down * across + at_i.to(tl.int64)[:, None] * across + depth[None, :]
    plane = problems.to(tl.int64) * down * across
    student_ptr += (k.to(tl.int64) * student_stride_k * K_UNIT)[None, :]
    step = tl.full((), DEPTH, tl.int64) * student_stride_r * R_UNIT
    acc = tl.full((ROWS, WIDTH), 0.0, tl.float32)
    for other in range(0, samples):
        h_at = h_row + other * (row_blocks * ROWS)
        x_at = student_ptr + (problem * samples + other) * student_stride_b * STUDENT_UNIT
        x_at += (depth.to(tl.int64) * student_stride_r * R_UNIT)[:, None]
        for start in range(0, rows, DEPTH):
            x = tl.load(x_at, mask=(start + depth < rows)[:, None] & (k < width)[None, :], other=0.0)
            h = tl.load(h_at)
            if WIDENS or not SPLIT:
                x = x.to(tl.float32)
                h = h.to(tl.float32)
            acc = tl.dot(h, x, acc, input_precision=PRECISION)
            if SPLIT:
                h = tl.load(h_at + plane)
                if WIDENS:
                    h = h.to(tl.float32)
                acc = tl.dot(h, x, acc, input_precision=PRECISION)
            h_at += DEPTH
            x_at += step

    mask = here_i[:, None] & (k < width)[None, :]
    if COSINE:
        q = tl.full((ROWS,), 0.0, tl.float32)
        q_row = q_ptr + here_problem * columns * down + at_i
        for start in range(0, columns, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            used = (slot < columns) & (slot % (row_blocks * Q) * COLS < rows)
            if MIRROR and Q > 1:  # a mirrored tile is ROWS columns wide
                used = used & ((slot >= row * Q) | (slot % Q == 0))
            q += tl.sum(tl.load(q_row[None, :] + slot.to(tl.int64)[:, None] * down,
                                mask=used[:, None] & here_i[None, :], other=0.0), axis=0)  # fmt: skip
        s = tl.load(scale_ptr + b_i * rows + r_i, mask=here_i, other=0.0)
        own = b_i * student_stride_b * STUDENT_UNIT + r_i.to(tl.int64) * student_stride_r * R_UNIT
        x = tl.load(student_ptr + own[:, None], mask=mask, other=0.0).to(tl.float32)
        acc -= x * s[:, None] * (q * s)[:, None]
        acc = tl.where((s >= 1e12)[:, None], 0.0, acc)
    out = grad_ptr + (b_i * grad_stride_b * GRAD_UNIT + r_i.to(tl.int64) * grad_stride_r * GRAD_R_UNIT)[:, None]
    out += (k.to(tl.int64) * grad_stride_k * GRAD_K_UNIT)[None, :]
    tl.store(out, round_to(acc, grad_ptr.dtype.element_ty), mask=mask)


SLOTS = 16
COEFFICIENTS_BLOCK = 256


def backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    kept: Tensor,
    grad_student: Tensor,
    options: Options,
    limit_for: Callable[[int], int],
) -> None:
    """Fill ``grad_student`` (B, R, K) of any strides from a per-row gradient (B, R) of any strides.

    H takes at most ``limit_for`` (what one row block needs) bytes at a time.
    """
    call = Call(student, teacher, options, kept.numel() > 0)
    grid, shape, product = call.plan.backward, call.plan.backward.shape, call.plan.product
    limit = limit_for(call.plan.least_bytes())
    scales = statistics[-2:]
    split = student.dtype == torch.bfloat16
    out = Operand.of(grad_student)
    new = lambda size, dtype=torch.float32: torch.empty(size, dtype=dtype, device=student.device)
    with launching_on(student):
        coefficients = new(2 * grid.samples * call.n_rows)
        coefficients_kernel[(cdiv(call.n_rows, COEFFICIENTS_BLOCK), grid.samples)](
            grad_loss,
            statistics,
            coefficients,
            call.rows,
            call.n_rows,
            grid.samples,
            *grad_loss.stride(),
            call.inv_temperature,
            DISTANCE=call.method,
            NEGATE=call.negate,
            BLOCK=COEFFICIENTS_BLOCK,
            num_warps=4,
        )
        for launch in grid.launches(call.plan.backward_bytes(), limit):
            mirror = launch.band == grid.blocks
            tiles = grid.triangle(launch) if mirror else launch.band * grid.columns
            size = launch.problems * launch.band * shape.rows * grid.columns
            h = new((1 + split) * size * shape.cols, torch.bfloat16 if split else torch.float32)
            q = new(size)
            place = (
                call.rows // call.row_unit,
                grid.samples,
                grid.row_blocks,
                launch.first_problem,
                launch.problems,
                launch.first,
                launch.last,
                call.n_rows,
            )
            derivative_kernel[(launch.problems * tiles,)](
                *call.networks,
                coefficients,
                statistics,
                scales,
                kept,
                h,
                q,
                *place,
                tiles,
                *call.factors,
                call.inv_temperature,
                KEPT=mirror and kept.numel() > 0,
                MIRROR=mirror,
                SPLIT=split,
                **call.constants(shape),
            )
            product_kernel[(launch.problems * launch.band * cdiv(student.shape[2], product.cols),)](
                h,
                q,
                scales,
                *call.student.arguments,
                *out.arguments,
                *place,
                STUDENT_UNIT=call.student.unit,
                STUDENT_ROWS_INNER=call.student.rows_inner,
                GRAD_UNIT=out.unit,
                GRAD_ROWS_INNER=out.rows_inner,
                ROW_UNIT=call.row_unit,
                COSINE=call.cosine,
                MIRROR=mirror,
                SPLIT=split,
                PRECISION="ieee" if split else "tf32x3",
                SLOTS=SLOTS,
                ROWS=shape.rows,
                COLS=shape.cols,
                WIDTH=product.cols,
                DEPTH=product.depth,
                **product.launch(),
            )
