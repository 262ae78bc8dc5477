"""Pixel masks: check them, and keep what masked pixels hold out of losses and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.losses._reduce import attention_of
from fastkd.ops import checks
from fastkd.ops.numerics import compute_dtype
from fastkd.ops.torch_state import savable

PixelMask = Tensor | tuple[Tensor, Tensor]
"""A mask of both networks' pixels, or (student's, teacher's)."""


def valid_pixels(
    mask: object, maps: Tensor, name: str = "pixel_mask", *, every_sample: bool = False, anywhere: bool = False
) -> Tensor:
    """Return the checked mask of maps (B, C, H, W) or (B, C, N) as (B, N).

    Args:
        mask: bool (B, H, W) or (B, N), True = valid.
        maps: the maps whose pixels it marks.
        name: the argument to name in errors.
        every_sample: raise if a sample has no valid pixel, instead of only if the batch has none.
        anywhere: raise in neither case, since other processes may have valid pixels.
    """
    outer = (maps.shape[0], *maps.shape[2:])
    flat = (maps.shape[0], maps.shape[2] * (maps.shape[3] if maps.dim() == 4 else 1))
    mask = checks.bool_mask(name, mask, [outer, flat], maps).reshape(flat)
    if anywhere:
        return mask
    if every_sample:
        checks.every_sample_valid(name, mask, "pixel")
    elif checks.readable(mask) and not bool(mask.any()):
        raise ValueError(f"{name}: no valid pixel in the batch; skip this loss for such a batch")
    return mask


def fill(maps: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """Return maps (B, C, ...) with ``value`` where mask (B, ...) is False; fp8, which may lack infinity, as fp32."""
    maps = maps if maps.dtype.itemsize > 1 else maps.to(compute_dtype(maps))
    return torch.where(mask.unsqueeze(1), maps, torch.full((), value, dtype=maps.dtype, device=maps.device))


def fill_maps(maps: Tensor, mask: Tensor) -> Tensor:
    """Return maps (B, C, H, W) or (B, C, N) with 0 where mask (B, N) is False."""
    return fill(maps, mask.reshape(maps.shape[0], *maps.shape[2:]))


def check_valid_weight(weight: Tensor, mask: Tensor) -> None:
    """Raise if a weight (B, N) is 0 at every valid pixel."""
    if checks.readable(weight) and checks.readable(mask) and bool((weight[mask] == 0).all()):
        raise ValueError("weight: is 0 at every valid pixel, so the weighted mean is undefined")


def pixel_attention(teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return weights (B, N) from the teacher's (B, C, N); over the valid pixels of a sample their mean is 1."""
    strength = teacher.abs().mean(1)  # (B, N)
    if mask is None:
        return attention_of(strength)
    lowest = torch.finfo(strength.dtype).min / 2  # finite after the division by the temperature, ½
    share = attention_of(strength.masked_fill(~mask, lowest)) / mask.shape[1]
    return torch.where(mask, share, torch.zeros_like(share)) * mask.sum(1, keepdim=True)


def valid_rows(rows: Tensor, mask: Tensor, weight: Tensor | None, reduction: str) -> tuple[Tensor, Tensor | None]:
    """Return losses (B, R) that are 0 where ``mask`` is False, and the weight with which these do not count."""
    zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
    rows = torch.where(mask, rows, zero)
    if weight is None:
        return rows, mask if reduction == "mean" else None
    return rows, torch.where(mask, savable(weight)[0].to(rows.dtype), zero)


def without_masked(student: Tensor, mask: object) -> Tensor:
    """Return the student's maps with 0 at masked pixels, for an aligner, whose gradient would multiply 0 by their NaN.

    The loss checks the mask, of which this uses the student's if it is a pair.
    """
    own = mask[0] if isinstance(mask, tuple | list) and mask else mask
    name = "pixel_mask" if own is mask else "pixel_mask[0]"
    return student if own is None else fill_maps(student, valid_pixels(own, student, name, anywhere=True))
