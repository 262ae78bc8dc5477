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

from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels._common import LOG2E, cdiv, launching_on, round_to
from fastkd.kernels._relation_plan import Plan
from fastkd.kernels._relation_tiles import (
    Operand,
    columns_from,
    kept_tile,
    multiply,
    products,
    row_pointers,
    scaled,
    triangle,
    unit_of,
    width_of,
)
from fastkd.kernels.relation import DTYPES, PRECISION, Options, inner_units, row_cosine
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
# which is exactly 0 where the student is the teacher. What is stored is s_i H_ij s_j, so that the product takes the rows
# as they are: in fp32, or for bfloat16 rows as the sum of two bfloat16 numbers, 16 bits of H, multiplied one by one.
# A cosine's diagonal is 1 whatever x: it is left out, instead of being subtracted again with q.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def _coefficients(
    g, statistics_ptr, plane, index, here, inv_temperature, rows, DISTANCE: tl.constexpr, NEGATE: tl.constexpr
):
    """(A, D, m_S, m_T) of rows."""
    zero = tl.zeros_like(g)
    if DISTANCE == "mse":
        return 2.0 * g / rows, zero, zero, zero
    ptr = statistics_ptr + index
    if DISTANCE == "row_cosine":
        n2 = tl.load(ptr, mask=here, other=1.0)
        m2 = tl.load(ptr + plane, mask=here, other=1.0)
        d2 = tl.load(ptr + 2 * plane, mask=here, other=0.0)
        dot = tl.load(ptr + 3 * plane, mask=here, other=0.0)
        loss, n, m, apart = row_cosine(n2, m2, d2, dot)
        v = tl.where(m2 <= 1e-24, m2 * 1e24, 1.0)
        c = 0.5 * (1.0 + v - loss)
        # c m − n = (1 − loss/2) m − n, and 1 + v = 2 but for a floored m
        less = tl.where(m2 <= 1e-24, c * m - n, -apart - 0.5 * loss * m)
        half = 2.0 * g / n / n
        dead = n2 <= 1e-24
        return tl.where(dead, 0.0, half * c), tl.where(dead, 0.0, half * (less / m)), zero, zero
    g = (-g if NEGATE else g) * inv_temperature
    if DISTANCE == "kl":
        a = g / tl.load(ptr, mask=here, other=1.0)
        return a, a - g / tl.load(ptr + plane, mask=here, other=1.0), zero, zero
    m_s = tl.load(ptr, mask=here, other=0.0)
    a = g / tl.load(ptr + plane, mask=here, other=1.0)
    m_t = tl.load(ptr + 2 * plane, mask=here, other=0.0)
    return a, a - g / tl.load(ptr + 3 * plane, mask=here, other=1.0), m_s, m_t


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
        "grad_stride_b",
        "grad_stride_r",
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
    grad_ptr,  # (batch, rows), strides below, possibly 0
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
    tiles,  # of a problem, in this launch
    n_rows,  # batch · rows
    grad_stride_b,
    grad_stride_r,
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

        g_i = tl.load(grad_ptr + b_i * grad_stride_b + r_i.to(tl.int64) * grad_stride_r, mask=here_i, other=0.0)
        g_j = tl.load(grad_ptr + b_j * grad_stride_b + r_j.to(tl.int64) * grad_stride_r, mask=here_j, other=0.0)
        kappa = inv_temperature * LOG2E
        plane = n_rows.to(tl.int64) * samples
        # Row i's statistics against the sample of j, and the other way round.
        a_i, d_i, ms_i, mt_i = _coefficients(
            g_i / samples, statistics_ptr, plane, (b_j - problem * samples) * n_rows + index_i, here_i,
            inv_temperature, rows, DISTANCE, NEGATE)  # fmt: skip
        a_j, d_j, ms_j, mt_j = _coefficients(
            g_j / samples, statistics_ptr, plane, (b_i - problem * samples) * n_rows + index_j, here_j,
            inv_temperature, rows, DISTANCE, NEGATE)  # fmt: skip
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
        if MIRROR:
            if col >= Q * (row + 1):
                if COSINE:
                    tl.store(q_ptr + row * Q * down + at_j, tl.sum(q, axis=0))
                _store_h(h, h_ptr + at_j.to(tl.int64)[None, :] * across + at_i[:, None], plane, SPLIT)


