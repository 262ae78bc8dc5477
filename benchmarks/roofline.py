"""The least that any implementation of a work must do without holding an N×N matrix, and how long that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.workloads import Work


def arithmetic(work: Work) -> str:
    """The dtype in which the products that :func:`minimum` counts have to be made.

    It is the inputs', but for the K×K matrices of "mse". Rows of bfloat16 divided by their norms are bfloat16 no more.
    Unequal widths cancel: fp64 keeps the plain formula's digits where the networks' relations nearly agree, float's
    sums do not, unless the inputs are bfloat16 (docs/decisions.md).
    """
    if work.family != "relation" or work.distance != "mse":
        return work.dtype_name
    _, rows, width_s, width_t = work.relation_sizes
    narrow, dtype = _narrow(work, rows, width_s, width_t, True)
    return dtype if _narrow_is_less(narrow, dtype, _tiles(work, rows, width_s, width_t, True)) else work.dtype_name


def minimum(work: Work, mode: str) -> dict[str, int]:
    """Bytes moved to and from memory, operations of matrix products, exponentials: ``forward`` or ``both``.

    Elementwise operations are not counted: they hide behind the bytes and exponentials of the same elements.
    """
    both = mode == "both"
    size = torch.empty((), dtype=work.dtype).element_size()
    if work.family == "softmax_kl":
        elements = torch.Size(work.shape).numel()
        # Forward: S and T read. Backward: S and T read, the gradient written.
        return {"bytes": (5 if both else 2) * elements * size, "flop": 0, "exp": (4 if both else 2) * elements}
    if work.family == "relation":
        batch, rows, width_s, width_t = work.relation_sizes
        elements = batch * rows * (width_s + width_t)
        moved = 2 * elements + batch * rows * width_s if both else elements
        flop, exp = _relation(work, rows, width_s, width_t, both)
        return {"bytes": moved * size, "flop": batch * flop, "exp": batch * exp}
    batch, pixels, words, width = work.shape
    # Forward: both networks' pixels. Backward: the student's again, and its gradient. The words are few.
    moved = batch * pixels * width * (4 if both else 2)
    # M_S, M_T; AᵀA, BᵀB (halves of symmetric matrices), AᵀB. Backward: dV, dL, and dA = A·X + B·Y with X, Y T×T.
    # A, B and what they were made from are N×T, so they may be kept: one exponential per element and network.
    flop = 4 * pixels * words * width + 4 * pixels * words**2
    if both:
        flop += 4 * pixels * words * width + 4 * pixels * words**2
    return {"bytes": moved * size, "flop": batch * flop, "exp": batch * 2 * pixels * words}


def _keeps(work: Work) -> bool:
    return work.loss == "channel_kd"  # R×R = C×C may be kept, N×N may not and is made again in the backward


def _relation(work: Work, rows: int, width_s: int, width_t: int, both: bool) -> tuple[int, int]:
    """Operations and exponentials of one sample."""
    tiles = _tiles(work, rows, width_s, width_t, both)
    if work.distance == "kl":
        # E_ij serves both rows i and j, in each network: two exponentials per pair, R² in all, and again if not kept.
        return tiles, rows**2 * (2 if both and not _keeps(work) else 1)
    narrow, dtype = _narrow(work, rows, width_s, width_t, both)
    return narrow if _narrow_is_less(narrow, dtype, tiles) else tiles, 0


def _tiles(work: Work, rows: int, width_s: int, width_t: int, both: bool) -> int:
    """A symmetric matrix needs half its entries: R²K operations."""
    grams = rows**2 * (width_s + width_t)
    product = 2 * rows**2 * width_s  # dX = H X
    return grams + (product + (0 if _keeps(work) else grams) if both else 0)


def _narrow(work: Work, rows: int, width_s: int, width_t: int, both: bool) -> tuple[int, str]:
    """The mean squared error from AᵀA, BᵀB (halves) and AᵀB, all K×K; backward A·AᵀA − B·BᵀA. And its arithmetic."""
    narrow = rows * (width_s**2 + width_t**2 + 2 * width_s * width_t)
    if both:
        narrow += 2 * rows * (width_s**2 + width_s * width_t)
    exact = work.dtype == torch.float64 or (width_s != width_t and work.dtype != torch.bfloat16)
    return narrow, "float64" if exact else "float32"


def _narrow_is_less(narrow: int, dtype: str, tiles: int) -> bool:
    return (2 if dtype == "float64" else 1) * narrow < tiles  # a vector holds half as many doubles


def seconds(least: dict[str, int], ceilings: dict[str, float], dtype: str) -> float:
    """The least time at the machine's measured rates, products being made in ``dtype``.

    Products and exponentials use the same units of a core, so their times add; moving bytes can go on meanwhile.
    """
    product = ceilings["matmul_flop_per_s"]
    if dtype == "bfloat16":
        product = max(product, ceilings.get("matmul_bf16_flop_per_s", 0.0))
    elif dtype == "float64":  # not measured on GPUs, nor by older results
        product = ceilings.get("matmul_fp64_flop_per_s", product)
    compute = least["flop"] / product + least["exp"] / ceilings["exp_per_s"]
    return max(least["bytes"] / ceilings["copy_bytes_per_s"], compute)
