"""Channel attention of a map as a matrix that mixes its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.products import product
from fastkd.ops.relation.reference import scaled_rows


def mixing(rows: Tensor, temperature: float | Tensor, similarity: str = "cosine", negate: bool = False) -> Tensor:
    """Return P (B, C, C) = softmax over columns of σ·sim(X, X)/τ for rows X (B, C, N); σ = −1 if ``negate``, else +1.

    Call it within `full_precision`.
    """
    scaled = scaled_rows(rows, similarity)
    similarities = product(scaled, scaled.mT)
    return torch.softmax((-similarities if negate else similarities) / temperature, -1)
