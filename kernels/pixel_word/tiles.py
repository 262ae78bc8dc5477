"""Operands of the ``pixel_word`` kernels, tiles of pixels × words, their softmaxes, and products in split fp16."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E, dot_add
from torch import Tensor

PIXEL_TO_WORD = tl.constexpr(1)
WORD_TO_PIXEL = tl.constexpr(2)
PIXEL_PIXEL = tl.constexpr(4)
WORD_WORD = tl.constexpr(8)
SECOND_ORDER = tl.constexpr(12)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Initial value of running maxima, as −inf − (−inf) would be NaN."""
NORM_FLOOR = tl.constexpr(1e-12)
"""Lower bound of the norm of a row of features; shorter rows are divided by it and get no gradient."""


class Side(NamedTuple):
    """The student's or the teacher's operands, as the kernels take them."""

    pixels: Tensor | None  # (B, N, D) with stride_n or stride_d equal to 1; without words, the logits (B, N, T)
    words: Tensor | None  # (B, T, D), any strides
    word_mask: Tensor | None  # (B, T) contiguous
    word_count: int
    scale: float  # of the logits


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of a 3-d tensor, or zeros for None."""
    return (0, 0, 0) if x is None else x.stride()  # type: ignore[return-value]


def features(side: Side) -> tuple[Any, ...]:
    """Return a side with words as arguments of ``logits_kernel``."""
    pixels, words, mask, count, _ = side
    assert pixels is not None
    assert words is not None
    return (pixels, *pixels.stride(), words, *words.stride(), mask, count, pixels.shape[2])


def logits_of(side: Side, logits: Tensor | None, row: int) -> tuple[Any, ...]:
    """Return a side's logits as arguments of the other kernels: given, or the computed logits from ``row`` on."""
    if logits is None:
        return side.pixels, *strides(side.pixels), side.word_mask, side.word_count, side.scale
    by_batch, by_word, by_pixel = logits.stride()  # of (B, T_S + T_T, N)
    values = logits[:, row:] if row else logits
    return values, by_batch, by_pixel, by_word, side.word_mask, side.word_count, side.scale


def product_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype in which features are multiplied: their own if all have the same, else fp32."""
    common = None
    for x in tensors:  # a loop, as a comprehension would double the time
        if x is not None:
            if common is not None and x.dtype != common:
                return torch.float32
            common = x.dtype
    return common or torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of pixels × words.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def valid_words(mask_ptr, sample, count, j):
    """Return which of the words ``j`` exist and are not masked."""
    here = j < count
    if mask_ptr is not None:
        here = tl.load(mask_ptr + sample * count + j, mask=here, other=0) != 0
    return here


@triton.jit
def valid_pixels(mask_ptr, sample, n, count):
    """Return which of the pixels ``n`` exist and are not masked."""
    here = n < count
    if mask_ptr is not None:
        here = tl.load(mask_ptr + sample * count + n, mask=here, other=0) != 0
    return here


@triton.jit
def load_logits(ptr, stride_n, stride_t, n, j, pixel_ok, word_ok):
    """Return M of the pixels ``n`` and words ``j``, 0 where masked."""
    at = ptr + n[:, None] * stride_n + j.to(tl.int64)[None, :] * stride_t
    return tl.load(at, mask=pixel_ok[:, None] & word_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def compute_logits(
    pixels_ptr, stride_n, stride_d, words_ptr, stride_t, words_stride_d, n, j, pixel_ok, word_ok, width,
    BN: tl.constexpr, TP: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Return M = V Lᵀ or the cosines, and |V|. Masked rows are loaded as 0, so their M is 0 even if they hold NaN."""
    PRECISION: tl.constexpr = "tf32x3" if DOT.is_fp32() else "ieee"
    m = tl.zeros((BN, TP), tl.float32)
    square_v = tl.zeros((BN,), tl.float32)
    square_l = tl.zeros((TP,), tl.float32)
    j = j.to(tl.int64)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        here = d < width
        d = d.to(tl.int64)
        v = tl.load(
            pixels_ptr + n[:, None] * stride_n + d[None, :] * stride_d,
            mask=pixel_ok[:, None] & here[None, :],
            other=0.0,
        )
        w = tl.load(
            words_ptr + d[:, None] * words_stride_d + j[None, :] * stride_t,
            mask=here[:, None] & word_ok[None, :],
            other=0.0,
        )
        m = dot_add(v.to(DOT), w.to(DOT), m, PRECISION)
        if COSINE:
            v = v.to(tl.float32)
            w = w.to(tl.float32)
            square_v += tl.sum(v * v, axis=1)
            square_l += tl.sum(w * w, axis=0)
    norm = tl.sqrt(square_v)
    if COSINE:
        m = m * (1.0 / tl.maximum(norm, NORM_FLOOR))[:, None]
        m = m * (1.0 / tl.maximum(tl.sqrt(square_l), NORM_FLOOR))[None, :]
    return m, norm


@triton.jit
def attention(m, valid, scale):
    """Return the softmax of u = s·M over words (0 where masked), u − max u, the maximum of M, and the sum z."""
    top = tl.max(tl.where(valid, m, float("-inf")), axis=1)
    u = (m - top[:, None]) * scale
    e = tl.where(valid, tl.exp2(u * LOG2E), 0.0)
    z = tl.sum(e, axis=1)
    a = tl.where(valid, e * (1.0 / z)[:, None], 0.0)
    return a, u, top, z


@triton.jit
def attention_slab(m, top, z, valid, scale):
    """Return some columns of the softmax, from its maximum and sum."""
    return tl.where(valid, tl.exp2((m - top[:, None]) * scale * LOG2E) * (1.0 / z)[:, None], 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Products of numbers in [−1, 1] as three fp16 products. 4096 x = h + l with h and l in fp16 represents x to 2⁻²²
# (relative) and 2⁻³⁶ (absolute), finer than the fp32 difference of two probabilities, and takes half the registers and
# instructions of 3×TF32.
# ---------------------------------------------------------------------------------------------------------------------
SPLIT_UNIT = tl.constexpr(2.0**-24)
"""Unit of the results of ``split_product``."""


@triton.jit
def split_fp16(x):
    """Return 4096 x as the sum of two fp16 numbers."""
    x = x * 4096.0
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def split_product(high_x, low_x, high_y, low_y):
    """Return x y / SPLIT_UNIT, without the product of the two low parts."""
    low = tl.dot(high_x, low_y, tl.dot(low_x, high_y))
    return tl.dot(high_x, high_y, low)


@triton.jit
def gram(high_x, low_x, high_y, low_y, acc):
    """Return acc + xᵀ y / SPLIT_UNIT, added in fp32: tensor cores truncate sums."""
    return acc + split_product(tl.trans(high_x), tl.trans(low_x), high_y, low_y)
