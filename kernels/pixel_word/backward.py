r"""``pixel_word`` in Triton, backward: from the logits, the columns' sums, and G, K, E (see ``pixel_word.py``).

With g_k the gradient of loss k, the second order gives dA = A X + D Z,

.. math:: X = \tfrac{4}{n^2} (g_{ww} W + g_{pp} K), \qquad Z = \tfrac{4}{n^2} g_{pp} (G - K),

since :math:`d\|AA^T - BB^T\|^2 / dA = 4 (DG + BK)` and :math:`d\|W\|^2 / dA = 4AW`. Then, per pixel,

.. math:: du = A \odot (dA - \langle dA, A\rangle) + \tfrac{g_{pw}}{n} D + \tfrac{g_{wp}}{t} (Q_S - Q_T),
          \qquad dM = s\,du,

and with logits given, that is all. Of features, dV = dM L and dL = dMᵀ V; for the cosine, with V̂ and L̂ of length 1,
dV = (dM L̂ − V̂ ⟨dM, M⟩)/|V| and dL = (dMᵀ V̂ − L̂ ⟨dMᵀ V̂, L̂⟩)/|L|. dM is kept in fp32 between the two; its products
with features of 16 bits, which TF32 holds exactly, are of two TF32 products, others of three. Masked pixels and words
get exactly 0, whatever the others hold.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E, cdiv, launching_on, round_to
from fastkd.kernels.pixel_word.features import merge_words_kernel, pixels_kernel, words_kernel
from fastkd.kernels.pixel_word.tiles import (
    FUSED,
    MERGE_WORDS,
    MOST_SUMS,
    PIXEL_PIXEL,
    PIXEL_TO_WORD,
    SECOND_ORDER,
    UNIT,
    WORD_TO_PIXEL,
    WORD_WORD,
    Side,
    attention,
    attention_slab,
    cut,
    gradient_blocks,
    halves,
    load_logits,
    logits_of,
    padded,
    pixels_blocks,
    product_of_halves,
    strides,
    valid_pixels,
    valid_words,
    words_blocks,
)
from torch import Tensor


@triton.jit
def in_units(x):
    """x / max |x| in halves, and what their products count in."""
    largest = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-30)
    high, low = halves(x / largest)
    return high, low, largest * UNIT


@triton.jit
def slopes(grams_ptr, words, i, j, g_ww, g_pp):
    """The rows ``i`` of X and of Z."""
    both = (i < words)[:, None] & (j < words)[None, :]
    entry = grams_ptr + i[:, None] * words + j[None, :]
    turned = grams_ptr + j[None, :] * words + i[:, None]
    g = tl.load(entry, mask=both, other=0.0)
    k = tl.load(entry + words * words, mask=both, other=0.0)
    k_t = tl.load(turned + words * words, mask=both, other=0.0)
    e = tl.load(entry + 2 * words * words, mask=both, other=0.0)
    high_x, low_x, unit_x = in_units(g_ww * (k + k_t - e) + g_pp * k)
    high_z, low_z, unit_z = in_units(g_pp * (g - k))
    return high_x, low_x, unit_x, high_z, low_z, unit_z


# ---------------------------------------------------------------------------------------------------------------------
# dM, from the logits. Of X and Z only SLAB rows are held at a time, against the same columns of A and D.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["student_count", "teacher_count", "words", "each"])
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
    grad_logits_ptr,  # dM (B, N, T) to be written, any strides
    grad_logits_stride_b,
    grad_logits_stride_n,
    grad_logits_stride_t,
    pixels,
    words,
    each,
    BN: tl.constexpr,
    TP: tl.constexpr,
    SLAB: tl.constexpr,
    TERMS: tl.constexpr,
):
    """dM of ``each`` blocks of pixels."""
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
            high_x, low_x, unit_x, high_z, low_z, unit_z = slopes(grams_ptr, words, j, j, g_ww, g_pp)

    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, tl.cdiv(pixels, BN))):
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
                    high_a, low_a = halves(a)
                    high_d, low_d = halves(a - b)
                    da = unit_x * product_of_halves(high_a, low_a, high_x, low_x, du)
                    da += unit_z * product_of_halves(high_d, low_d, high_z, low_z, du)
                else:
                    da = tl.zeros((BN, TP), tl.float32)
                    for start in range(0, TP, SLAB):
                        i = start + tl.arange(0, SLAB)
                        ok = valid_words(student_mask_ptr, sample, student_count, i)
                        some = load_logits(student_ptr, student_stride_n, student_stride_t, n, i, pixel_ok, ok)
                        some_a = attention_slab(some, top_s, sum_s, pixel_ok[:, None] & ok[None, :], student_scale)
                        ok = valid_words(teacher_mask_ptr, sample, teacher_count, i)
                        some = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, i, pixel_ok, ok)
                        some_b = attention_slab(some, top_t, sum_t, pixel_ok[:, None] & ok[None, :], teacher_scale)
                        high_x, low_x, unit_x, high_z, low_z, unit_z = slopes(grams_ptr, words, i, j, g_ww, g_pp)
                        high_a, low_a = halves(some_a)
                        high_d, low_d = halves(some_a - some_b)
                        da += unit_x * product_of_halves(high_a, low_a, high_x, low_x, du)
                        da += unit_z * product_of_halves(high_d, low_d, high_z, low_z, du)
                du = a * (da - tl.sum(da * a, axis=1)[:, None])
            if PIXEL_TO_WORD & TERMS:
                du += g_pw * (a - b)
        if WORD_TO_PIXEL & TERMS:
            q_s = tl.exp2((x - m_s[None, :]) * student_scale * LOG2E) * (1.0 / z_s)[None, :]
            q_t = tl.exp2((y - m_t[None, :]) * teacher_scale * LOG2E) * (1.0 / z_t)[None, :]
            du += g_wp * (q_s - q_t)
        dm = tl.where(valid_s, student_scale * du, 0.0)

        to = grad_logits_ptr + n[:, None] * grad_logits_stride_n + j.to(tl.int64)[None, :] * grad_logits_stride_t
        here = (n < pixels)[:, None] & (j < student_count)[None, :]
        tl.store(to, round_to(dm, grad_logits_ptr.dtype.element_ty), mask=here)


def backward(
    student: Side,
    teacher: Side,
    pixel_mask: Tensor | None,
    valid: Tensor | None,
    terms: int,
    kept: Any,
    grad_loss: Tensor,
    grad_pixels: Tensor,
    grad_words: Tensor,
) -> None:
    """Fill ``grad_pixels`` (B, N, D), any strides, and ``grad_words`` (B, T, D), unless they are empty."""
    assert student.pixels is not None
    logits, norms, columns, grams = (x if x.numel() else None for x in kept)
    batch, pixels, width = student.pixels.shape
    count = student.word_count
    most = max(count, teacher.word_count)
    from_logits = student.words is None
    grad_logits = grad_pixels
    if not from_logits:
        grad_logits = torch.empty((batch, count, pixels), dtype=torch.float32, device=grad_loss.device).mT
    with launching_on(grad_loss):
        blocks = gradient_blocks(padded(most))
        each, programs = cut(pixels, blocks.pixels, batch, pixels)
        gradient_kernel[(batch, programs)](
            *logits_of(student, logits, 0),
            *logits_of(teacher, logits, count),
            pixel_mask,
            valid,
            columns,
            grams,
            grad_loss,
            *grad_loss.stride(),
            grad_logits,
            *grad_logits.stride(),
            pixels,
            most,
            each,
            BN=blocks.pixels,
            TP=padded(most),
            SLAB=min(padded(most), blocks.columns),
            TERMS=terms,
            **blocks.launch(FUSED),
        )
        if from_logits:
            return
        cosine = norms is not None
        own_features, own_words = (student.pixels, student.words) if cosine else (None, None)
        half = student.pixels.element_size() == 2
        if grad_pixels.numel():
            blocks = pixels_blocks(padded(count), half)
            pixels_kernel[(batch, cdiv(pixels, blocks.pixels))](
                grad_logits,
                student.words,
                *strides(student.words),
                student.word_mask,
                pixel_mask,
                logits if cosine else None,
                0 if logits is None else logits.stride(0),
                own_features,
                *strides(own_features),
                norms,
                grad_pixels,
                *grad_pixels.stride(),
                pixels,
                count,
                width,
                BN=blocks.pixels,
                TP=padded(count),
                BD=blocks.columns,
                **blocks.launch(),
            )
        if grad_words.numel():
            blocks = words_blocks(padded(count), half)
            chunks = cdiv(width, blocks.columns)
            each, runs = cut(pixels, blocks.pixels, batch * chunks, MOST_SUMS)
            sums = torch.empty((batch, runs, count, width), dtype=torch.float32, device=grad_loss.device)
            words_kernel[(batch, runs, chunks)](
                grad_logits,
                student.pixels,
                *strides(student.pixels),
                norms,
                pixel_mask,
                sums,
                pixels,
                count,
                width,
                each,
                runs,
                BN=blocks.pixels,
                TP=padded(count),
                BD=blocks.columns,
                **blocks.launch(),
            )
            merge_words_kernel[(batch, count)](
                sums,
                own_words,
                *strides(own_words),
                student.word_mask,
                grad_words,
                count,
                width,
                runs,
                BD=MERGE_WORDS.columns,
                SOME=8,
                num_warps=MERGE_WORDS.warps,
                enable_fp_fusion=True,
            )
