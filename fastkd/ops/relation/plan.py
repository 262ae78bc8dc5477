"""Options and sizes of a ``relation`` call, and the form in which its kernels compute it.

Forms: "streamed" recomputes tiles of the relation matrices in the backward; "stored" keeps the matrices for it; "gram"
(C++ only) computes the mean squared error from Gram matrices.

Sizes are symbolic under torch.compile, so the native plans cannot compute them; tests compare these formulas with
``csrc/cpu/relation/plan.cpp`` and ``csrc/cuda/relation/plan.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._integers import ceil_div, round_up
from fastkd.ops.launch import workspace_limit

Shape = Sequence[int]

STORED_BLOCK = 48
"""Side of the tiles of stored relation matrices, as in ``csrc/common/relation.h``."""

MAX_STORED_BYTES = 2048 * 2048 * 4
"""Larger relation matrices are never stored: H would fill a CPU's workspace in the backward."""

MAX_GRAM_WIDTH = 1024
"""The Gram matrices of wider rows would exceed 32 MiB."""

ENOUGH_TILES = 264
"""If there are fewer 128×128 tiles, the CUDA kernels use smaller ones, as in ``csrc/cuda/relation/plan.h``."""

FIXED_SHIFT_TEMPERATURE = 0.04
"""At or above it the CUDA kernels need no row maxima of cosines, as in ``csrc/cuda/relation/plan.h``."""

_GRAM_CHUNK, _STORED_CHUNK, _STREAMED_BLOCK = 256, 256, 96  # as in csrc/cpu/relation/plan.h


class Options(NamedTuple):
    """The operators' options, in the order of their schemas."""

    similarity: str
    distance: str
    temperature: float | Tensor
    negate: bool
    cross: bool
    form: str  # "streamed", "stored" or "gram"
    backend: str


class Sizes(NamedTuple):
    """Sizes of the tensors that a forward saves for its backward."""

    planes: int  # statistics per row
    stored: int  # elements of the stored matrices
    statistics_dtype: torch.dtype
    stored_dtype: torch.dtype


def choose_form(
    rows: int, columns: int, width_s: int, width_t: int, dtype: torch.dtype, distance: str, keep: bool, backend: str
) -> str:
    """Return the form of a forward and its backward: "streamed" where the others do not fit the workspace."""
    width = max(width_s, width_t)
    keep = keep and rows**2 * _size(dtype) <= MAX_STORED_BYTES
    if backend != "cpu":
        return "stored" if keep else "streamed"
    if distance == "mse" and width <= MAX_GRAM_WIDTH and _prefers_gram(columns, width, width_s == width_t, dtype):
        form, minimum = "gram", min_gram_bytes(width_s, width_t, dtype)
    elif keep:
        form, minimum = "stored", min_stored_bytes(rows, dtype)
    else:
        return "streamed"
    return form if minimum <= workspace_limit(torch.device("cpu")) else "streamed"


MIN_KEPT_WIDTH = {torch.bfloat16: 470, torch.float16: 160, torch.float32: 80}
"""Width of rows from which a GPU reads both relation matrices faster than it multiplies the rows again.

Counted, not measured: an element of the matrices costs 8 bytes written and read, or 2K FLOP of the half that is
computed, three times as many for fp16 and six for fp32. An H100's 3 TB/s and about 350 TFLOP/s give K = 470.
"""


def keeping_pays(student: Tensor, teacher: Tensor) -> bool:
    """Return whether a backward should read the stored relation matrices of these rows instead of recomputing them."""
    if student.device.type != "cuda":
        return True
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.shape[2] + teacher.shape[2] >= 2 * MIN_KEPT_WIDTH.get(dtype, 0)


def _prefers_gram(columns: int, width: int, equal_widths: bool, dtype: torch.dtype) -> bool:
    """Return whether Gram matrices were measured faster than tiles (docs/decisions.md).

    bfloat16 tiles are faster, and Gram matrices of unequal widths need fp64 for other dtypes.
    """
    if dtype == torch.bfloat16:
        return columns >= 3 * width
    return 2 * columns >= 5 * width if equal_widths else columns >= 4 * width


