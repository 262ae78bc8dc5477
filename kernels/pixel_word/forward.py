r"""``pixel_word`` in Triton, forward: how two networks' pixels attend to words.

Of one sample: logits M (pixels × words) of student and teacher, given or M = V Lᵀ (or the cosines of V and L), u = s·M
with the scale s = 1/τ (1/(τ√D) for the scaled product); A and B are the softmaxes over words of u_S and u_T, Q_S and
Q_T those over pixels, D = A − B; n valid pixels, t valid words. The four losses are

.. math:: \tfrac1n \sum_p \mathrm{KL}(B_p \| A_p), \quad \tfrac1t \sum_j \mathrm{KL}(Q_{T,j} \| Q_{S,j}), \quad
          \|AA^T - BB^T\|_F^2 / n^2, \quad \|A^TA - B^TB\|_F^2 / n^2 .

The second two come of three words × words matrices G = AᵀA, K = DᵀA, E = DᵀD, each with a factor D where a difference
is due, so that nothing cancels as the student nears the teacher: BᵀD = Kᵀ − E, BᵀB = G − K − Kᵀ + E, and

.. math:: \|AA^T - BB^T\|^2 = \langle G + B^TB, E\rangle + 2 \sum_{ij} K_{ij} (B^TD)_{ij}, \quad
          \|A^TA - B^TB\|^2 = \|W\|^2, \; W = K + K^T - E .

Words are padded to a power of two, ``TP``. A word that one network lacks or has masked is one to which it attends with
probability 0. Arithmetic is fp32: features of 16 bits are multiplied as they are and summed in fp32, those of fp32 in
three TF32 products, probabilities in three of fp16 (``halves``). Features are read once, for the logits; all else is
computed from these. No atomics: every program writes its sums, which ``merge_kernel`` adds in order. The backward is in
``pixel_word_backward.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels.common import INTERPRETED, capability, cdiv, launching_on
from fastkd.kernels.pixel_word.merge import columns_of, merge_kernel, merged
from fastkd.kernels.pixel_word.tiles import (
    FUSED,
    LOWEST,
    MERGE,
    MOST_SUMS,
    PIXEL_TO_WORD,
    SECOND_ORDER,
    UNIT,
    WORD_TO_PIXEL,
    Side,
    attention,
    attention_slab,
    compute_logits,
    cut,
    features,
    gram,
    halves,
    load_logits,
    logits_blocks,
    logits_of,
    padded,
    product_dtype,
    terms_blocks,
    valid_pixels,
    valid_words,
)
from torch import Tensor

DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
if INTERPRETED:  # numpy has no products of bfloat16; those of 16 bits are exact in fp32 anyway
    DOT = dict.fromkeys(DOT, tl.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The logits of features, block of pixels by block of pixels, each feature read once.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["student_count", "teacher_count"])
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
    logits_ptr,  # (B, T_S + T_T, N) to be written
    norms_ptr,  # (B, N) |V_S| to be written, or None
    pixels,  # N
    BN: tl.constexpr,
    TP: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,  # what features are multiplied in
    COSINE: tl.constexpr,
):
    """M of both networks, of one block of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, TP)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
    there = (n < pixels)[:, None]
    logits_ptr += sample * (student_count + teacher_count) * pixels
    to = logits_ptr + n[:, None] + j.to(tl.int64)[None, :] * pixels

    word_ok = valid_words(student_mask_ptr, sample, student_count, j)
    m, norm = compute_logits(
        student_ptr + sample * student_stride_b, student_stride_n, student_stride_d,
        student_words_ptr + sample * student_words_stride_b, student_words_stride_t, student_words_stride_d,
        n, j, pixel_ok, word_ok, student_width, BN, TP, BD, DOT, COSINE,
    )  # fmt: skip
    tl.store(to, m, mask=there & (j < student_count)[None, :])
    if norms_ptr is not None:
        tl.store(norms_ptr + sample * pixels + n, norm, mask=n < pixels)

    word_ok = valid_words(teacher_mask_ptr, sample, teacher_count, j)
    m, _ = compute_logits(
        teacher_ptr + sample * teacher_stride_b, teacher_stride_n, teacher_stride_d,
        teacher_words_ptr + sample * teacher_words_stride_b, teacher_words_stride_t, teacher_words_stride_d,
        n, j, pixel_ok, word_ok, teacher_width, BN, TP, BD, DOT, COSINE,
    )  # fmt: skip
    tl.store(to + student_count.to(tl.int64) * pixels, m, mask=there & (j < teacher_count)[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# The terms. A program takes one run of pixels of one sample. What it writes of them, SIZE floats: m_S, z_S, m_T, z_T, a
# by word, the sum of the KLs over words, and from 8·TP on G, K, E.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["student_count", "teacher_count", "each", "programs"])
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
    partials_ptr,  # (B, programs, SIZE)
    pixels,
    each,  # blocks of pixels to a program
    programs,
    BN: tl.constexpr,
    TP: tl.constexpr,
    TERMS: tl.constexpr,  # without the second order, its matrices are grams_kernel's
):
    """First-order sums and G, K, E of ``each`` blocks of pixels."""
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

    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, tl.cdiv(pixels, BN))):
        n = (block * BN + tl.arange(0, BN)).to(tl.int64)
        pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
        x = load_logits(student_ptr, student_stride_n, student_stride_t, n, j, pixel_ok, student_words)
        y = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, j, pixel_ok, teacher_words)
        valid_s = pixel_ok[:, None] & student_words[None, :]
        valid_t = pixel_ok[:, None] & teacher_words[None, :]
        if WORD_TO_PIXEL & TERMS:
            n_s, y_s, n_t, y_t, h = columns_of(x, y, valid_s, valid_t, student_scale, teacher_scale)
            m_s, z_s, m_t, z_t, c = merged(
                m_s, z_s, m_t, z_t, c, n_s, y_s, n_t, y_t, h, student_scale, teacher_scale
            )  # fmt: skip
        if (PIXEL_TO_WORD | SECOND_ORDER) & TERMS:
            a, u_s, _, sum_s = attention(x, valid_s, student_scale)
            b, u_t, _, sum_t = attention(y, valid_t, teacher_scale)
            if PIXEL_TO_WORD & TERMS:
                row = tl.sum(tl.where(b == 0.0, 0.0, b * (u_t - u_s)), axis=1) + tl.log(sum_s / sum_t)
                kl += tl.where(pixel_ok, row, 0.0)
            if SECOND_ORDER & TERMS:
                high_a, low_a = halves(a)
                high_d, low_d = halves(a - b)
                g = gram(high_a, low_a, high_a, low_a, g)
                k = gram(high_d, low_d, high_a, low_a, k)
                e = gram(high_d, low_d, high_d, low_d, e)

    SIZE: tl.constexpr = 8 * TP + 3 * TP * TP
    mine = partials_ptr + (sample * programs + tl.program_id(1)) * SIZE
    if WORD_TO_PIXEL & TERMS:
        tl.store(mine + j, m_s)
        tl.store(mine + TP + j, z_s)
        tl.store(mine + 2 * TP + j, m_t)
        tl.store(mine + 3 * TP + j, z_t)
        tl.store(mine + 4 * TP + j, c)
    if PIXEL_TO_WORD & TERMS:
        tl.store(mine + 5 * TP, tl.sum(kl, axis=0))
    if SECOND_ORDER & TERMS:
        at = mine + 8 * TP + j[:, None] * TP + j[None, :]
        tl.store(at, g * UNIT)
        tl.store(at + TP * TP, k * UNIT)
        tl.store(at + 2 * TP * TP, e * UNIT)


