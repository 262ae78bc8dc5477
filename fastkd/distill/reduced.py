"""Feature maps reduced to a few directions of their channels, for losses that compare relations.

X (N, C), one row per pixel, is stored as Z = X V, with r orthonormal columns V (C, r), and restored as Z Vᵀ. Products
and cosines of pixels (X Xᵀ) and of channels (Xᵀ X) then lack what X holds outside the span of V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.ops.products import product


def reduce_channels(value: Tensor, basis: Tensor, dim: int) -> Tensor:
    """Return a tensor with its C channels, along a dimension, replaced by r coefficients of a basis (C, r)."""
    return _times(value.movedim(dim, -1), basis).to(value.dtype).movedim(-1, dim).contiguous()


def restore_channels(value: Tensor, basis: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the map (B, C, ...) of coefficients (B, r, ...), float32, its dimensions in this order in memory."""
    restored = _times(value.movedim(1, -1), basis.mT).movedim(-1, 1)
    return restored.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return ``rows @ matrix`` in fp32, whatever autocast and the precision of products are set to."""
    with torch.autocast(rows.device.type, enabled=False):
        return product(rows.float().reshape(-1, rows.shape[-1]), matrix.float()).reshape(*rows.shape[:-1], -1)
