"""Gradients of ``pixel_word`` with respect to features, from dM: dV = dM L and dL = dMᵀ V."""

from __future__ import annotations

import triton
import triton.language as tl
from fastkd.kernels.common import round_to
from fastkd.kernels.pixel_word.tiles import NORM_FLOOR, valid_pixels, valid_words


@triton.jit
def fp32_product(x, y, EXACT: tl.constexpr):
    """Return x y in about fp32 precision. EXACT: y is exact in TF32, so splitting x into two parts suffices."""
    y = y.to(tl.float32)
    if EXACT:
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # truncated to TF32
        low = tl.dot(x - high, y, input_precision="tf32")
        return tl.dot(high, y, low, input_precision="tf32")
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def inverse_norms(words_ptr, stride_t, stride_d, j, word_ok, width, TP: tl.constexpr, BD: tl.constexpr):
    """Return 1/max(|L|, NORM_FLOOR) of each word."""
    square = tl.zeros((TP,), tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        at = words_ptr + j.to(tl.int64)[:, None] * stride_t + d.to(tl.int64)[None, :] * stride_d
        w = tl.load(at, mask=word_ok[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(w * w, axis=1)
    return 1.0 / tl.maximum(tl.sqrt(square), NORM_FLOOR)


# ---------------------------------------------------------------------------------------------------------------------
# dV = dM L, or (dM L̂ − V̂ ⟨dM, M⟩)/|V| for the cosine.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["pixels", "count"])
def pixels_kernel(
    grad_logits_ptr,  # dM (B, T, N)
    words_ptr,  # L (B, T, D)
    words_stride_b,
    words_stride_t,
    words_stride_d,
    word_mask_ptr,  # (B, T), or None
    pixel_mask_ptr,  # (B, N), or None
    logits_ptr,  # for the cosine: M_S (B, T, N), contiguous in each sample; else None
    logits_stride_b,
    features_ptr,  # for the cosine: V (B, N, D); else None
    features_stride_b,
    features_stride_n,
    features_stride_d,
    norms_ptr,  # for the cosine: |V| (B, N); else None
    grad_pixels_ptr,  # output dV (B, N, D)
    grad_pixels_stride_b,
    grad_pixels_stride_n,
    grad_pixels_stride_d,
    pixels,  # in units of PIXEL_UNIT
    count,
    width,
    PIXEL_UNIT: tl.constexpr,
    BN: tl.constexpr,
    TP: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute dV of one block of pixels."""
    pixels *= PIXEL_UNIT
    EXACT: tl.constexpr = not words_ptr.dtype.element_ty.is_fp32()
    sample = tl.program_id(0).to(tl.int64)
    words_ptr += sample * words_stride_b
    grad_pixels_ptr += sample * grad_pixels_stride_b
    j = tl.arange(0, TP)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    exists = n < pixels
    pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
    word_ok = valid_words(word_mask_ptr, sample, count, j)
    entry = n[:, None] + j.to(tl.int64)[None, :] * pixels
    both = pixel_ok[:, None] & word_ok[None, :]
    dm = tl.load(grad_logits_ptr + sample * count * pixels + entry, mask=both, other=0.0)
    if norms_ptr is not None:
        norm = tl.load(norms_ptr + sample * pixels + n, mask=exists, other=0.0)
        inv_v = tl.where(norm > NORM_FLOOR, 1.0 / norm, 0.0)
        m = tl.load(logits_ptr + sample * logits_stride_b + entry, mask=both, other=0.0)
        projection = tl.sum(dm * m, axis=1) * inv_v
        dm = dm * inverse_norms(words_ptr, words_stride_t, words_stride_d, j, word_ok, width, TP, BD)[None, :]
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        in_range = d < width
        d = d.to(tl.int64)
        at = words_ptr + j.to(tl.int64)[:, None] * words_stride_t + d[None, :] * words_stride_d
        w = tl.load(at, mask=word_ok[:, None] & in_range[None, :], other=0.0)
        dv = fp32_product(dm, w, EXACT)
        if norms_ptr is not None:
            from_v = features_ptr + sample * features_stride_b
            from_v += n[:, None] * features_stride_n + d[None, :] * features_stride_d
            v = tl.load(from_v, mask=pixel_ok[:, None] & in_range[None, :], other=0.0).to(tl.float32)
            dv = tl.where((inv_v != 0.0)[:, None], (dv - v * projection[:, None]) * inv_v[:, None], 0.0)
        dv = tl.where(pixel_ok[:, None], dv, 0.0)
        out = grad_pixels_ptr + n[:, None] * grad_pixels_stride_n + d[None, :] * grad_pixels_stride_d
        tl.store(out, round_to(dv, grad_pixels_ptr.dtype.element_ty), mask=exists[:, None] & in_range[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# dMᵀ V, or dMᵀ V̂ for the cosine: a program processes all words, BD features and one run of pixels. A second kernel adds
# the sums of the runs in order and, for the cosine, removes the component along L̂ from the gradient of each word.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["pixels", "words", "blocks_per_program", "runs"])
def words_kernel(
    grad_logits_ptr,  # dM (B, T, N)
    features_ptr,  # V (B, N, D)
    features_stride_b,
    features_stride_n,
    features_stride_d,
    norms_ptr,  # for the cosine: |V| (B, N); else None
    pixel_mask_ptr,  # (B, N), or None
    sums_ptr,  # output (B, runs, T, D)
    pixels,  # in units of PIXEL_UNIT
    words,
    width,
    blocks_per_program,
    runs,
    PIXEL_UNIT: tl.constexpr,
    BN: tl.constexpr,
    TP: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute ``BD`` columns of dMᵀ V over ``blocks_per_program`` blocks of pixels."""
    pixels *= PIXEL_UNIT
    sample = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, TP)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    in_range = d < width
    grad_logits_ptr += sample * words * pixels
    features_ptr += sample * features_stride_b
    EXACT: tl.constexpr = not features_ptr.dtype.element_ty.is_fp32()
    dl = tl.zeros((TP, BD), tl.float32)
    first = tl.program_id(1) * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, tl.cdiv(pixels, BN))):
        n = (block * BN + tl.arange(0, BN)).to(tl.int64)
        pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
        at = grad_logits_ptr + j.to(tl.int64)[:, None] * pixels + n[None, :]
        dm = tl.load(at, mask=(j < words)[:, None] & (n < pixels)[None, :], other=0.0)
        if norms_ptr is not None:
            norm = tl.load(norms_ptr + sample * pixels + n, mask=n < pixels, other=1.0)
            dm = dm * (1.0 / tl.maximum(norm, NORM_FLOOR))[None, :]
        at = features_ptr + n[:, None] * features_stride_n + d.to(tl.int64)[None, :] * features_stride_d
        v = tl.load(at, mask=pixel_ok[:, None] & in_range[None, :], other=0.0)
        dl += fp32_product(dm, v, EXACT)  # added in fp32: tensor cores truncate sums
    at = sums_ptr + ((sample * runs + tl.program_id(1)) * words + j[:, None]) * width + d[None, :]
    tl.store(at, dl, mask=(j < words)[:, None] & in_range[None, :])


@triton.jit
def _sum_runs(sums_ptr, sample, word, words, width, runs, d, CHUNK: tl.constexpr, BD: tl.constexpr):
    """Return the features ``d`` of a word's dMᵀ V, summed over the runs."""
    total = tl.zeros((BD,), tl.float32)
    for start in range(0, runs, CHUNK):
        run = start + tl.arange(0, CHUNK)
        at = sums_ptr + ((sample * runs + run[:, None]) * words + word) * width + d[None, :]
        total += tl.sum(tl.load(at, mask=(run < runs)[:, None] & (d < width)[None, :], other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["words", "width", "runs"])
def merge_words_kernel(
    sums_ptr,  # (B, runs, T, D)
    words_ptr,  # for the cosine: L (B, T, D); else None
    words_stride_b,
    words_stride_t,
    words_stride_d,
    word_mask_ptr,  # (B, T), or None
    grad_words_ptr,  # output dL (B, T, D), contiguous
    words,
    width,
    runs,
    BD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute the gradient of one word per program."""
    sample = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    ok = valid_words(word_mask_ptr, sample, words, word)
    projection = 0.0
    inv = 1.0
    if words_ptr is not None:
        words_ptr += sample * words_stride_b + word.to(tl.int64) * words_stride_t
        square = tl.zeros((BD,), tl.float32)
        inner = tl.zeros((BD,), tl.float32)
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            w = tl.load(words_ptr + d.to(tl.int64) * words_stride_d, mask=d < width, other=0.0).to(tl.float32)
            square += w * w
            inner += w * _sum_runs(sums_ptr, sample, word, words, width, runs, d, CHUNK, BD)
        norm = tl.sqrt(tl.sum(square, axis=0))
        ok = ok & (norm > NORM_FLOOR)
        inv = tl.where(ok, 1.0 / norm, 0.0)
        projection = tl.sum(inner, axis=0) * inv * inv
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        dl = _sum_runs(sums_ptr, sample, word, words, width, runs, d, CHUNK, BD)
        if words_ptr is not None:
            w = tl.load(words_ptr + d.to(tl.int64) * words_stride_d, mask=d < width, other=0.0).to(tl.float32)
            dl = (dl - w * projection) * inv
        dl = tl.where(ok, dl, 0.0)
        at = grad_words_ptr + (sample * words + word) * width + d
        tl.store(at, round_to(dl, grad_words_ptr.dtype.element_ty), mask=d < width)