def gram_side(width_s: int, width_t: int) -> int:
    """Return the side of the Gram matrix of both networks' columns, each padded to a multiple of 16."""
    return round_up(width_s, 16) + round_up(width_t, 16)


def has_double_gram(width_s: int, width_t: int, dtype: torch.dtype) -> bool:
    """Return whether the Gram matrices of rows of ``dtype`` are fp64, as in ``csrc/common/relation.h``."""
    return dtype == torch.float64 or (width_s != width_t and dtype != torch.bfloat16)


def stored_elements_cpu(batch: int, rows: int) -> int:
    """Return the number of elements of the relation matrices that the C++ kernels store."""
    blocks = ceil_div(rows, STORED_BLOCK)
    return batch * blocks * (blocks + 1) * STORED_BLOCK**2


def stored_elements(
    batch: int, rows: int, dtype: torch.dtype, similarity: str, distance: str, temperature: float
) -> int:
    """Return the number of elements of the relation matrices that the CUDA kernels store."""
    blocks = ceil_div(rows, 128)
    maxima = distance == "kl" and not (similarity == "cosine" and temperature >= FIXED_SHIFT_TEMPERATURE)
    enough = rows > 64 and batch * (blocks * (blocks + 1) // 2) >= ENOUGH_TILES
    side = 128 if enough and dtype != torch.float32 and not maxima else 64
    blocks = ceil_div(rows, side)
    return batch * blocks * (blocks + 1) * side**2


def min_gram_bytes(width_s: int, width_t: int, dtype: torch.dtype) -> int:
    """Return the smallest workspace of the form "gram", with one thread (``plan_gram``)."""
    size = 8 if has_double_gram(width_s, width_t, dtype) else 4
    student, side = round_up(width_s, 16), gram_side(width_s, width_t)
    chunk, block = _GRAM_CHUNK * side, _STREAMED_BLOCK * side
    forward = chunk + 2 * block
    backward = chunk + _GRAM_CHUNK * student + student * side + block + 3 * _STREAMED_BLOCK * student
    return size * max(forward, backward)


def min_stored_bytes(rows: int, dtype: torch.dtype) -> int:
    """Return the smallest workspace of the form "stored", with one thread (``plan_relation``)."""
    size, padded = _size(dtype), round_up(rows, STORED_BLOCK)
    forward = padded * _STORED_CHUNK * size
    backward = 2 * padded * STORED_BLOCK * size + padded**2 * size + round_up(padded * 8, 64)
    return 4 * STORED_BLOCK**2 * size + max(forward, backward)


# --- FLOP (fastkd/ops/flops.py) ---------------------------------------------------------------------------------------


def forward_flops(student: Shape, teacher: Shape, *arguments: Any) -> int:
    """Return the FLOP of X Xᵀ of both networks; in the form "gram" of ZᵀZ and W G (``csrc/common/relation.h``)."""
    options, both_widths = Options(*arguments), student[2] + teacher[2]
    if options.form == "gram":
        return 2 * 2 * student[0] * student[1] * both_widths**2
    return 2 * _row_pairs(student, options.cross) * both_widths


def backward_flops(
    grad_loss: Shape, student: Shape, teacher: Shape, statistics: Shape, stored: Shape, *arguments: Any
) -> int:
    """Return the FLOP of H X_S, and of X Xᵀ of both networks if recomputed; in the form "gram" those of W G.

    In the form "gram", an incoming gradient that differs between rows takes three times as many; shapes do not tell.
    """
    options = Options(*arguments)
    if options.form == "gram":  # the student's columns of W G
        return 2 * student[0] * student[1] * student[2] * (student[2] + teacher[2])
    recomputed = forward_flops(student, teacher, *options) if options.form == "streamed" else 0
    return recomputed + 2 * _row_pairs(student, options.cross) * student[2]


def _row_pairs(student: Shape, cross: bool) -> int:
    """Return the number of elements of a network's relation matrices."""
    batch, rows = student[:2]
    return (batch * rows) ** 2 if cross else batch * rows**2


def _size(dtype: torch.dtype) -> int:
    """Return the bytes of an element of the relation matrices."""
    return 8 if dtype == torch.float64 else 4
