r"""Backward of ``relation`` in Triton: H, the derivative with respect to the similarities, and the product H X.

E is symmetric. With :math:`H_{ij} = \partial L / \partial E_{ij} + \partial L / \partial E_{ji}`, where L is the sum of
the losses weighted with their incoming gradients g,

.. math:: \partial / \partial x_i = s_i \Bigl( \sum_j H_{ij} \hat x_j - \hat x_i q_i \Bigr), \qquad
          q_i = \sum_j H_{ij} E_{ij} = \hat x_i \cdot \sum_j H_{ij} \hat x_j

for cosines, where s is the scale 1/max(|x|, 1e-12) and the term with q makes the gradient orthogonal to x_i; otherwise
the gradient is :math:`\sum_j H_{ij} x_j` times 1/K ("mean") or 1 ("dot"). Rows of norm ≤ 1e-12 get no gradient.

A launch writes H of as many whole problems as fit in the workspace, computing only tiles I ≤ J and storing each with
its mirror image; if not even one fits, H of some row blocks of a problem. Each sum is computed by one program in a
fixed order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastkd.kernels.common import dot_add, launching_on, round_to
from fastkd.kernels.launch import launch_options
from fastkd.kernels.relation.call import PLANS, UNREAD, Call, Ints, Networks, Operand
from fastkd.kernels.relation.derivative import coefficients_kernel, derivative_kernel
from fastkd.kernels.relation.plan import Blocks
from fastkd.kernels.relation.tiles import UNSPECIALISED, WIDENS
from torch import Tensor

from fastkd._integers import ceil_div


# ---------------------------------------------------------------------------------------------------------------------
# The product. For a block of rows i and columns k,
#
#     dX_ik = Σ_j (s_i H_ij s_j) x_jk − s_i² q_i x_ik     ("mean" and "dot": without the last term),
#
# where derivative_kernel has written parts of s_i q_i.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(**UNSPECIALISED)
def product_kernel(
    h_ptr,  # H and q, as derivative_kernel wrote them
    q_ptr,
    scale_ptr,  # (2, batch · rows)
    student_ptr,
    student_width,
    student_stride_b,
    student_stride_outer,
    student_stride_inner,
    grad_ptr,  # output (B, R, K)
    grad_width,
    grad_stride_b,
    grad_stride_outer,
    grad_stride_inner,
    row_units,
    samples,
    row_blocks,
    first_problem,
    first,
    last,
    n_rows,
    cosine,  # 0 or 1
    STUDENT_UNIT: tl.constexpr,
    STUDENT_ROWS_INNER: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    GRAD_ROWS_INNER: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    MIRROR: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # of the tiles of H
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,  # divides COLS
):
    """Compute ``ROWS`` rows × ``WIDTH`` columns of the gradient per program."""
    Q: tl.constexpr = ROWS // COLS
    rows = row_units * ROW_UNIT
    columns = samples * row_blocks * Q
    band = last - first
    R_UNIT: tl.constexpr = 1 if STUDENT_ROWS_INNER else STUDENT_UNIT
    K_UNIT: tl.constexpr = STUDENT_UNIT if STUDENT_ROWS_INNER else 1
    GRAD_R_UNIT: tl.constexpr = 1 if GRAD_ROWS_INNER else GRAD_UNIT
    GRAD_K_UNIT: tl.constexpr = GRAD_UNIT if GRAD_ROWS_INNER else 1
    student_stride_r = student_stride_inner if STUDENT_ROWS_INNER else student_stride_outer
    student_stride_k = student_stride_outer if STUDENT_ROWS_INNER else student_stride_inner
    grad_stride_r = grad_stride_inner if GRAD_ROWS_INNER else grad_stride_outer
    grad_stride_k = grad_stride_outer if GRAD_ROWS_INNER else grad_stride_inner
    width = student_width * R_UNIT
    across_blocks = (width + WIDTH - 1) // WIDTH
    index = tl.program_id(0)
    k = index % across_blocks * WIDTH + tl.arange(0, WIDTH)
    index = index // across_blocks
    local = index % band
    local_problem = (index // band).to(tl.int64)
    problem = first_problem + local_problem
    row = first + local
    b_i = problem * samples + row // row_blocks
    r_i = row % row_blocks * ROWS + tl.arange(0, ROWS)
    mask_i = r_i < rows

    across = columns.to(tl.int64) * COLS
    down = band.to(tl.int64) * ROWS
    at_i = local * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    h_row = h_ptr + local_problem * down * across + at_i.to(tl.int64)[:, None] * across + depth[None, :]
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
            if WIDENS or h_ptr.dtype.element_ty.is_fp32():
                x = x.to(tl.float32)
                h = h.to(tl.float32)
            acc = dot_add(h, x, acc, PRECISION)
            h_at += DEPTH
            x_at += step

    mask = mask_i[:, None] & (k < width)[None, :]
    if cosine != 0:
        q = tl.full((ROWS,), 0.0, tl.float32)
        q_row = q_ptr + local_problem * columns * down + at_i
        for start in range(0, columns, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            used = (slot < columns) & (slot % (row_blocks * Q) * COLS < rows)
            if MIRROR and Q > 1:  # a mirrored tile is ROWS columns wide
                used = used & ((slot >= row * Q) | (slot % Q == 0))
            q += tl.sum(tl.load(q_row[None, :] + slot.to(tl.int64)[:, None] * down,
                                mask=used[:, None] & mask_i[None, :], other=0.0), axis=0)  # fmt: skip
        s = tl.load(scale_ptr + b_i * rows + r_i, mask=mask_i, other=0.0)
        own = b_i * student_stride_b * STUDENT_UNIT + r_i.to(tl.int64) * student_stride_r * R_UNIT
        x = tl.load(student_ptr + own[:, None], mask=mask, other=0.0).to(tl.float32)
        acc -= x * (q * s)[:, None]
        acc = tl.where((s >= 1e12)[:, None], 0.0, acc)
    out = grad_ptr + (b_i * grad_stride_b * GRAD_UNIT + r_i.to(tl.int64) * grad_stride_r * GRAD_R_UNIT)[:, None]
    out += (k.to(tl.int64) * grad_stride_k * GRAD_K_UNIT)[None, :]
    tl.store(out, round_to(acc, grad_ptr.dtype.element_ty), mask=mask)


COEFFICIENTS_BLOCK = 256


def product_constants(blocks: Blocks, dtype: str) -> dict[str, Any]:
    """Return the constants specific to the product; H of bfloat16 rows is bfloat16 too."""
    precision = "ieee" if dtype == "bf16" else "tf32x3"
    return {"WIDTH": blocks.cols, "DEPTH": blocks.depth, "PRECISION": precision, "SLOTS": 16}


class ProductLaunch(NamedTuple):
    """The arguments of ``derivative_kernel`` and ``product_kernel`` for one part of a call, without tensors."""

    elements: int  # of q; those of H are ``COLS`` times as many
    reads_stored: bool
    tiles_sizes: tuple[int | float, ...]
    tiles_options: dict[str, Any]
    product_sizes: tuple[int, ...]
    product_options: dict[str, Any]


class BackwardPlan(NamedTuple):
    """The launches of a backward."""

    coefficients: int
    coefficients_sizes: tuple[int, int, int]
    coefficients_options: dict[str, Any]
    grad: Operand
    columns: int  # of a tile of H
    launches: tuple[ProductLaunch, ...]


@functools.lru_cache(PLANS)
def _plan(call: Call, limit: int, grad_stride: Ints) -> BackwardPlan:
    """Return the launches of a backward whose parts of H take at most ``limit`` bytes at a time."""
    grid, shape, product = call.plan.backward, call.plan.backward.shape, call.plan.product
    own = call.networks.student
    grad = Operand.of((call.batch, call.rows, call.width), grad_stride, call.itemsize, own.unit)
    launches = []
    for launch in grid.launches(call.plan.backward_bytes(), limit):
        mirror = launch.band == grid.blocks
        tiles = grid.triangle(launch) if mirror else launch.band * grid.columns
        place = (grid.samples, grid.row_blocks, launch.first_problem, launch.first, launch.last, call.n_rows)
        read = mirror and call.stored > 0
        # Stored tiles replace the inputs, whose layouts then need no compilations.
        networks = Networks(UNREAD, UNREAD) if read else call.networks
        blocks = shape if read else call.plan.blocks_for(shape, own.unit)
        launches.append(
            ProductLaunch(
                launch.problems * launch.band * shape.rows * grid.columns,
                read,
                (call.rows // networks.row_unit, *place, tiles, *call.factors),
                launch_options(
                    (launch.problems * tiles,),
                    {"STORED": read, "MIRROR": mirror, **call.constants(networks, blocks, fused=False)},
                ),
                (call.rows // call.networks.row_unit, *place, int(call.cosine)),
                launch_options(
                    (launch.problems * launch.band * ceil_div(call.width, product.cols),),
                    {
                        "STUDENT_UNIT": own.unit,
                        "STUDENT_ROWS_INNER": own.rows_inner,
                        "GRAD_UNIT": grad.unit,
                        "GRAD_ROWS_INNER": grad.rows_inner,
                        "ROW_UNIT": call.networks.row_unit,
                        "MIRROR": mirror,
                        "ROWS": shape.rows,
                        "COLS": shape.cols,
                        **product_constants(product, call.plan.dtype),
                        **product.launch(),
                    },
                ),
            )
        )
    return BackwardPlan(
        (3 if call.method == "row_cosine" else 2) * grid.samples * call.n_rows,
        (call.rows, call.n_rows, grid.samples),
        launch_options(
            (ceil_div(call.n_rows, COEFFICIENTS_BLOCK), grid.samples),
            {"DISTANCE": call.method, "BLOCK": COEFFICIENTS_BLOCK, "num_warps": 4, "enable_fp_fusion": True},
        ),
        grad,
        shape.cols,
        tuple(launches),
    )


def backward(
    call: Call,
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    stored: Tensor,
    grad_student: Tensor,
    temperature: float,
    limit: int,
) -> None:
    """Fill ``grad_student`` (B, R, K) of any strides from a per-row gradient (B, R) of any strides.

    H of a launch takes at most ``limit`` bytes, which are at least ``call.min_bytes``.
    """
    plan = _plan(call, limit, grad_student.stride())
    of_student, of_teacher = call.networks.student.sizes, call.networks.teacher.sizes
    inv_temperature = 1 / temperature
    scales = statistics[-2:]
    like = student if student.dtype == torch.bfloat16 else scales  # the dtype of H
    with launching_on(student):
        coefficients = scales.new_empty(plan.coefficients)
        coefficients_kernel.run(
            grad_loss,
            statistics,
            coefficients,
            *plan.coefficients_sizes,
            *grad_loss.stride(),
            inv_temperature,
            **plan.coefficients_options,
        )
        for launch in plan.launches:
            h, q = like.new_empty(launch.elements * plan.columns), scales.new_empty(launch.elements)
            derivative_kernel.run(
                student,
                *(UNREAD.sizes if launch.reads_stored else of_student),
                teacher,
                *(UNREAD.sizes if launch.reads_stored else of_teacher),
                coefficients,
                statistics,
                scales,
                stored,
                h,
                q,
                *launch.tiles_sizes,
                inv_temperature,
                **launch.tiles_options,
            )
            product_kernel.run(
                h,
                q,
                scales,
                student,
                *of_student,
                grad_student,
                *plan.grad.sizes,
                *launch.product_sizes,
                **launch.product_options,
            )
