"""What the forward and the backward of ``pixel_word`` share: block sizes, tiles of pixels × words, their softmaxes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E, cdiv
from torch import Tensor

PIXEL_TO_WORD = tl.constexpr(1)
WORD_TO_PIXEL = tl.constexpr(2)
PIXEL_PIXEL = tl.constexpr(4)
WORD_WORD = tl.constexpr(8)
SECOND_ORDER = tl.constexpr(12)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""As a running maximum the lowest finite number stands for −inf, without its −inf − (−inf) = NaN."""
NORM_FLOOR = tl.constexpr(1e-12)
"""A row of features that is not longer has no direction: it is divided by this, and gets no gradient."""

MOST_WORDS = 128
"""More would not fit a program's registers."""

PROGRAMS = 528
"""How many programs a launch is cut into, about: four for each of 132 multiprocessors."""

MOST_SUMS = 64
"""At most so many programs share a sample, since ``merge_kernel`` adds up what each has written."""


FUSED = False
"""Whether products and sums are one instruction where student and teacher are compared: of two equal products, only one
rounded, the difference would not be 0."""


class Blocks(NamedTuple):
    """How a kernel is cut: ``pixels`` at a time; ``columns`` features, or columns of a matrix of words, at a time."""

    pixels: int
    columns: int
    warps: int
    stages: int = 3
    registers: int | None = None
    """The most for a thread, where ptxas's own choice spills (``_common.MOST_REGISTERS``). With 128, two programs of 8
    warps share a multiprocessor."""

    def launch(self, fused: bool = True) -> dict[str, Any]:
        """Return the options of a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": fused, **limit}


def padded(words: int) -> int:
    """TP: a power of two, and at least what a tensor core takes."""
    return max(16, triton.next_power_of_2(words))


# Chosen by what the kernels compile to on every chip (benchmarks/aot): no spills, then several programs to a
# multiprocessor. ``half``: features of 16 bits.
def logits_blocks(words: int, half: bool) -> Blocks:
    """Of ``logits_kernel``, for TP words."""
    if half:
        return Blocks(64, 64, 4 if words <= 64 else 8)
    return Blocks(64 if words <= 64 else 32, 32, 4 if words <= 32 else 8)


def terms_blocks(words: int, capability: int) -> Blocks:
    """Of ``terms_kernel`` and, for more words than ``columns``, of ``grams_kernel``, on chips of a major capability."""
    # With two stages Triton 3.6 spills registers at 32 words on 10.x, and cannot compile grams_kernel at 64.
    some = 1 if capability == 10 else 2
    return {
        16: Blocks(32, 32, 4, 2),
        32: Blocks(16, 32, 4, some),
        64: Blocks(32, 32, 8, some),
        128: Blocks(16, 16, 8, 1, registers=128),
    }[words]


def gradient_blocks(words: int) -> Blocks:
    """Of ``gradient_kernel``."""
    return {
        16: Blocks(32, 16, 4, 2),
        32: Blocks(16, 32, 4, 2),
        64: Blocks(32, 64, 8, 1),
        128: Blocks(16, 16, 8, 1),
    }[words]


def pixels_blocks(words: int, half: bool) -> Blocks:
    """Of ``pixels_kernel``."""
    if words > 64:
        return Blocks(32 if half else 16, 32, 8, 2)
    return Blocks(64, 64 if half else 32, 4 if words <= 32 else 8)


def words_blocks(words: int, half: bool) -> Blocks:
    """Of ``words_kernel``."""
    if half:
        return Blocks(64 if words <= 64 else 32, 64, 4 if words <= 32 else 8, 3 if words <= 64 else 2)
    return Blocks(32, 32, 4 if words <= 64 else 8, 2)


MERGE = Blocks(0, 0, 8, registers=255)
"""Of ``merge_kernel``, which takes a sample whole."""

MERGE_WORDS = Blocks(0, 128, 4)
"""Of ``merge_words_kernel``."""


class Side(NamedTuple):
    """Student or teacher, as the kernels are given it."""

    pixels: Tensor | None  # (B, N, D), strides of which one but the batch's is 1; the logits (B, N, T) without words
    words: Tensor | None  # (B, T, D), any strides
    word_mask: Tensor | None  # (B, T) contiguous
    word_count: int
    scale: float


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """The strides of three dimensions, or zeros."""
    return (0, 0, 0) if x is None else x.stride()  # type: ignore[return-value]


def cut(pixels: int, block: int, batch: int, most: int) -> tuple[int, int]:
    """Blocks to a program, and programs to a sample."""
    blocks = cdiv(pixels, block)
    each = cdiv(blocks, min(most, cdiv(PROGRAMS, batch)))
    return each, cdiv(blocks, each)


def features(network: Side) -> tuple[Any, ...]:
    """A network as ``logits_kernel`` takes it."""
    width = network.pixels.shape[2] if network.pixels is not None else 0
    return (
        network.pixels,
        *strides(network.pixels),
        network.words,
        *strides(network.words),
        network.word_mask,
        network.word_count,
        width,
    )


def logits_of(network: Side, logits: Tensor | None, row: int) -> tuple[Any, ...]:
    """A network's logits as the other kernels take them: its own, or those that begin at ``row`` of the kept ones."""
    own = network.pixels if logits is None else logits[:, row:].mT
    return own, *strides(own), network.word_mask, network.word_count, network.scale


