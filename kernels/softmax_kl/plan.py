"""Block shapes of the ``softmax_kl`` kernels, and how the forward splits long rows across programs."""

from __future__ import annotations

from typing import NamedTuple

from fastkd.kernels.common import cdiv


class Blocks(NamedTuple):
    """How one kernel instance is cut: ``rows`` × ``cols`` elements at a time, by ``warps`` warps."""

    rows: int
    cols: int
    warps: int


SHORT = (Blocks(64, 16, 4), Blocks(16, 64, 4), Blocks(4, 256, 4))
"""Rows that fit one of these blocks: several rows to a program."""

LONG = Blocks(1, 1024, 4)
"""Longer rows: one row to a program, which loops where needed. The block never widens, so no row length spills."""

PROGRAMS = 512
"""Fewer rows than this leave part of a large GPU idle in the forward (an H100 has 132 processors): long ones are split
between programs."""

PART = 4096
"""The least columns that a part is made for."""

MOST_PARTS = 64


def blocks_for(cols: int, itemsize: int) -> Blocks:
    """The blocks for rows of ``cols`` elements; half as many elements where one takes 8 bytes, i.e. for fp64."""
    blocks = next((blocks for blocks in SHORT if cols <= blocks.cols), LONG)
    if itemsize < 8:
        return blocks
    return blocks._replace(rows=blocks.rows // 2) if blocks.rows > 1 else blocks._replace(cols=blocks.cols // 2)


def parts_for(rows: int, cols: int) -> tuple[int, int]:
    """How many programs share a row of the forward, and the columns of each: few long rows are split."""
    parts = max(1, min(PROGRAMS // rows, cols // PART, MOST_PARTS))
    columns = cdiv(cdiv(cols, parts), LONG.cols) * LONG.cols
    return cdiv(cols, columns), columns