# ---------------------------------------------------------------------------------------------------------------------
# G, K, E of many words, from the logits in memory: more words × words than a program's registers hold, hence SLAB
# columns to a program.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["student_count", "teacher_count", "each", "programs"])
def grams_kernel(
    student_ptr,  # logits (B, N, T), any strides
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
    partials_ptr,
    pixels,
    each,
    programs,
    BN: tl.constexpr,
    TP: tl.constexpr,
    SLAB: tl.constexpr,
):
    """``SLAB`` columns of G, K and E of ``each`` blocks of pixels."""
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

    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, tl.cdiv(pixels, BN))):
        n = (block * BN + tl.arange(0, BN)).to(tl.int64)
        pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
        x = load_logits(student_ptr, student_stride_n, student_stride_t, n, j, pixel_ok, student_words)
        y = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, j, pixel_ok, teacher_words)
        a, _, top_s, sum_s = attention(x, pixel_ok[:, None] & student_words[None, :], student_scale)
        b, _, top_t, sum_t = attention(y, pixel_ok[:, None] & teacher_words[None, :], teacher_scale)
        x = load_logits(student_ptr, student_stride_n, student_stride_t, n, i, pixel_ok, student_slab)
        y = load_logits(teacher_ptr, teacher_stride_n, teacher_stride_t, n, i, pixel_ok, teacher_slab)
        some_a = attention_slab(x, top_s, sum_s, pixel_ok[:, None] & student_slab[None, :], student_scale)
        some_b = attention_slab(y, top_t, sum_t, pixel_ok[:, None] & teacher_slab[None, :], teacher_scale)
        high_a, low_a = halves(a)
        high_d, low_d = halves(a - b)
        high_some_a, low_some_a = halves(some_a)
        high_some_d, low_some_d = halves(some_a - some_b)
        g = gram(high_a, low_a, high_some_a, low_some_a, g)
        k = gram(high_d, low_d, high_some_a, low_some_a, k)
        e = gram(high_d, low_d, high_some_d, low_some_d, e)

    SIZE: tl.constexpr = 8 * TP + 3 * TP * TP
    at = partials_ptr + (sample * programs + tl.program_id(1)) * SIZE + 8 * TP + j[:, None] * TP + i[None, :]
    tl.store(at, g * UNIT)
    tl.store(at + TP * TP, k * UNIT)
    tl.store(at + 2 * TP * TP, e * UNIT)


