"""Tiles of relation matrices, and their numbering.

A *problem* is one pair of relation matrices (student, teacher), of one sample, or with ``cross`` of the rows of all
samples. The rows of each sample form blocks of ``ROWS`` (the last may be partial), numbered across the problem: block I
belongs to sample I // row_blocks. The columns are the same rows in blocks of ``COLS``, ``Q = ROWS // COLS`` per row
block.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastkd.kernels.common import INTERPRETED, dot_add

WIDENS = tl.constexpr(INTERPRETED)
"""Convert bfloat16 operands to fp32, as the interpreter cannot multiply bfloat16."""

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Initial value of running maxima, as −inf − (−inf) would be NaN."""


_SIZES = (
    "rows",
    "row_units",
    "samples",
    "row_blocks",
    "first_problem",
    "problems",
    "first",
    "last",
    "tiles",
    "n_rows",
    "cosine",
)
_OPERANDS = ("student", "teacher", "grad")
UNSPECIALISED: dict[str, Any] = {
    "do_not_specialize": [*_SIZES, *(f"{x}_{n}" for x in _OPERANDS for n in ("width", "stride_b", "stride_outer"))],
    "do_not_specialize_on_alignment": ["scale_ptr", *(f"{x}_stride_inner" for x in _OPERANDS)],
}
"""Options of ``triton.jit``: of sizes and strides, only whether an inner stride is 1 is compiled into a kernel."""


@triton.jit
def products(
    x_ptr,
    width,
    stride_b,
    stride_outer,
    stride_inner,
    b_i,
    r_i,
    mask_i,
    b_j,
    r_j,
    mask_j,
    UNIT: tl.constexpr,
    ROWS_INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return ⟨x_i, x_j⟩ of rows r_i of sample b_i and r_j of b_j, accumulated in fp32; 0 where a row is masked."""
    R_UNIT: tl.constexpr = 1 if ROWS_INNER else UNIT
    K_UNIT: tl.constexpr = UNIT if ROWS_INNER else 1
    stride_r = stride_inner if ROWS_INNER else stride_outer
    stride_k = stride_outer if ROWS_INNER else stride_inner
    width = width * R_UNIT
    k = tl.arange(0, DEPTH)
    off = k.to(tl.int64) * stride_k * K_UNIT
    row_i = b_i.to(tl.int64) * stride_b * UNIT + r_i.to(tl.int64) * stride_r * R_UNIT
    row_j = b_j.to(tl.int64) * stride_b * UNIT + r_j.to(tl.int64) * stride_r * R_UNIT
    a_ptr = x_ptr + row_i[:, None] + off[None, :]
    b_ptr = x_ptr + row_j[None, :] + off[:, None]
    step = tl.full((), DEPTH, tl.int64) * stride_k * K_UNIT
    acc = tl.full((ROWS, COLS), 0.0, tl.float32)
    for start in range(0, width, DEPTH):
        inside = start + k < width
        a = tl.load(a_ptr, mask=mask_i[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptr, mask=mask_j[None, :] & inside[:, None], other=0.0)
        if WIDENS:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = dot_add(a, b, acc, PRECISION)
        a_ptr += step
        b_ptr += step
    return acc


@triton.jit
def triangle(index, first, last, columns, Q: tl.constexpr):
    """Return tile (I, J) number ``index`` of the row blocks [first, last), each with tiles J = Q I ... columns − 1.

    Row blocks are paired from both ends (first with last − 1, and so on), so that each pair has equally many tiles.
    """
    pair = 2 * columns - Q * (first + last - 1)
    i = index // pair
    left = index % pair
    in_first = columns - Q * (first + i)
    row = tl.where(left < in_first, first + i, last - 1 - i)
    return row, Q * row + tl.where(left < in_first, left, left - in_first)


@triton.jit
def scaled(product, scale_i, scale_j):
    """Return cosines from dot products and the rows' scales."""
    return product * scale_i[:, None] * scale_j[None, :]


@triton.jit
def stored_tile(stored_ptr, problem, row, col, columns, row_blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return pointers to the student's stored tile (row, col), (ROWS, COLS) contiguous; the teacher's follows it.

    The tiles of a problem with n row blocks take (n + 1) n ROWS² elements, even if ROWS is twice COLS.
    """
    Q: tl.constexpr = ROWS // COLS
    tile = row * columns - Q * (row * (row - 1) // 2) + (col - Q * row)
    size = (row_blocks + 1).to(tl.int64) * row_blocks * (ROWS * ROWS)
    cell = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    return stored_ptr + problem * size + tile.to(tl.int64) * (2 * ROWS * COLS) + cell