# ---------------------------------------------------------------------------------------------------------------------
# The product. For a block of rows i and of columns k
#
#     dX_ik = Σ_j (s_i H_ij s_j) x_jk − s_i² q_i x_ik     ("mean" and "dot": without the last term)
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["row_units", "samples", "row_blocks", "first_problem", "problems", "first", "last", "n_rows"])
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
    width = width_of(student_width, STUDENT_UNIT, STUDENT_ROWS_INNER)
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
    off = columns_from(student_stride_k, k, STUDENT_UNIT, STUDENT_ROWS_INNER)
    step = tl.full((), DEPTH, tl.int64) * (student_stride_r if STUDENT_ROWS_INNER else student_stride_r * STUDENT_UNIT)
    acc = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for other in range(0, samples):
        h_at = h_row + other * (row_blocks * ROWS)
        x_at = row_pointers(student_ptr, problem * samples + other, depth, student_stride_b, student_stride_r,
                            STUDENT_UNIT, STUDENT_ROWS_INNER)[:, None] + off[None, :]  # fmt: skip
        for start in range(0, rows, DEPTH):
            x = tl.load(x_at, mask=(start + depth < rows)[:, None] & (k < width)[None, :], other=0.0)
            if SPLIT:
                acc = multiply(tl.load(h_at), x, acc, PRECISION)
                acc = multiply(tl.load(h_at + plane), x, acc, PRECISION)
            else:
                acc = multiply(tl.load(h_at), x.to(tl.float32), acc, PRECISION)
            h_at += DEPTH
            x_at += step

    mask = here_i[:, None] & (k < width)[None, :]
    if COSINE:
        q = tl.zeros((ROWS,), dtype=tl.float32)
        q_row = q_ptr + here_problem * columns * down + at_i
        for start in range(0, columns, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            used = (slot < columns) & (slot % (row_blocks * Q) * COLS < rows)
            if MIRROR and Q > 1:  # a mirrored tile is ROWS columns wide
                used = used & ((slot >= row * Q) | (slot % Q == 0))
            q += tl.sum(tl.load(q_row[None, :] + slot.to(tl.int64)[:, None] * down,
                                mask=used[:, None] & here_i[None, :], other=0.0), axis=0)  # fmt: skip
        s = tl.load(scale_ptr + b_i * rows + r_i, mask=here_i, other=0.0)
        own = row_pointers(student_ptr, b_i, r_i, student_stride_b, student_stride_r, STUDENT_UNIT, STUDENT_ROWS_INNER)
        x = tl.load(own[:, None] + off[None, :], mask=mask, other=0.0).to(tl.float32)
        acc -= x * s[:, None] * (q * s)[:, None]
        acc = tl.where((s >= 1e12)[:, None], 0.0, acc)
    out = row_pointers(grad_ptr, b_i, r_i, grad_stride_b, grad_stride_r, GRAD_UNIT, GRAD_ROWS_INNER)[:, None]
    out += columns_from(grad_stride_k, k, GRAD_UNIT, GRAD_ROWS_INNER)[None, :]
    tl.store(out, round_to(acc, grad_ptr.dtype.element_ty), mask=mask)


SLOTS = 16


def backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, kept: Tensor, grad_student: Tensor,
    options: Options, cross: bool, limit: int,
) -> None:  # fmt: skip
    """Fill ``grad_student`` (B, R, K) of any strides from a per-row gradient (B, R) of any strides."""
    batch, rows, width = student.shape
    plan = Plan(batch, rows, cross, options.method, DTYPES[student.dtype])
    networks = (Operand.of(student), Operand.of(teacher))
    layout, row_unit = inner_units(*networks, rows)
    blocks, product = plan.tiles, plan.product
    scales = statistics[-2:]
    split = student.dtype == torch.bfloat16
    out = Operand.of(grad_student)
    out_unit = unit_of(rows, largest=8) if networks[0].rows_inner or out.rows_inner else 1
    with launching_on(student):
        for launch in plan.launches(plan.backward_bytes(), limit):
            first_problem, problems, first, last = launch
            band = last - first
            mirror = band == plan.blocks
            tiles = plan.triangle(launch) if mirror else band * plan.columns
            size = problems * band * blocks.rows * plan.columns
            h = torch.empty(
                (2 if split else 1) * size * blocks.cols,
                dtype=torch.bfloat16 if split else torch.float32,
                device=student.device,
            )
            q = torch.empty(size, dtype=torch.float32, device=student.device)
            derivative_kernel[(problems * tiles,)](
                *networks[0].arguments,
                *networks[1].arguments,
                grad_loss,
                statistics,
                scales,
                kept,
                h,
                q,
                rows // row_unit,
                plan.samples,
                plan.row_blocks,
                first_problem,
                problems,
                first,
                last,
                tiles,
                batch * rows,
                *grad_loss.stride(),
                options.factor(width),
                options.factor(teacher.shape[2]),
                1.0 / options.temperature,
                **layout,
                **options.constants(),
                KEPT=kept.numel() > 0 and mirror,
                MIRROR=mirror,
                SPLIT=split,
                PRECISION=PRECISION[plan.dtype],
                ROWS=blocks.rows,
                COLS=blocks.cols,
                DEPTH=blocks.depth,
                **blocks.launch(),
            )
            product_kernel[(problems * band * cdiv(width, product.cols),)](
                h,
                q,
                scales,
                *networks[0].arguments,
                *out.arguments,
                rows // out_unit,
                plan.samples,
                plan.row_blocks,
                first_problem,
                problems,
                first,
                last,
                batch * rows,
                STUDENT_UNIT=networks[0].unit,
                STUDENT_ROWS_INNER=networks[0].rows_inner,
                GRAD_UNIT=out.unit,
                GRAD_ROWS_INNER=out.rows_inner,
                ROW_UNIT=out_unit,
                COSINE=options.similarity == "cosine",
                MIRROR=mirror,
                SPLIT=split,
                PRECISION="ieee" if split else "tf32x3",
                SLOTS=SLOTS,
                ROWS=blocks.rows,
                COLS=blocks.cols,
                WIDTH=product.cols,
                DEPTH=product.depth,
                **product.launch(),
            )