def forward(
    student: Side,
    teacher: Side,
    pixel_mask: Tensor | None,
    valid: Tensor | None,
    cosine: bool,
    terms: int,
    kept: Any,
    loss: Tensor,
) -> None:
    """Fill ``loss`` (B, 4), and of ``kept`` (logits, norms, columns, grams) what is not empty."""
    assert student.pixels is not None
    logits, norms, columns, grams = (x if x.numel() else None for x in kept)
    batch, pixels = student.pixels.shape[:2]
    words = padded(max(student.word_count, teacher.word_count))
    with launching_on(loss):
        if student.words is not None:
            dot = product_dtype(student.pixels, student.words, teacher.pixels, teacher.words)
            blocks = logits_blocks(words, dot != torch.float32)
            if logits is None:
                logits = loss.new_empty((batch, student.word_count + teacher.word_count, pixels))
            logits_kernel[(batch, cdiv(pixels, blocks.pixels))](
                *features(student),
                *features(teacher),
                pixel_mask,
                logits,
                norms,
                pixels,
                BN=blocks.pixels,
                TP=words,
                BD=blocks.columns,
                DOT=DOT[dot],
                COSINE=cosine,
                **blocks.launch(),
            )
        blocks = terms_blocks(words, capability(loss))
        later = words > blocks.columns and bool(terms & SECOND_ORDER.value)
        each, programs = cut(pixels, blocks.pixels, batch, MOST_SUMS)
        partials = loss.new_empty((batch, programs, 8 * words + 3 * words * words))
        inputs = (*logits_of(student, logits, 0), *logits_of(teacher, logits, student.word_count), pixel_mask)
        first_order = terms & ~SECOND_ORDER.value
        if first_order or not later:
            terms_kernel[(batch, programs)](
                *inputs,
                partials,
                pixels,
                each,
                programs,
                BN=blocks.pixels,
                TP=words,
                TERMS=first_order if later else terms,
                **blocks.launch(FUSED),
            )
        if later:
            grams_kernel[(batch, programs, words // blocks.columns)](
                *inputs,
                partials,
                pixels,
                each,
                programs,
                BN=blocks.pixels,
                TP=words,
                SLAB=blocks.columns,
                **blocks.launch(FUSED),
            )
        merge_kernel[(batch,)](
            partials,
            valid,
            student.word_mask,
            loss,
            columns,
            grams,
            pixels,
            student.word_count,
            max(student.word_count, teacher.word_count),
            programs,
            student.scale,
            teacher.scale,
            TP=words,
            TERMS=terms,
            MOST=MOST_SUMS,
            **MERGE.launch(FUSED),
        )
