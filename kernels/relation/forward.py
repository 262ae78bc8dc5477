r"""Forward of ``relation`` in Triton: a per-row distance between the self-relation matrices of two sets of rows.

With :math:`\hat x_i = x_i / \max(|x_i|, 10^{-12})` ("cosine") and :math:`E_{ij} = \langle \hat x_i, \hat x_j \rangle`
("mean": :math:`\langle x_i, x_j \rangle / K`, "dot": :math:`\langle x_i, x_j \rangle`) for the student (S) and the
teacher (T), the loss of row i is

.. math:: \mathrm{KL}(\operatorname{softmax}(\sigma E^T_i/\tau) \| \operatorname{softmax}(\sigma E^S_i/\tau)), \qquad
          \frac{1}{R} \sum_j (E^S_{ij} - E^T_{ij})^2, \qquad
          \Bigl| \frac{E^S_i}{|E^S_i|} - \frac{E^T_i}{|E^T_i|} \Bigr|^2 .

The forward has three kernels. The first computes the norms; the second the tiles of both matrices, one pair of blocks
I ≤ J per program, and reduces each immediately to a few sums for its rows and, because E is symmetric, for its columns;
the third merges these sums in a fixed order. No matrix is written, except small ones for the backward (form "stored").
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E, launching_on
from fastkd.kernels.launch import MAX_REGISTERS, launch_options
from fastkd.kernels.relation.call import PLANS, Call
from fastkd.kernels.relation.merge import merge_kernel
from fastkd.kernels.relation.plan import PLANES
from fastkd.kernels.relation.tiles import (
    LOWEST,
    UNSPECIALISED,
    products,
    scaled,
    stored_tile,
    triangle,
)
from torch import Tensor

from fastkd._integers import ceil_div


# ---------------------------------------------------------------------------------------------------------------------
# Norms: scale = 1/max(|x|, 1e-12) of the rows of both networks. A scale of 1e12 marks a row without a gradient.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def _store_scales(
    x_ptr,
    width,
    stride_b,
    stride_outer,
    stride_inner,
    scale_ptr,
    row,
    rows,
    in_range,
    UNIT: tl.constexpr,
    ROWS_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Store the scales of the rows ``row``."""
    R_UNIT: tl.constexpr = 1 if ROWS_INNER else UNIT
    K_UNIT: tl.constexpr = UNIT if ROWS_INNER else 1
    stride_r = stride_inner if ROWS_INNER else stride_outer
    stride_k = stride_outer if ROWS_INNER else stride_inner
    width = width * R_UNIT
    k = tl.arange(0, DEPTH)
    ptr = x_ptr + (row // rows * stride_b * UNIT + row % rows * stride_r * R_UNIT)[:, None]
    ptr += (k.to(tl.int64) * stride_k * K_UNIT)[None, :]
    step = tl.full((), DEPTH, tl.int64) * stride_k * K_UNIT
    squares = tl.full((BLOCK, DEPTH), 0.0, tl.float32)
    for start in range(0, width, DEPTH):
        x = tl.load(ptr, mask=in_range[:, None] & (start + k < width)[None, :], other=0.0).to(tl.float32)
        squares += x * x
        ptr += step
    square = tl.sum(squares, axis=1)
    tl.store(scale_ptr + row, tl.where(square <= 1e-24, 1e12, 1.0 / tl.sqrt_rn(square)), mask=in_range)


@triton.jit(**UNSPECIALISED)
def scales_kernel(
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
    scale_ptr,  # output (2, batch · rows)
    rows,
    n_rows,  # batch · rows
    STUDENT_UNIT: tl.constexpr,
    STUDENT_ROWS_INNER: tl.constexpr,
    TEACHER_UNIT: tl.constexpr,
    TEACHER_ROWS_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute the scales of ``BLOCK`` rows per program, of the student or the teacher."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = row < n_rows
    if tl.program_id(1) == 0:
        _store_scales(student_ptr, student_width, student_stride_b, student_stride_outer, student_stride_inner,
                scale_ptr, row, rows, in_range, STUDENT_UNIT, STUDENT_ROWS_INNER, BLOCK, DEPTH)  # fmt: skip
    else:
        _store_scales(teacher_ptr, teacher_width, teacher_stride_b, teacher_stride_outer, teacher_stride_inner,
                scale_ptr + n_rows.to(tl.int64), row, rows, in_range,
                TEACHER_UNIT, TEACHER_ROWS_INNER, BLOCK, DEPTH)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tiles. With E^S and E^T of one tile, v = σE, κ = log2(e)/τ and d = E^S − E^T, the sums over its columns (AXIS 1: one
# per row) or over its rows (AXIS 0) are as follows. In the code e_s and e_t are v: σ is part of the factors.
#
#     kl            z_x = Σ f_x, f_x = 2^{κ(v_x − 1)},  a = Σ f_T (v_T − v_S)
#     kl maxima     m_x = max v_x,  z_x = Σ 2^{κ(v_x − m_x)},  a = Σ 2^{κ(v_T − m_T)} (v_T − v_S)
#     mse           Σ d²
#     row_cosine    Σ E^S²,  Σ E^T²,  Σ d²,  Σ d (E^S + E^T),  Σ E^S E^T
#
# v_T = −inf has weight 0, and 0·(v_T − v_S) counts as 0 for any v_S. NaN and +inf propagate to the sums.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def _store_sums(e_s, e_t, valid, kappa, out_ptr, plane, DISTANCE: tl.constexpr, AXIS: tl.constexpr):
    """Store the sums of one tile along AXIS, one plane per sum."""
    if DISTANCE == "kl":
        f_s = tl.where(valid, tl.exp2((e_s - 1.0) * kappa), 0.0)
        f_t = tl.where(valid, tl.exp2((e_t - 1.0) * kappa), 0.0)
        tl.store(out_ptr, tl.sum(f_s, axis=AXIS))
        tl.store(out_ptr + plane, tl.sum(f_t, axis=AXIS))
        tl.store(out_ptr + 2 * plane, tl.sum(tl.where(valid, f_t * (e_t - e_s), 0.0), axis=AXIS))
    elif DISTANCE == "kl maxima":
        v_s = tl.where(valid, e_s, float("-inf"))
        v_t = tl.where(valid, e_t, float("-inf"))
        m_s = tl.maximum(tl.max(v_s, axis=AXIS), LOWEST)
        m_t = tl.maximum(tl.max(v_t, axis=AXIS), LOWEST)
        f_s = tl.exp2((v_s - tl.expand_dims(m_s, AXIS)) * kappa)
        f_t = tl.exp2((v_t - tl.expand_dims(m_t, AXIS)) * kappa)
        tl.store(out_ptr, m_s)
        tl.store(out_ptr + plane, tl.sum(f_s, axis=AXIS))
        tl.store(out_ptr + 2 * plane, m_t)
        tl.store(out_ptr + 3 * plane, tl.sum(f_t, axis=AXIS))
        tl.store(out_ptr + 4 * plane, tl.sum(tl.where(f_t == 0.0, 0.0, f_t * (v_t - v_s)), axis=AXIS))
    else:
        d = tl.where(valid, e_s - e_t, 0.0)
        if DISTANCE == "mse":
            tl.store(out_ptr, tl.sum(d * d, axis=AXIS))
        else:
            e_s = tl.where(valid, e_s, 0.0)
            e_t = tl.where(valid, e_t, 0.0)
            tl.store(out_ptr, tl.sum(e_s * e_s, axis=AXIS))
            tl.store(out_ptr + plane, tl.sum(e_t * e_t, axis=AXIS))
            tl.store(out_ptr + 2 * plane, tl.sum(d * d, axis=AXIS))
            tl.store(out_ptr + 3 * plane, tl.sum(d * (e_s + e_t), axis=AXIS))
            tl.store(out_ptr + 4 * plane, tl.sum(e_s * e_t, axis=AXIS))


@triton.jit(**UNSPECIALISED)
def tiles_kernel(
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
    scale_ptr,  # (2, batch · rows)
    by_row_ptr,  # output (problems, PLANES, columns, last − first row blocks of ROWS)
    by_col_ptr,  # output (problems, PLANES, last − first, columns of COLS)
    stored_ptr,  # output, if STORE: the tiles (tiles.py)
    row_units,  # rows / ROW_UNIT
    samples,  # of a problem
    row_blocks,  # of a sample
    first_problem,
    first,  # row blocks of this launch: [first, last)
    last,
    tiles,  # of a problem, in this launch
    n_rows,  # batch · rows
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
    STORE: tl.constexpr,
    PLANES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute one tile per program: the sums of its rows and, off the diagonal, of its columns."""
    Q: tl.constexpr = ROWS // COLS
    rows = row_units * ROW_UNIT
    columns = samples * row_blocks * Q
    local_problem = (tl.program_id(0) // tiles).to(tl.int64)  # in this launch
    problem = first_problem + local_problem
    row, col = triangle(tl.program_id(0) % tiles, first, last, columns, Q)
    b_i = problem * samples + row // row_blocks
    b_j = problem * samples + col // (row_blocks * Q)
    r_i = row % row_blocks * ROWS + tl.arange(0, ROWS)
    r_j = col % (row_blocks * Q) * COLS + tl.arange(0, COLS)
    if col % (row_blocks * Q) * COLS < rows:
        mask_i = r_i < rows
        mask_j = r_j < rows
        e_s = products(student_ptr, student_width, student_stride_b, student_stride_outer, student_stride_inner,
                       b_i, r_i, mask_i, b_j, r_j, mask_j,
                       STUDENT_UNIT, STUDENT_ROWS_INNER, ROWS, COLS, DEPTH, PRECISION)  # fmt: skip
        e_t = products(teacher_ptr, teacher_width, teacher_stride_b, teacher_stride_outer, teacher_stride_inner,
                       b_i, r_i, mask_i, b_j, r_j, mask_j,
                       TEACHER_UNIT, TEACHER_ROWS_INNER, ROWS, COLS, DEPTH, PRECISION)  # fmt: skip
        scale_i = scale_ptr + b_i * rows + r_i
        scale_j = scale_ptr + b_j * rows + r_j
        if COSINE:
            e_s = scaled(e_s, tl.load(scale_i, mask=mask_i, other=0.0) * student_factor,
                         tl.load(scale_j, mask=mask_j, other=0.0))  # fmt: skip
            e_t = scaled(e_t, tl.load(scale_i + n_rows.to(tl.int64), mask=mask_i, other=0.0) * teacher_factor,
                         tl.load(scale_j + n_rows.to(tl.int64), mask=mask_j, other=0.0))  # fmt: skip
        else:
            e_s = e_s * student_factor
            e_t = e_t * teacher_factor
        if STORE:
            tile_ptr = stored_tile(stored_ptr, problem, row, col, columns, row_blocks, ROWS, COLS)
            tl.store(tile_ptr, e_s)
            tl.store(tile_ptr + ROWS * COLS, e_t)

        valid = mask_i[:, None] & mask_j[None, :]
        kappa = inv_temperature * LOG2E
        band = last - first
        plane = columns.to(tl.int64) * band * ROWS
        out = by_row_ptr + local_problem * PLANES * plane + (col.to(tl.int64) * band + (row - first)) * ROWS
        _store_sums(e_s, e_t, valid, kappa, out + tl.arange(0, ROWS), plane, DISTANCE, 1)
        if col >= Q * (row + 1):
            plane = columns.to(tl.int64) * band * COLS
            out = by_col_ptr + local_problem * PLANES * plane + ((row - first).to(tl.int64) * columns + col) * COLS
            _store_sums(e_s, e_t, valid, kappa, out + tl.arange(0, COLS), plane, DISTANCE, 0)


SCALE_BLOCK = {"BLOCK": 32, "DEPTH": 64}
MERGE_BLOCK = {"BLOCK": 64, "SLOTS": 16}
ROW_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True, **MAX_REGISTERS}
"""Launch options of the kernels without matrix products."""


class TilesLaunch(NamedTuple):
    """The arguments of ``tiles_kernel`` and ``merge_kernel`` for one part of a call, without tensors."""

    row_sums: int  # elements of the tiles' sums
    column_sums: int
    tiles_sizes: tuple[int | float, ...]
    tiles_options: dict[str, Any]
    merge_sizes: tuple[int, ...]
    merge_options: dict[str, Any]


class ForwardPlan(NamedTuple):
    """The launches of a forward."""

    scales_options: dict[str, Any]
    all_written: bool  # whether the tiles cover all of the stored elements
    launches: tuple[TilesLaunch, ...]


@functools.lru_cache(PLANS)
def _plan(call: Call, limit: int) -> ForwardPlan:
    """Return the launches of a forward whose sums take at most ``limit`` bytes at a time."""
    grid, shape, planes = call.plan.forward, call.plan.forward.shape, PLANES[call.method]
    written = shape.rows**2 * grid.row_blocks * (grid.row_blocks + 1) * call.batch
    tiles_constants = {
        "STORE": call.stored > 0,
        "PLANES": planes,
        **call.constants(call.networks, call.plan.blocks_for(shape, call.networks.student.unit)),
    }
    merge_constants = {
        "DISTANCE": call.method,
        "PLANES": planes,
        **MERGE_BLOCK,
        "ROWS": shape.rows,
        "COLS": shape.cols,
        **ROW_LAUNCH,
    }
    launches = []
    for launch in grid.launches(call.plan.forward_bytes(), limit):
        sums = planes * launch.problems * launch.band * grid.columns
        tiles = grid.triangle(launch)
        place = (grid.samples, grid.row_blocks, launch.first_problem, launch.first, launch.last)
        launches.append(
            TilesLaunch(
                sums * shape.rows,
                sums * shape.cols,
                (call.rows // call.networks.row_unit, *place, tiles, call.n_rows, *call.factors),
                launch_options((launch.problems * tiles,), tiles_constants),
                (call.rows, call.n_rows, *place),
                launch_options(
                    (launch.problems * grid.blocks * (shape.rows // MERGE_BLOCK["BLOCK"]),), merge_constants
                ),
            )
        )
    return ForwardPlan(
        launch_options(
            (ceil_div(call.n_rows, SCALE_BLOCK["BLOCK"]), 2), {**call.networks.layout, **SCALE_BLOCK, **ROW_LAUNCH}
        ),
        call.stored <= written and call.rows % shape.rows == 0,
        tuple(launches),
    )


def forward(
    call: Call,
    student: Tensor,
    teacher: Tensor,
    loss: Tensor,
    statistics: Tensor,
    stored: Tensor,
    temperature: float,
    limit: int,
) -> None:
    """Fill ``loss`` (B, R), ``statistics`` (planes, B, R) and, unless it is empty, ``stored``.

    The sums of a launch take at most ``limit`` bytes, which are at least ``call.min_bytes``.
    """
    plan = _plan(call, limit)
    networks = (student, *call.networks.student.sizes, teacher, *call.networks.teacher.sizes)
    inv_temperature = 1 / temperature
    scales = statistics[-2:]
    with launching_on(student):
        if call.cosine:
            scales_kernel.run(*networks, scales, call.rows, call.n_rows, **plan.scales_options)
        else:
            scales.zero_()  # an operator must write every element of its output
        if not plan.all_written:
            stored.zero_()
        for launch in plan.launches:
            by_row, by_col = loss.new_empty(launch.row_sums), loss.new_empty(launch.column_sums)
            tiles_kernel.run(
                *networks,
                scales,
                by_row,
                by_col,
                stored,
                *launch.tiles_sizes,
                inv_temperature,
                **launch.tiles_options,
            )
            merge_kernel.run(
                by_row, by_col, statistics, loss, *launch.merge_sizes, inv_temperature, **launch.merge_options
            )
