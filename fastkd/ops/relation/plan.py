"""Which form the kernels of ``relation`` take: by size, and by what the workspace holds."""

from __future__ import annotations

import torch

from fastkd.ops import workspace

STORED_BLOCK = 48
"""Side of the tiles of stored relation matrices, as in ``csrc/common/relation.h``."""

MAX_STORED_BYTES = 2048 * 2048 * 4
"""Larger relation matrices are recomputed in the backward even where they may be stored: H would fill the workspace."""

MAX_GRAM_WIDTH = 1024
"""Wider rows would make Gram matrices of more than 32 MiB."""

ENOUGH_TILES = 264
"""Below so many tiles of 128 rows and columns the CUDA kernels take smaller ones, as in csrc/cuda/relation/plan.h."""

FIXED_SHIFT_TEMPERATURE = 0.04
"""From here on cosines need no maxima of their own there."""

_GRAM_CHUNK, _STORED_CHUNK, _STREAMED_BLOCK = 256, 256, 96  # as in csrc/cpu/relation/plan.h


def gram_side(width_s: int, width_t: int) -> int:
    """Return the side of the padded Gram matrix of both networks' columns."""
    return _up(width_s, 16) + _up(width_t, 16)


def gram_double(width_s: int, width_t: int, dtype: torch.dtype) -> bool:
    """Whether the Gram matrices of rows of ``dtype`` are fp64, as in ``csrc/common/relation.h``."""
    return dtype == torch.float64 or (width_s != width_t and dtype != torch.bfloat16)


def stored_elements(
    batch: int, rows: int, dtype: torch.dtype, similarity: str, distance: str, temperature: float
) -> int:
    """The numbers that the CUDA kernels keep of a sample's relation matrices, as in ``csrc/cuda/relation/plan.cpp``."""
    blocks = -(-rows // 128)
    maxima = distance == "kl" and not (similarity == "cosine" and temperature >= FIXED_SHIFT_TEMPERATURE)
    enough = rows > 64 and batch * (blocks * (blocks + 1) // 2) >= ENOUGH_TILES
    side = 128 if enough and dtype != torch.float32 and not maxima else 64
    blocks = -(-rows // side)
    return batch * blocks * (blocks + 1) * side**2


def choose_form(
    rows: int, columns: int, width_s: int, width_t: int, dtype: torch.dtype, distance: str, keep: bool, backend: str
) -> str:
    """Chosen once, for the forward and the backward: "streamed", "stored" or, in C++, "gram"."""
    width = max(width_s, width_t)
    keep = keep and rows**2 * _size(dtype) <= MAX_STORED_BYTES
    if backend in ("triton", "cuda"):
        return "stored" if keep else "streamed"
    if distance == "mse" and width <= MAX_GRAM_WIDTH and _gram_pays(columns, width, width_s == width_t, dtype):
        form, least = "gram", _least_gram(width_s, width_t, dtype)
    elif keep:
        form, least = "stored", _least_stored(rows, _size(dtype))
    else:
        return "streamed"
    return form if least <= workspace.limit() else "streamed"


def _gram_pays(columns: int, width: int, equal: bool, dtype: torch.dtype) -> bool:
    """As measured (docs/decisions.md): tiles multiply bfloat16 faster, and unequal widths of other dtypes take fp64."""
    if dtype == torch.bfloat16:
        return columns >= 3 * width
    return 2 * columns >= 5 * width if equal else columns >= 4 * width


def _least_gram(width_s: int, width_t: int, dtype: torch.dtype) -> int:
    """The least workspace that the form does with, one thread working (``plan_gram``)."""
    size = 8 if gram_double(width_s, width_t, dtype) else 4
    student, side = _up(width_s, 16), gram_side(width_s, width_t)
    chunk, block = _GRAM_CHUNK * side, _STREAMED_BLOCK * side
    forward = chunk + 2 * block
    backward = chunk + _GRAM_CHUNK * student + student * side + block + 3 * _STREAMED_BLOCK * student
    return size * max(forward, backward)


def _least_stored(rows: int, size: int) -> int:
    """The same (``plan_relation``)."""
    padded = _up(rows, STORED_BLOCK)
    forward = padded * _STORED_CHUNK * size
    backward = 2 * padded * STORED_BLOCK * size + padded**2 * size + _up(padded * 8, 64)
    return 4 * STORED_BLOCK**2 * size + max(forward, backward)


def _size(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float64 else 4


def _up(count: int, multiple: int) -> int:
    return (count + multiple - 1) // multiple * multiple
