r"""Forward of ``pixel_word`` in Triton: distances between the pixel–word attention of two networks.

For one sample, let M (pixels × words) be the logits of student (S) and teacher (T): given, V Lᵀ, or the cosines of V
and L; u = s·M with s = 1/τ (1/(τ√D) for the scaled product); A and B the softmaxes of u_S and u_T over words, Q_S
and Q_T those over pixels; D = A − B; n the number of valid pixels and t of valid words. The four losses are

.. math:: \tfrac1n \sum_p \mathrm{KL}(B_p \| A_p), \quad \tfrac1t \sum_j \mathrm{KL}(Q_{T,j} \| Q_{S,j}), \quad
          \|AA^T - BB^T\|_F^2 / n^2, \quad \|A^TA - B^TB\|_F^2 / n^2 .

The last two follow from three words × words matrices G = AᵀA, K = DᵀA and E = DᵀD. Every term has a factor D, so
nothing cancels when the student is close to the teacher: BᵀD = Kᵀ − E, BᵀB = G − K − Kᵀ + E, and

.. math:: \|AA^T - BB^T\|^2 = \langle G + B^TB, E\rangle + 2 \sum_{ij} K_{ij} (B^TD)_{ij}, \quad
          \|A^TA - B^TB\|^2 = \|W\|^2, \; W = K + K^T - E .

Words are padded to a power of two, ``TP``. Missing or masked words have attention probability 0. Arithmetic is fp32:
16-bit features are multiplied directly with fp32 accumulation, fp32 features as three TF32 products, probabilities as
three fp16 products (``split_fp16``). Features are read once, to compute the logits; the rest follows from those.
There are no atomics: each program writes its sums, and ``merge_kernel`` adds them in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels.common import INTERPRETED, capability, launching_on
from fastkd.kernels.pixel_word.merge import column_sums, merge_columns, merge_kernel
from fastkd.kernels.pixel_word.plan import forward_plan
from fastkd.kernels.pixel_word.tiles import (
    LOWEST,
    PIXEL_TO_WORD,
    SECOND_ORDER,
    SPLIT_UNIT,
    WORD_TO_PIXEL,
    Side,
    attention,
    attention_slab,
    compute_logits,
    features,
    gram,
    load_logits,
    logits_of,
    product_dtype,
    split_fp16,
    valid_pixels,
    valid_words,
)
from torch import Tensor

DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
if INTERPRETED:  # numpy cannot multiply bfloat16; products of 16-bit numbers are exact in fp32
    DOT = dict.fromkeys(DOT, tl.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The logits from features, one block of pixels per program; each feature is read once.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["student_count", "teacher_count", "pixels"])
def logits_kernel(
    student_ptr,  # V (B, N, D)
    student_stride_b,
    student_stride_n,
    student_stride_d,
    student_words_ptr,  # L (B, T, D)
    student_words_stride_b,
    student_words_stride_t,
    student_words_stride_d,
    student_mask_ptr,  # (B, T), or None
    student_count,  # T
    student_width,  # D
    teacher_ptr,
    teacher_stride_b,
    teacher_stride_n,
    teacher_stride_d,
    teacher_words_ptr,
    teacher_words_stride_b,
    teacher_words_stride_t,
    teacher_words_stride_d,
    teacher_mask_ptr,
    teacher_count,
    teacher_width,
    pixel_mask_ptr,  # (B, N), or None
    logits_ptr,  # output (B, T_S + T_T, N)
    norms_ptr,  # output |V_S| (B, N), or None
    pixels,  # N / PIXEL_UNIT
    PIXEL_UNIT: tl.constexpr,
    BN: tl.constexpr,
    TP: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the products
    COSINE: tl.constexpr,
):
    """Compute M of both networks for one block of pixels."""
    pixels *= PIXEL_UNIT
    sample = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, TP)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
    in_range = (n < pixels)[:, None]
    logits_ptr += sample * (student_count + teacher_count) * pixels
    out = logits_ptr + n[:, None] + j.to(tl.int64)[None, :] * pixels

    word_ok = valid_words(student_mask_ptr, sample, student_count, j)
    m, norm = compute_logits(
        student_ptr + sample * student_stride_b, student_stride_n, student_stride_d,
        student_words_ptr + sample * student_words_stride_b, student_words_stride_t, student_words_stride_d,
        n, j, pixel_ok, word_ok, student_width, BN, TP, BD, DOT, COSINE,
    )  # fmt: skip
    tl.store(out, m, mask=in_range & (j < student_count)[None, :])
    if norms_ptr is not None:
        tl.store(norms_ptr + sample * pixels + n, norm, mask=n < pixels)

    word_ok = valid_words(teacher_mask_ptr, sample, teacher_count, j)
    m, _ = compute_logits(
        teacher_ptr + sample * teacher_stride_b, teacher_stride_n, teacher_stride_d,
        teacher_words_ptr + sample * teacher_words_stride_b, teacher_words_stride_t, teacher_words_stride_d,
        n, j, pixel_ok, word_ok, teacher_width, BN, TP, BD, DOT, COSINE,
    )  # fmt: skip
    tl.store(out + student_count.to(tl.int64) * pixels, m, mask=in_range & (j < teacher_count)[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# The terms. Each program processes a contiguous run of pixels of one sample and writes SIZE floats: m_S, z_S, m_T, z_T
# and a of each word (merge.py), the sum of the KLs over words, and from 8·TP on G, K, E.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["student_count", "teacher_count", "blocks_per_program", "programs"])
def terms_kernel(
    student_ptr,  # M (B, N, T), any strides
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
    partials_ptr,  # output (B, programs, SIZE)
    pixels,
    blocks_per_program,  # blocks of pixels per program
    programs,
    BN: tl.constexpr,
    TP: tl.constexpr,
    TERMS: tl.constexpr,  # bits of the terms, without the second-order ones if grams_kernel computes G, K, E
):
    """Compute the first-order sums and G, K, E of ``blocks_per_program`` blocks of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    student_ptr += sample * student_stride_b
    teacher_ptr += sample * teacher_stride_b
    j = tl.arange(0, TP)
    student_words = valid_words(student_mask_ptr, sample, student_count, j)
    teacher_words = valid_words(teacher_mask_ptr, sample, teacher_count, j)

    kl = tl.zeros((BN,), tl.float32)
    m_s = tl.full((TP,), LOWEST, tl.float32)
    m_t = tl.full((TP,), LOWEST, tl.float32)
    z_s = tl.zeros((TP,), tl.float32)
    z_t = tl.zeros((TP,), tl.float32)
    c = tl.zeros((TP,), tl.float32)
    g = tl.zeros((TP, TP), tl.float32)
    k = tl.zeros((TP, TP), tl.float32)
    e = tl.zeros((TP, TP), tl.float32)

    first = tl.program_id(1) * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, tl.cdiv(pixels, BN))):
        n = (block * BN + tl.arange(0, BN)).to(tl.int64)
        pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
        x = load_logits(student_ptr, student_stride_n, student_stride_t, n, j, pixel_ok, student_words)
        y = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, j, pixel_ok, teacher_words)
        valid_s = pixel_ok[:, None] & student_words[None, :]
        valid_t = pixel_ok[:, None] & teacher_words[None, :]
        if WORD_TO_PIXEL & TERMS:
            n_s, y_s, n_t, y_t, h = column_sums(x, y, valid_s, valid_t, student_scale, teacher_scale)
            m_s, z_s, m_t, z_t, c = merge_columns(
                m_s, z_s, m_t, z_t, c, n_s, y_s, n_t, y_t, h, student_scale, teacher_scale
            )  # fmt: skip
        if (PIXEL_TO_WORD | SECOND_ORDER) & TERMS:
            a, u_s, _, sum_s = attention(x, valid_s, student_scale)
            b, u_t, _, sum_t = attention(y, valid_t, teacher_scale)
            if PIXEL_TO_WORD & TERMS:
                row = tl.sum(tl.where(b == 0.0, 0.0, b * (u_t - u_s)), axis=1) + tl.log(tl.div_rn(sum_s, sum_t))
                kl += tl.where(pixel_ok, row, 0.0)
            if SECOND_ORDER & TERMS:
                high_a, low_a = split_fp16(a)
                high_d, low_d = split_fp16(a - b)
                g = gram(high_a, low_a, high_a, low_a, g)
                k = gram(high_d, low_d, high_a, low_a, k)
                e = gram(high_d, low_d, high_d, low_d, e)

    SIZE: tl.constexpr = 8 * TP + 3 * TP * TP
    partial = partials_ptr + (sample * programs + tl.program_id(1)) * SIZE
    if WORD_TO_PIXEL & TERMS:
        tl.store(partial + j, m_s)
        tl.store(partial + TP + j, z_s)
        tl.store(partial + 2 * TP + j, m_t)
        tl.store(partial + 3 * TP + j, z_t)
        tl.store(partial + 4 * TP + j, c)
    if PIXEL_TO_WORD & TERMS:
        tl.store(partial + 5 * TP, tl.sum(kl, axis=0))
    if SECOND_ORDER & TERMS:
        out = partial + 8 * TP + j[:, None] * TP + j[None, :]
        tl.store(out, g * SPLIT_UNIT)
        tl.store(out + TP * TP, k * SPLIT_UNIT)
        tl.store(out + 2 * TP * TP, e * SPLIT_UNIT)


