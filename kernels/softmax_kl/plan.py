"""Block shapes of the ``softmax_kl`` kernels, and how the forward splits long rows across programs."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fastkd._integers import ceil_div, round_up


class Blocks(NamedTuple):
    """Block shape of a kernel instance: ``rows`` × ``cols`` elements per step, computed by ``warps`` warps."""

    rows: int
    cols: int
    warps: int


SHORT_ROW_BLOCKS = (Blocks(64, 16, 4), Blocks(16, 64, 4), Blocks(4, 256, 4))
"""Blocks for rows that fit into one block: several rows per program."""

LONG_ROW_BLOCK = Blocks(1, 1024, 4)
"""Block for longer rows: one row per program, looping over columns. As the width is fixed, no row length spills."""

TARGET_PROGRAMS = 512
"""Number of programs that keeps a large GPU busy in the forward (an H100 has 132 multiprocessors). If there are fewer
rows, long rows are split across programs."""

MIN_PART_COLS = 4096
"""Minimum number of columns per part of a split row."""

MAX_PARTS = 64
"""Maximum number of parts of a row."""


def blocks_for(cols: int, itemsize: int) -> Blocks:
    """Return the block for rows of ``cols`` elements; fp64 (8-byte) rows get half as many elements."""
    blocks = next((blocks for blocks in SHORT_ROW_BLOCKS if cols <= blocks.cols), LONG_ROW_BLOCK)
    if itemsize < 8:
        return blocks
    return blocks._replace(rows=blocks.rows // 2) if blocks.rows > 1 else blocks._replace(cols=blocks.cols // 2)


def parts_for(rows: int, cols: int) -> tuple[int, int]:
    """Return the number of the forward's programs per row, more than 1 for few long rows, and the columns of each."""
    parts = max(1, min(TARGET_PROGRAMS // rows, cols // MIN_PART_COLS, MAX_PARTS))
    columns = round_up(ceil_div(cols, parts), LONG_ROW_BLOCK.cols)
    return ceil_div(cols, columns), columns


def unit_for(student: Tensor, teacher: Tensor) -> int:
    """Return the largest number of elements, up to 16 bytes, that divides the length and the strides of all rows.

    Triton vectorises only loads whose alignment it can prove, and specialises arguments only on divisibility by 16, but
    rows of 900 elements are divisible by 4. Lengths and strides are therefore passed in units, a constant.
    """
    strides = (*student.stride()[:2], *teacher.stride()[:2])
    return math.gcd(student.shape[2], *strides, 16 // student.element_size())
