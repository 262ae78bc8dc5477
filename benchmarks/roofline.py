"""Roofline of a workload: the least memory traffic and arithmetic of any implementation without an N×N matrix."""

from __future__ import annotations

import torch

from benchmarks.workloads import Workload


def arithmetic(workload: Workload) -> str:
    """Return the dtype required by the matrix products that :func:`minimum` counts.

    This is the dtype of the inputs, except for the K×K matrices of "mse": bfloat16 rows divided by their norms need
    float32, and unequal widths need float64, because the terms cancel where the two relations nearly agree; bfloat16
    inputs have too few digits for that to matter (docs/decisions.md).
    """
    if workload.family != "relation" or workload.distance != "mse":
        return workload.dtype_name
    _, rows, width_s, width_t = workload.relation_sizes
    narrow, dtype = _narrow(workload, rows, width_s, width_t, True)
    return (
        dtype if _narrow_is_less(narrow, dtype, _tiles(workload, rows, width_s, width_t, True)) else workload.dtype_name
    )


def minimum(workload: Workload, mode: str) -> dict[str, int]:
    """Return the least memory traffic in bytes, matrix FLOP and exponentials of the "forward" pass or of "both" passes.

    Elementwise operations are not counted: they overlap with the memory traffic and exponentials of their elements.
    """
    both = mode == "both"
    size = torch.empty((), dtype=workload.dtype).element_size()
    if workload.family == "softmax_kl":
        elements = torch.Size(workload.shape).numel()
        # Forward: S and T read. Backward: S and T read, the gradient written.
        return {"bytes": (5 if both else 2) * elements * size, "flop": 0, "exp": (4 if both else 2) * elements}
    if workload.family == "relation":
        batch, rows, width_s, width_t = workload.relation_sizes
        elements = batch * rows * (width_s + width_t)
        moved = 2 * elements + batch * rows * width_s if both else elements
        flop, exp = _relation(workload, rows, width_s, width_t, both)
        return {"bytes": moved * size, "flop": batch * flop, "exp": batch * exp}
    if workload.family == "attention_kl":
        batch, heads, queries, keys, width = workload.shape
        # Q and K of both networks, and both gradients. With a gradient known in advance, as of a mean, no map is
        # computed twice: Q Kᵀ twice, H K, Hᵀ Q.
        moved = (3 if both else 2) * batch * heads * (queries + keys) * width
        pairs = batch * heads * queries * keys
        return {"bytes": moved * size, "flop": (8 if both else 4) * pairs * width, "exp": 2 * pairs}
    batch, pixels, words, width = workload.shape
    # Forward: both networks' pixels. Backward: the student's again, and its gradient. The words are negligible.
    moved = batch * pixels * width * (4 if both else 2)
    # M_S, M_T; AᵀA, BᵀB (halves of symmetric matrices), AᵀB. Backward: dV, dL, and dA = A·X + B·Y with X, Y T×T.
    # A, B and their logits are N×T, so they may be stored: one exponential per element and network.
    flop = 4 * pixels * words * width + 4 * pixels * words**2
    if both:
        flop += 4 * pixels * words * width + 4 * pixels * words**2
    return {"bytes": moved * size, "flop": batch * flop, "exp": batch * 2 * pixels * words}


def _may_store(workload: Workload) -> bool:
    return workload.loss == "channel_kd"  # C×C may be stored; N×N may not and is recomputed in the backward


def _relation(workload: Workload, rows: int, width_s: int, width_t: int, both: bool) -> tuple[int, int]:
    """Return the FLOP and exponentials of one sample."""
    tiles = _tiles(workload, rows, width_s, width_t, both)
    if workload.distance == "kl":
        # E_ij serves rows i and j: R²/2 exponentials per network, R² for both, and again in the backward if not stored.
        return tiles, rows**2 * (2 if both and not _may_store(workload) else 1)
    narrow, dtype = _narrow(workload, rows, width_s, width_t, both)
    return narrow if _narrow_is_less(narrow, dtype, tiles) else tiles, 0


def _tiles(workload: Workload, rows: int, width_s: int, width_t: int, both: bool) -> int:
    """Return the FLOP of the R×R form. A symmetric matrix needs half its entries: R²K."""
    grams = rows**2 * (width_s + width_t)
    product = 2 * rows**2 * width_s  # dX = H X
    return grams + (product + (0 if _may_store(workload) else grams) if both else 0)


def _narrow(workload: Workload, rows: int, width_s: int, width_t: int, both: bool) -> tuple[int, str]:
    """Return the FLOP and dtype of "mse" from K×K matrices: AᵀA, BᵀB (halves) and AᵀB; backward A·AᵀA − B·BᵀA."""
    narrow = rows * (width_s**2 + width_t**2 + 2 * width_s * width_t)
    if both:
        narrow += 2 * rows * (width_s**2 + width_s * width_t)
    exact = workload.dtype == torch.float64 or (width_s != width_t and workload.dtype != torch.bfloat16)
    return narrow, "float64" if exact else "float32"


def _narrow_is_less(narrow: int, dtype: str, tiles: int) -> bool:
    return (2 if dtype == "float64" else 1) * narrow < tiles  # a vector register holds half as many doubles


def seconds(least: dict[str, int], ceilings: dict[str, float], dtype: str) -> float:
    """Return the least time in seconds at the machine's measured rates, with matrix products in ``dtype``.

    Products and exponentials share a core's units, so their times add; memory traffic overlaps with both.
    """
    product = ceilings["matmul_flop_per_s"]
    if dtype == "bfloat16":
        product = max(product, ceilings.get("matmul_bf16_flop_per_s", 0.0))
    elif dtype == "float64":  # absent on GPUs and in older results
        product = ceilings.get("matmul_fp64_flop_per_s", product)
    compute = least["flop"] / product + least["exp"] / ceilings["exp_per_s"]
    return max(least["bytes"] / ceilings["copy_bytes_per_s"], compute)
