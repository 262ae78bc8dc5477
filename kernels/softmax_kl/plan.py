"""Block shapes of the ``softmax_kl`` kernels, and how the forward splits long rows across programs."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from fastkd.kernels.launch import MAX_REGISTERS, launch_options

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


def unit_for(cols: int, strides: tuple[int, ...], itemsize: int) -> int:
    """Return the largest number of elements, up to 16 bytes, that divides the length and the strides of all rows.

    Triton vectorises only loads whose alignment it can prove, and specialises arguments only on divisibility by 16, but
    rows of 900 elements are divisible by 4. Lengths and strides are therefore passed in units, a constant.
    """
    return math.gcd(cols, *strides, 16 // itemsize)


class Plan(NamedTuple):
    """The arguments of a call's launches that follow from its shape, strides and dtype."""

    sizes: tuple[int, int, int]  # number of rows, rows per sample, columns in units
    strides: tuple[int, ...]  # of the student's and the teacher's samples and rows, in units
    parts: int  # of each row in the forward
    part_blocks: int  # blocks of columns of each part
    forward: dict[str, Any]  # options of the launches
    merge: dict[str, Any]  # of split rows
    backward: dict[str, Any]


@functools.lru_cache(256)
def plan_for(
    shape: tuple[int, int, int], student: tuple[int, ...], teacher: tuple[int, ...], dtype: torch.dtype
) -> Plan:
    """Return the plan of inputs (B, R, N) with these strides; shapes repeat from step to step, so it is cached."""
    batch, rows, cols = shape
    blocks = blocks_for(cols, dtype.itemsize)
    parts, part_cols = parts_for(batch * rows, cols) if blocks.rows == 1 else (1, cols)
    strides = (*student[:2], *teacher[:2])
    unit = unit_for(cols, strides, dtype.itemsize)
    row_blocks = ceil_div(batch * rows, blocks.rows)
    constants = {"ROWS": blocks.rows, "COLS": blocks.cols, "UNIT": unit, "num_warps": blocks.warps}
    return Plan(
        (batch * rows, rows, cols // unit),
        tuple(stride // unit for stride in strides),
        parts,
        ceil_div(part_cols, blocks.cols),
        launch_options(
            (row_blocks, parts),
            {
                **constants,
                "LOOP": cols > blocks.cols,
                "SPLIT": parts > 1,
                "enable_fp_fusion": True,
                **MAX_REGISTERS,
            },
        ),
        launch_options((batch * rows,), {"PARTS": MAX_PARTS, "num_warps": 1, "enable_fp_fusion": True}),
        launch_options(
            (row_blocks, ceil_div(cols, blocks.cols)),
            {**constants, "enable_fp_fusion": False},  # fused, p_s − p_t would leave the rounding error of one product
        ),
    )
