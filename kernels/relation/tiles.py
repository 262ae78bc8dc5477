"""What the relation kernels share: operands of any layout, tiles of relation matrices, and the numbering of tiles.

A *problem* is one pair of relation matrices: a sample's, or with ``cross`` that of all samples' rows together. Every
sample's rows are cut into blocks of ``ROWS`` (the last may be short), numbered through the problem: block I belongs to
sample I // row_blocks. Columns are the same rows, in blocks of ``COLS``: ``Q = ROWS // COLS`` of them are a row block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from fastkd.kernels.common import INTERPRETED
from torch import Tensor

WIDENS = tl.constexpr(INTERPRETED)
"""The interpreter multiplies no bfloat16."""


LOWEST = tl.constexpr(-3.4028234663852886e38)
"""As a running maximum the lowest finite number stands for −inf, without its −inf − (−inf) = NaN."""


def unit_of(*numbers: int, largest: int) -> int:
    """The largest power of two up to ``largest`` that divides all ``numbers``."""
    unit = largest
    while any(n % unit for n in numbers):
        unit //= 2
    return unit


class Operand(NamedTuple):
    """(B, R, K) of any strides, as a kernel is given it: the arguments ``tensor, width, stride_b, stride_r, stride_k``.

    Triton only loads several elements at once where it can prove that they are aligned. It looks for factors of 16;
    a row of 900 has a factor of 4. So strides are passed in units of ``unit`` elements, a constant of the kernel: all
    but that of the inner dimension, whose length is passed in units instead if it is the width.
    """

    tensor: Tensor
    width: int
    strides: tuple[int, int, int]
    rows_inner: bool  # the rows' stride is 1 and the columns' is not: a map seen as rows of pixels
    unit: int

    @classmethod
    def of(cls, x: Tensor) -> Operand:
        """Return the operand of a (B, R, K) tensor."""
        rows, width = x.shape[1:]
        by_batch, by_row, by_col = x.stride()
        largest = 16 // x.element_size()
        if by_col != 1 and by_row == 1:
            unit = unit_of(by_batch, by_col, rows, largest=largest)
            return cls(x, width, (by_batch // unit, 1, by_col // unit), True, unit)
        if by_col == 1:
            unit = unit_of(by_batch, by_row, width, largest=largest)
            return cls(x, width // unit, (by_batch // unit, by_row // unit, 1), False, unit)
        return cls(x, width, (by_batch, by_row, by_col), False, 1)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the operand as arguments of a kernel."""
        return (self.tensor, self.width, *self.strides)


@triton.jit
def products(
    x_ptr,
    width,
    stride_b,
    stride_r,
    stride_k,
    b_i,
    r_i,
    here_i,
    b_j,
    r_j,
    here_j,
    UNIT: tl.constexpr,
    ROWS_INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """⟨x_i, x_j⟩ of the rows r_i of sample b_i and r_j of b_j, summed in fp32; 0 where a row is not ``here``."""
    R_UNIT: tl.constexpr = 1 if ROWS_INNER else UNIT
    K_UNIT: tl.constexpr = UNIT if ROWS_INNER else 1
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
        a = tl.load(a_ptr, mask=here_i[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptr, mask=here_j[None, :] & inside[:, None], other=0.0)
        if WIDENS:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptr += step
        b_ptr += step
    return acc


@triton.jit
def triangle(index, first, last, columns, Q: tl.constexpr):
    """Tile ``index`` (I, J) of the row blocks [first, last), each of which has the tiles J = Q I, ..., columns − 1.

    A row block and its counterpart from the other end have as many tiles as any other such pair.
    """
    pair = 2 * columns - Q * (first + last - 1)
    i = index // pair
    left = index % pair
    mine = columns - Q * (first + i)
    row = tl.where(left < mine, first + i, last - 1 - i)
    return row, Q * row + tl.where(left < mine, left, left - mine)


@triton.jit
def scaled(product, scale_i, scale_j):
    """Cosines from dot products."""
    return product * scale_i[:, None] * scale_j[None, :]


@triton.jit
def kept_tile(kept_ptr, problem, row, col, columns, row_blocks, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where the student's tile (row, col) is kept, as (ROWS, COLS) contiguous numbers; the teacher's follows.

    A problem's tiles take (n + 1) n ROWS² numbers, n its row blocks, also where ROWS is twice COLS.
    """
    Q: tl.constexpr = ROWS // COLS
    tile = row * columns - Q * (row * (row - 1) // 2) + (col - Q * row)
    size = (row_blocks + 1).to(tl.int64) * row_blocks * (ROWS * ROWS)
    cell = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    return kept_ptr + problem * size + tile.to(tl.int64) * (2 * ROWS * COLS) + cell