# ---------------------------------------------------------------------------------------------------------------------
# G, K, E for many words, from the logits in memory: words × words exceeds the registers of a program, so each program
# computes SLAB columns.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["student_count", "teacher_count", "blocks_per_program", "programs"])
def grams_kernel(
    student_ptr,  # M (B, N, T), any strides
    student_stride_b,
    student_stride_n,
    student_stride_t,
    student_mask_ptr,
    student_count,
    student_scale,
    teacher_ptr,
    teacher_stride_b,
    teacher_stride_n,
    teacher_stride_t,
    teacher_mask_ptr,
    teacher_count,
    teacher_scale,
    pixel_mask_ptr,
    partials_ptr,  # output, as in terms_kernel
    pixels,
    blocks_per_program,
    programs,
    BN: tl.constexpr,
    TP: tl.constexpr,
    SLAB: tl.constexpr,
):
    """Compute ``SLAB`` columns of G, K and E for ``blocks_per_program`` blocks of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    student_ptr += sample * student_stride_b
    teacher_ptr += sample * teacher_stride_b
    j = tl.arange(0, TP)
    student_words = valid_words(student_mask_ptr, sample, student_count, j)
    teacher_words = valid_words(teacher_mask_ptr, sample, teacher_count, j)
    i = tl.program_id(2) * SLAB + tl.arange(0, SLAB)
    g = tl.zeros((TP, SLAB), tl.float32)
    k = tl.zeros((TP, SLAB), tl.float32)
    e = tl.zeros((TP, SLAB), tl.float32)
    student_slab = valid_words(student_mask_ptr, sample, student_count, i)
    teacher_slab = valid_words(teacher_mask_ptr, sample, teacher_count, i)

    first = tl.program_id(1) * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, tl.cdiv(pixels, BN))):
        n = (block * BN + tl.arange(0, BN)).to(tl.int64)
        pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
        x = load_logits(student_ptr, student_stride_n, student_stride_t, n, j, pixel_ok, student_words)
        y = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, j, pixel_ok, teacher_words)
        a, _, top_s, sum_s = attention(x, pixel_ok[:, None] & student_words[None, :], student_scale)
        b, _, top_t, sum_t = attention(y, pixel_ok[:, None] & teacher_words[None, :], teacher_scale)
        x = load_logits(student_ptr, student_stride_n, student_stride_t, n, i, pixel_ok, student_slab)
        y = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, i, pixel_ok, teacher_slab)
        slab_a = attention_slab(x, top_s, sum_s, pixel_ok[:, None] & student_slab[None, :], student_scale)
        slab_b = attention_slab(y, top_t, sum_t, pixel_ok[:, None] & teacher_slab[None, :], teacher_scale)
        high_a, low_a = split_fp16(a)
        high_d, low_d = split_fp16(a - b)
        high_slab_a, low_slab_a = split_fp16(slab_a)
        high_slab_d, low_slab_d = split_fp16(slab_a - slab_b)
        g = gram(high_a, low_a, high_slab_a, low_slab_a, g)
        k = gram(high_d, low_d, high_slab_a, low_slab_a, k)
        e = gram(high_d, low_d, high_slab_d, low_slab_d, e)

    SIZE: tl.constexpr = 8 * TP + 3 * TP * TP
    out = partials_ptr + (sample * programs + tl.program_id(1)) * SIZE + 8 * TP + j[:, None] * TP + i[None, :]
    tl.store(out, g * SPLIT_UNIT)
    tl.store(out + TP * TP, k * SPLIT_UNIT)
    tl.store(out + 2 * TP * TP, e * SPLIT_UNIT)


def forward(
    student: Side,
    teacher: Side,
    pixel_mask: Tensor | None,
    valid: Tensor | None,
    cosine: bool,
    terms: int,
    saved: Any,
    loss: Tensor,
) -> None:
    """Fill ``loss`` (B, 4) and the non-empty tensors of ``saved`` (logits, norms, columns, grams)."""
    assert student.pixels is not None
    logits, norms, columns, grams = [x if x.numel() else None for x in saved]
    batch, pixels = student.pixels.shape[:2]
    counts = (student.word_count, teacher.word_count)
    dot = product_dtype(student.pixels, student.words, teacher.pixels, teacher.words)
    plan = forward_plan(batch, pixels, counts, dot != torch.float32, cosine, terms, capability(loss))
    with launching_on(loss):
        if student.words is not None:
            if logits is None:
                logits = loss.new_empty(batch, sum(counts), pixels)
            logits_kernel.run(
                *features(student),
                *features(teacher),
                pixel_mask,
                logits,
                norms,
                *plan.logits.sizes,
                DOT=DOT[dot],
                **plan.logits.options,
            )
        partials = loss.new_empty(*plan.partials)
        inputs = (*logits_of(student, logits, 0), *logits_of(teacher, logits, counts[0]), pixel_mask, partials)
        if plan.terms is not None:
            terms_kernel.run(*inputs, *plan.terms.sizes, **plan.terms.options)
        if plan.grams is not None:
            grams_kernel.run(*inputs, *plan.grams.sizes, **plan.grams.options)
        merge_kernel.run(
            partials,
            valid,
            student.word_mask,
            loss,
            columns,
            grams,
            *plan.merge.sizes,
            student.scale,
            teacher.scale,
            **plan.merge.options,
        )