def product_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What features are multiplied in: their own dtype if it is one of 16 bits and the same throughout, else fp32."""
    dtypes = {x.dtype for x in tensors if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Tiles of pixels × words.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def valid_words(mask_ptr, sample, count, j):
    """Which of the words ``j`` a network has and has not masked."""
    here = j < count
    if mask_ptr is not None:
        here = tl.load(mask_ptr + sample * count + j, mask=here, other=0) != 0
    return here


@triton.jit
def valid_pixels(mask_ptr, sample, n, count):
    """Which of the pixels ``n`` exist and are not masked."""
    here = n < count
    if mask_ptr is not None:
        here = tl.load(mask_ptr + sample * count + n, mask=here, other=0) != 0
    return here


@triton.jit
def load_logits(ptr, stride_n, stride_t, n, j, pixel_ok, word_ok):
    """M of the pixels ``n`` and the words ``j`` from memory; 0 where masked."""
    at = ptr + n[:, None] * stride_n + j.to(tl.int64)[None, :] * stride_t
    return tl.load(at, mask=pixel_ok[:, None] & word_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def compute_logits(
    pixels_ptr, stride_n, stride_d, words_ptr, stride_t, words_stride_d, n, j, pixel_ok, word_ok, width,
    BN: tl.constexpr, TP: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """M = V Lᵀ, or the cosines; and |V|. Masked rows are loaded as 0, whatever they hold: they have M = 0."""
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
        m = tl.dot(v.to(DOT), w.to(DOT), m, input_precision="tf32x3")
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
    """The softmax over words of u, u less its maximum, that maximum of M, and the sum z. Masked: probability 0."""
    top = tl.max(tl.where(valid, m, float("-inf")), axis=1)
    u = (m - top[:, None]) * scale
    e = tl.where(valid, tl.exp2(u * LOG2E), 0.0)
    z = tl.sum(e, axis=1)
    a = tl.where(valid, e * (1.0 / z)[:, None], 0.0)
    return a, u, top, z


@triton.jit
def attention_slab(m, top, z, valid, scale):
    """Some columns of the same softmax."""
    return tl.where(valid, tl.exp2((m - top[:, None]) * scale * LOG2E) * (1.0 / z)[:, None], 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Products of numbers in [−1, 1] in three products of fp16: 4096 x = h + l, h and l in fp16, holds x to 2⁻²² and 2⁻³⁶,
# finer than fp32 knows the difference of two probabilities, in half the registers and instructions of 3×TF32.
# ---------------------------------------------------------------------------------------------------------------------
UNIT = tl.constexpr(2.0**-24)
"""What ``product_of_halves`` counts in."""


@triton.jit
def halves(x):
    """4096 x in two parts of 16 bits."""
    x = x * 4096.0
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def product_of_halves(high_x, low_x, high_y, low_y, acc):
    """x y / UNIT + acc, less the product of what is small in both."""
    acc = tl.dot(low_x, high_y, acc)
    acc = tl.dot(high_x, low_y, acc)
    return tl.dot(high_x, high_y, acc)


@triton.jit
def gram(high_x, low_x, high_y, low_y, acc):
    """xᵀ y / UNIT + acc."""
    return product_of_halves(tl.trans(high_x), tl.trans(low_x), high_y, low_y, acc)
