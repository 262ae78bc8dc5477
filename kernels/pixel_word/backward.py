r"""Backward of ``pixel_word`` in Triton, from the logits, the column sums and G, K, E (see forward.py).

With g_k the incoming gradient of loss k, the second-order terms give dA = A X + D Z, where

.. math:: X = \tfrac{4}{n^2} (g_{ww} W + g_{pp} K), \qquad Z = \tfrac{4}{n^2} g_{pp} (G - K),

since :math:`d\|AA^T - BB^T\|^2 / dA = 4 (DG + BK)` and :math:`d\|W\|^2 / dA = 4AW`. Then, per pixel,

.. math:: du = A \odot (dA - \langle dA, A\rangle) + \tfrac{g_{pw}}{n} D + \tfrac{g_{wp}}{t} (Q_S - Q_T),
          \qquad dM = s\,du,

which is the gradient of given logits. For features, dV = dM L and dL = dMᵀ V; for the cosine, with V̂ and L̂ of
length 1, dV = (dM L̂ − V̂ ⟨dM, M⟩)/|V| and dL = (dMᵀ V̂ − L̂ ⟨dMᵀ V̂, L̂⟩)/|L|. dM is stored in fp32. Its product with
16-bit features, which are exact in TF32, takes two TF32 products, with fp32 features three. Masked pixels and words get
a gradient of exactly 0, even if they hold NaN.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E, capability, launching_on, round_to
from fastkd.kernels.pixel_word.features import merge_words_kernel, pixels_kernel, words_kernel
from fastkd.kernels.pixel_word.plan import backward_plan
from fastkd.kernels.pixel_word.tiles import (
    PIXEL_PIXEL,
    PIXEL_TO_WORD,
    SECOND_ORDER,
    SPLIT_UNIT,
    WORD_TO_PIXEL,
    WORD_WORD,
    Side,
    attention,
    attention_slab,
    load_logits,
    logits_of,
    split_fp16,
    split_product,
    strides,
    valid_pixels,
    valid_words,
)
from torch import Tensor


@triton.jit
def scaled_halves(x):
    """Return x / max |x| split into two fp16 numbers, and the unit of their products."""
    largest = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-30)
    high, low = split_fp16(x / largest)
    return high, low, largest * SPLIT_UNIT


@triton.jit
def load_x_and_z(grams_ptr, words, i, j, g_ww, g_pp):
    """Return rows ``i`` and columns ``j`` of X and Z, scaled and split into fp16 numbers, with their units."""
    both = (i < words)[:, None] & (j < words)[None, :]
    entry = grams_ptr + i[:, None] * words + j[None, :]
    transposed = grams_ptr + j[None, :] * words + i[:, None]
    g = tl.load(entry, mask=both, other=0.0)
    k = tl.load(entry + words * words, mask=both, other=0.0)
    k_t = tl.load(transposed + words * words, mask=both, other=0.0)
    e = tl.load(entry + 2 * words * words, mask=both, other=0.0)
    high_x, low_x, unit_x = scaled_halves(g_ww * (k + k_t - e) + g_pp * k)
    high_z, low_z, unit_z = scaled_halves(g_pp * (g - k))
    return high_x, low_x, unit_x, high_z, low_z, unit_z


# ---------------------------------------------------------------------------------------------------------------------
# dM from the logits. Only SLAB rows of X and Z, and the same columns of A and D, are live at a time.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(
    do_not_specialize=[
        "student_count",
        "teacher_count",
        "words",
        "blocks_per_program",
        "grad_loss_stride_b",
        "grad_loss_stride_term",
    ],
    do_not_specialize_on_alignment=["grad_loss_ptr"],
)
def gradient_kernel(
    student_ptr,  # M_S (B, N, T), any strides
    student_stride_b,
    student_stride_n,
    student_stride_t,
    student_mask_ptr,  # (B, T), or None
    student_count,
    student_scale,
    teacher_ptr,
    teacher_stride_b,
    teacher_stride_n,
    teacher_stride_t,
    teacher_mask_ptr,
    teacher_count,
    teacher_scale,
    pixel_mask_ptr,  # (B, N), or None
    valid_ptr,  # (B,) numbers of valid pixels, or None
    columns_ptr,  # (B, 4, T) m_S, z_S, m_T, z_T
    grams_ptr,  # (B, 3, words, words) G, K, E
    grad_loss_ptr,  # (B, 4), any strides
    grad_loss_stride_b,
    grad_loss_stride_term,
    grad_logits_ptr,  # output dM (B, N, T), any strides
    grad_logits_stride_b,
    grad_logits_stride_n,
    grad_logits_stride_t,
    pixels,
    words,
    blocks_per_program,
    BN: tl.constexpr,
    TP: tl.constexpr,
    SLAB: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Compute dM for ``blocks_per_program`` blocks of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    student_ptr += sample * student_stride_b
    teacher_ptr += sample * teacher_stride_b
    grad_logits_ptr += sample * grad_logits_stride_b
    grad_loss_ptr += sample * grad_loss_stride_b
    j = tl.arange(0, TP)
    student_words = valid_words(student_mask_ptr, sample, student_count, j)
    teacher_words = valid_words(teacher_mask_ptr, sample, teacher_count, j)
    n_valid = tl.full((), 0.0, tl.float32) + pixels
    if valid_ptr is not None:
        n_valid = tl.load(valid_ptr + sample)

    if PIXEL_TO_WORD & TERMS:
        g_pw = tl.load(grad_loss_ptr) / n_valid
    if WORD_TO_PIXEL & TERMS:
        g_wp = tl.load(grad_loss_ptr + grad_loss_stride_term) / tl.sum(student_words.to(tl.float32), axis=0)
        column = columns_ptr + sample * 4 * student_count + j
        has_column = j < student_count
        m_s = tl.load(column, mask=has_column, other=0.0)
        z_s = tl.load(column + student_count, mask=has_column, other=1.0)
        m_t = tl.load(column + 2 * student_count, mask=has_column, other=0.0)
        z_t = tl.load(column + 3 * student_count, mask=has_column, other=1.0)
    if SECOND_ORDER & TERMS:
        by_n = 4.0 / (n_valid * n_valid)
        g_pp = 0.0
        g_ww = 0.0
        if PIXEL_PIXEL & TERMS:
            g_pp = by_n * tl.load(grad_loss_ptr + 2 * grad_loss_stride_term)
        if WORD_WORD & TERMS:
            g_ww = by_n * tl.load(grad_loss_ptr + 3 * grad_loss_stride_term)
        grams_ptr += sample * 3 * words * words
        if SLAB == TP:
            high_x, low_x, unit_x, high_z, low_z, unit_z = load_x_and_z(grams_ptr, words, j, j, g_ww, g_pp)

    first = tl.program_id(1) * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, tl.cdiv(pixels, BN))):
        n = (block * BN + tl.arange(0, BN)).to(tl.int64)
        pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
        valid_s = pixel_ok[:, None] & student_words[None, :]
        valid_t = pixel_ok[:, None] & teacher_words[None, :]
        x = load_logits(student_ptr, student_stride_n, student_stride_t, n, j, pixel_ok, student_words)
        y = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, j, pixel_ok, teacher_words)

        du = tl.zeros((BN, TP), tl.float32)
        if (PIXEL_TO_WORD | SECOND_ORDER) & TERMS:
            a, _, top_s, sum_s = attention(x, valid_s, student_scale)
            b, _, top_t, sum_t = attention(y, valid_t, teacher_scale)
            if SECOND_ORDER & TERMS:
                if SLAB == TP:
                    high_a, low_a = split_fp16(a)
                    high_d, low_d = split_fp16(a - b)
                    da = unit_x * split_product(high_a, low_a, high_x, low_x)
                    da += unit_z * split_product(high_d, low_d, high_z, low_z)
                else:
                    da = tl.zeros((BN, TP), tl.float32)
                    for start in range(0, TP, SLAB):
                        i = start + tl.arange(0, SLAB)
                        ok = valid_words(student_mask_ptr, sample, student_count, i)
                        slab_logits = load_logits(student_ptr, student_stride_n, student_stride_t, n, i, pixel_ok, ok)
                        slab_a = attention_slab(
                            slab_logits, top_s, sum_s, pixel_ok[:, None] & ok[None, :], student_scale
                        )
                        ok = valid_words(teacher_mask_ptr, sample, teacher_count, i)
                        slab_logits = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, i, pixel_ok, ok)
                        slab_b = attention_slab(
                            slab_logits, top_t, sum_t, pixel_ok[:, None] & ok[None, :], teacher_scale
                        )
                        high_x, low_x, unit_x, high_z, low_z, unit_z = load_x_and_z(grams_ptr, words, i, j, g_ww, g_pp)
                        high_a, low_a = split_fp16(slab_a)
                        high_d, low_d = split_fp16(slab_a - slab_b)
                        da += unit_x * split_product(high_a, low_a, high_x, low_x)
                        da += unit_z * split_product(high_d, low_d, high_z, low_z)
                du = a * (da - tl.sum(da * a, axis=1)[:, None])
            if PIXEL_TO_WORD & TERMS:
                du += g_pw * (a - b)
        if WORD_TO_PIXEL & TERMS:
            q_s = tl.exp2((x - m_s[None, :]) * student_scale * LOG2E) * (1.0 / z_s)[None, :]
            q_t = tl.exp2((y - m_t[None, :]) * teacher_scale * LOG2E) * (1.0 / z_t)[None, :]
            du += g_wp * (q_s - q_t)
        dm = tl.where(valid_s, student_scale * du, 0.0)

        out = grad_logits_ptr + n[:, None] * grad_logits_stride_n + j.to(tl.int64)[None, :] * grad_logits_stride_t
        in_range = (n < pixels)[:, None] & (j < student_count)[None, :]
        tl.store(out, round_to(dm, grad_logits_ptr.dtype.element_ty), mask=in_range)


def backward(
    student: Side,
    teacher: Side,
    pixel_mask: Tensor | None,
    valid: Tensor | None,
    terms: int,
    saved: Any,
    grad_loss: Tensor,
    grad_pixels: Tensor,
    grad_words: Tensor,
) -> None:
    """Fill ``grad_pixels`` (B, N, D), any strides, and ``grad_words`` (B, T, D), unless they are empty."""
    assert student.pixels is not None
    logits, norms, columns, grams = [x if x.numel() else None for x in saved]
    batch, pixels, width = student.pixels.shape
    count = student.word_count
    half = student.pixels.element_size() == 2
    counts = (count, teacher.word_count)
    plan = backward_plan(batch, pixels, width, counts, half, terms, capability(grad_loss))
    grad_logits, grad_strides = grad_pixels, grad_pixels.stride()
    if student.words is not None:  # (B, T, N), passed as (B, N, T)
        grad_logits = grad_loss.new_empty(batch, count, pixels)
        grad_strides = (count * pixels, 1, pixels)
    with launching_on(grad_loss):
        gradient_kernel.run(
            *logits_of(student, logits, 0),
            *logits_of(teacher, logits, count),
            pixel_mask,
            valid,
            columns,
            grams,
            grad_loss,
            *grad_loss.stride(),
            grad_logits,
            *grad_strides,
            *plan.gradient.sizes,
            **plan.gradient.options,
        )
        if student.words is None:
            return
        cosine = norms is not None
        cosine_features, cosine_words = (student.pixels, student.words) if cosine else (None, None)
        if grad_pixels.numel():
            pixels_kernel.run(
                grad_logits,
                student.words,
                *student.words.stride(),
                student.word_mask,
                pixel_mask,
                logits if cosine else None,
                logits.stride(0) if cosine else 0,
                cosine_features,
                *strides(cosine_features),
                norms,
                grad_pixels,
                *grad_pixels.stride(),
                *plan.pixels.sizes,
                **plan.pixels.options,
            )
        if grad_words.numel():
            sums = grad_loss.new_empty(*plan.sums)
            words_kernel.run(
                grad_logits,
                student.pixels,
                *student.pixels.stride(),
                norms,
                pixel_mask,
                sums,
                *plan.words.sizes,
                **plan.words.options,
            )
            merge_words_kernel.run(
                sums,
                cosine_words,
                *strides(cosine_words),
                student.word_mask,
                grad_words,
                *plan.merge.sizes,
                **plan.merge.options,
            )
