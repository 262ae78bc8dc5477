"""Floating-point tensors as 8-bit codes with symmetric scales.

A group of values x shares one scale: code = round(127 x / max|x|), an int8, and x ≈ code · max|x| / 127. −Inf, which
masks logits, has the code −128.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GROUP = 16  # values per scale, at least: a float32 scale then adds a quarter to the codes
_MAX = 127
_MINUS_INF = -128


def scale_shape(sizes: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of a sample's scales, 1 along the dimensions that share one; None if there are too few values.

    Groups are the smallest that dimensions of the sample, alone or together, form: for logits of pixels and words, the
    words of a pixel and head.
    """
    ranks = range(len(sizes))
    subsets = itertools.chain.from_iterable(itertools.combinations(ranks, n) for n in range(len(sizes)))
    shapes = [tuple(sizes[dim] if dim in kept else 1 for dim in ranks) for kept in subsets]
    total = math.prod(sizes)
    allowed = [shape for shape in shapes if total >= _GROUP * max(math.prod(shape), 1)]
    return max(allowed, key=math.prod, default=None)


def to_int8(value: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the codes (B, ...) of a tensor (B, ...) without NaN or +Inf, and its float32 scales (B, *shape)."""
    shared = [dim for dim, size in enumerate(shape, 1) if size == 1]
    finite = value.to(torch.promote_types(value.dtype, torch.float32)).masked_fill(value == -torch.inf, 0)
    scale = (finite.abs().amax(shared, keepdim=True) / _MAX).float()  # (B, *shape)
    codes = (finite / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-_MAX, _MAX).to(torch.int8)
    return codes.masked_fill(value == -torch.inf, _MINUS_INF), scale


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values (B, ...) of codes and scales."""
    return (codes.to(scale.dtype) * scale).masked_fill(codes == _MINUS_INF, -torch.inf)
