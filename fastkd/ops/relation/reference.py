"""``relation`` in plain torch: a per-row distance between the self-relation matrices of two sets of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd.ops.collectives import total
from fastkd.ops.numerics import compute_dtype, full_precision, normalise_rows
from fastkd.ops.products import product
from fastkd.ops.softmax_kl.reference import softmax_kl

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SIMILARITIES = ("cosine", "mean", "dot")
DISTANCES = ("kl", "mse", "row_cosine")


def relation(
    student: Tensor,
    teacher: Tensor,
    *,
    similarity: str = "cosine",
    distance: str = "kl",
    temperature: float | Tensor = 0.1,
    negate: bool = False,
    cross: bool = False,
) -> Tensor:
    """Return the per-row distances of E_S = sim(X_S, X_S) and E_T = sim(X_T, X_T); both matrices are stored.

    Args:
        student: X_S, (B, R, K_S): R rows of width K_S.
        teacher: X_T, (B, R, K_T).
        similarity: "cosine" (rows divided by their norms), "mean" (X Xᵀ/K) or "dot" (X Xᵀ).
        distance: "kl" is KL(softmax(σE_T[r]/τ) ‖ softmax(σE_S[r]/τ)), "mse" the mean squared difference of the rows,
            "row_cosine" the squared distance of the rows scaled to norm 1.
        temperature: τ, used by "kl" only.
        negate: σ = −1 instead of +1, used by "kl" only.
        cross: relate the rows of sample i to the rows of every sample j, and average the B distances of a row.

    Returns:
        (B, R), fp32 (fp64 if an input is fp64).
    """
    dtype = compute_dtype(student, teacher)
    with full_precision(student.device):
        e_s = _similarities(student.to(dtype), similarity, cross)
        e_t = _similarities(teacher.to(dtype), similarity, cross)
        rows = row_distances(e_s, e_t, distance, temperature, negate)
        return rows.mean(-1) if cross else rows


def row_distances(
    e_s: Tensor,
    e_t: Tensor,
    distance: str,
    temperature: float | Tensor,
    negate: bool = False,
    teacher_temperature: float | Tensor | None = None,
) -> Tensor:
    """Return the distances (...) between matching rows of relation matrices (..., columns)."""
    if distance == "kl":
        sign = -1.0 if negate else 1.0
        return softmax_kl(sign * e_s, sign * e_t, temperature, -1, teacher_temperature)
    if distance == "mse":
        return (e_s - e_t).square().mean(-1)
    return (normalise_rows(e_s) - normalise_rows(e_t)).square().sum(-1)


def relation_mse_gram(
    student: Tensor, teacher: Tensor, *, similarity: str, cross: bool = False, group: ProcessGroup | None = None
) -> Tensor:
    """Return ``relation(..., distance="mse")`` from K×K Gram matrices, without an R×R matrix.

    With A = X_S, B = X_T and D = A − B, row i of AAᵀ − BBᵀ is d_i Aᵀ + b_i Dᵀ, so its squared norm is
    d_i(AᵀA)d_iᵀ + b_i(DᵀD)b_iᵀ + 2 d_i(AᵀD)b_iᵀ. Every summand has the factor D twice, so nothing cancels as the
    student approaches the teacher. If the widths differ, D is undefined; a_i(AᵀA)a_iᵀ + b_i(BᵀB)b_iᵀ − 2 a_i(AᵀB)b_iᵀ
    is used instead, which does cancel and therefore needs fp64 (``numerics.has_fast_fp64``).

    With ``cross``, Gram matrices and columns are those of the whole batch; with ``group``, of the batches of all its
    processes, added by one all-reduce of the three matrices and the number of columns.
    """
    dtype = compute_dtype(student, teacher)
    same_width = student.shape[-1] == teacher.shape[-1]
    work = dtype if same_width else torch.float64
    with full_precision(student.device):
        a = scaled_rows(student.to(work), similarity)
        b = scaled_rows(teacher.to(work), similarity)
        columns = a.shape[1]
        if cross:  # every row is compared with the rows of all samples: one Gram matrix for the batch
            columns = columns * a.shape[0]
        divisor: int | Tensor = columns
        other = a - b if same_width else b  # D, or B if the widths differ
        grams = [_gram(a, a, cross), _gram(other, other, cross), _gram(a, other, cross)]
        if group is not None:
            *grams, divisor = _totals([*grams, torch.full((1,), columns, dtype=work, device=a.device)], group)
        if same_width:
            rows = _bilinear(other, grams[0], other) + _bilinear(b, grams[1], b) + 2 * _bilinear(other, grams[2], b)
        else:
            rows = _bilinear(a, grams[0], a) + _bilinear(b, grams[1], b) - 2 * _bilinear(a, grams[2], b)
        return (rows / divisor).to(dtype)


def _totals(parts: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return the sums of tensors over the processes of a group, by one collective."""
    sums = total(torch.cat([part.flatten() for part in parts]), group).split([part.numel() for part in parts])
    return [part.view_as(like) for part, like in zip(sums, parts, strict=True)]


def scaled_rows(rows: Tensor, similarity: str) -> Tensor:
    """Return rows whose dot products are the similarities."""
    if similarity == "cosine":
        return normalise_rows(rows)
    return rows / rows.shape[-1] ** 0.5 if similarity == "mean" else rows


def _similarities(rows: Tensor, similarity: str, cross: bool) -> Tensor:
    """Return the similarities (B, R, R) of rows (B, R, K), or (B, R, B, R) between all samples."""
    x = scaled_rows(rows, similarity)
    if not cross:
        return product(x, x.mT)
    flat = x.flatten(0, 1)  # (B·R, K)
    return product(flat, flat.T).reshape(*x.shape[:2], *x.shape[:2])


def _gram(x: Tensor, y: Tensor, pooled: bool) -> Tensor:
    """Return XᵀY (B, K, K) per sample, or its sum (1, K, K) over the samples."""
    gram = product(x.mT, y)
    return gram.sum(0, keepdim=True) if pooled else gram


def _bilinear(x: Tensor, matrix: Tensor, y: Tensor) -> Tensor:
    """Return x_i M y_iᵀ (B, R) for every row i."""
    return (product(x, matrix) * y).sum(-1)
