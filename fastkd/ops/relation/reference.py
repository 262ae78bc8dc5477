"""``relation`` in plain torch: a per-row distance between the self-relation matrices of two sets of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.numerics import compute_dtype, full_precision, normalise_rows
from fastkd.ops.products import product
from fastkd.ops.softmax_kl.reference import softmax_kl

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
        if distance == "kl":
            sign = -1.0 if negate else 1.0
            rows = softmax_kl(sign * e_s, sign * e_t, temperature)
        elif distance == "mse":
            rows = (e_s - e_t).square().mean(-1)
        else:
            rows = (normalise_rows(e_s) - normalise_rows(e_t)).square().sum(-1)
        return rows.mean(-1) if cross else rows


def relation_mse_gram(student: Tensor, teacher: Tensor, *, similarity: str, cross: bool = False) -> Tensor:
    """Return ``relation(..., distance="mse")`` from K×K Gram matrices, without an R×R matrix.

    With A = X_S, B = X_T and D = A − B, row i of AAᵀ − BBᵀ is d_i Aᵀ + b_i Dᵀ, so its squared norm is
    d_i(AᵀA)d_iᵀ + b_i(DᵀD)b_iᵀ + 2 d_i(AᵀD)b_iᵀ. Every summand has the factor D twice, so nothing cancels as the
    student approaches the teacher. If the widths differ, D is undefined; a_i(AᵀA)a_iᵀ + b_i(BᵀB)b_iᵀ − 2 a_i(AᵀB)b_iᵀ
    is used instead, which does cancel and therefore needs fp64 (``numerics.has_fast_fp64``).
    """
    dtype = compute_dtype(student, teacher)
    same_width = student.shape[-1] == teacher.shape[-1]
    work = dtype if same_width else torch.float64
    with full_precision(student.device):
        a = _scaled(student.to(work), similarity)
        b = _scaled(teacher.to(work), similarity)
        columns = a.shape[1]
        if cross:  # every row is compared with the rows of all samples: one Gram matrix for the batch
            columns = columns * a.shape[0]
        if same_width:
            d = a - b
            rows = _bilinear(d, _gram(a, a, cross), d) + _bilinear(b, _gram(d, d, cross), b)
            rows = rows + 2 * _bilinear(d, _gram(a, d, cross), b)
        else:
            rows = _bilinear(a, _gram(a, a, cross), a) + _bilinear(b, _gram(b, b, cross), b)
            rows = rows - 2 * _bilinear(a, _gram(a, b, cross), b)
        return (rows / columns).to(dtype)


def _scaled(rows: Tensor, similarity: str) -> Tensor:
    """Return rows whose dot products are the similarities."""
    if similarity == "cosine":
        return normalise_rows(rows)
    return rows / rows.shape[-1] ** 0.5 if similarity == "mean" else rows


def _similarities(rows: Tensor, similarity: str, cross: bool) -> Tensor:
    """Return the similarities (B, R, R) of rows (B, R, K), or (B, R, B, R) between all samples."""
    x = _scaled(rows, similarity)
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
