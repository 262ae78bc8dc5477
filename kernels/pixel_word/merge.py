"""Merge the partial sums of ``pixel_word``'s programs: column statistics, Gram matrices and losses."""

from __future__ import annotations

import triton
import triton.language as tl
from fastkd.kernels.common import LOG2E
from fastkd.kernels.pixel_word.tiles import (
    LOWEST,
    PIXEL_PIXEL,
    PIXEL_TO_WORD,
    SECOND_ORDER,
    WORD_TO_PIXEL,
    WORD_WORD,
    valid_words,
)


# ---------------------------------------------------------------------------------------------------------------------
# The KL over pixels of each word. A set of pixels is summarised by the maximum m of M and z = Σ e^{u − s m} of each
# network, and by a = Σ e^{u_T − s m_T} ((u_T − s m_T) − (u_S − s m_S)); then
#
#     KL = a/z_T − log z_T + log z_S.
#
# To merge two sets, rescale both to the larger maxima: for shifts h_S, h_T ≤ 0, a becomes
# e^{h_T} (a + z_T (h_T − h_S)). Everything is relative to the maxima, so that logits of 1e4 keep full precision. If
# e^{h_T} z_T is 0, the term counts as 0 even if h_T − h_S is infinite (0·log 0 = 0).
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def column_sums(m_s, m_t, valid_s, valid_t, scale_s, scale_t):
    """Return (m_S, z_S, m_T, z_T, a) of one block of pixels."""
    top_s = tl.maximum(tl.max(tl.where(valid_s, m_s, float("-inf")), axis=0), LOWEST)
    top_t = tl.maximum(tl.max(tl.where(valid_t, m_t, float("-inf")), axis=0), LOWEST)
    u_s = (m_s - top_s[None, :]) * scale_s
    u_t = (m_t - top_t[None, :]) * scale_t
    e_s = tl.where(valid_s, tl.exp2(u_s * LOG2E), 0.0)
    e_t = tl.where(valid_t, tl.exp2(u_t * LOG2E), 0.0)
    a = tl.sum(tl.where(e_t == 0.0, 0.0, e_t * (u_t - u_s)), axis=0)
    return top_s, tl.sum(e_s, axis=0), top_t, tl.sum(e_t, axis=0), a


@triton.jit
def rescale(z_s, z_t, a, h_s, h_t):
    """Return z_S, z_T and a relative to maxima that are larger by −h_S and −h_T."""
    w = tl.exp2(h_t * LOG2E)
    rescaled_a = tl.where(w * z_t == 0.0, 0.0, w * (a + z_t * (h_t - h_s)))
    return z_s * tl.exp2(h_s * LOG2E), w * z_t, rescaled_a


@triton.jit
def merge_columns(m_s, z_s, m_t, z_t, a, n_s, y_s, n_t, y_t, c, scale_s, scale_t):
    """Return the maxima and sums of the union of two sets of pixels, (m, z, a) and (n, y, c)."""
    top_s = tl.maximum(m_s, n_s)
    top_t = tl.maximum(m_t, n_t)
    z_s, z_t, a = rescale(z_s, z_t, a, (m_s - top_s) * scale_s, (m_t - top_t) * scale_t)
    y_s, y_t, c = rescale(y_s, y_t, c, (n_s - top_s) * scale_s, (n_t - top_t) * scale_t)
    return top_s, z_s + y_s, top_t, z_t + y_t, a + c


# ---------------------------------------------------------------------------------------------------------------------
# Add the partial sums of a sample in program order and compute its losses. For the backward, write the maxima and sums
# of the columns, and G, K, E. The matrices are processed FLAT entries at a time: whole rows for every TP.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["pixels", "student_count", "programs", "words"])
def merge_kernel(
    partials_ptr,  # (B, programs, SIZE)
    valid_ptr,  # (B,) numbers of valid pixels, or None
    student_mask_ptr,  # (B, T), or None
    loss_ptr,  # output (B, 4)
    columns_ptr,  # output (B, 4, T) m_S, z_S, m_T, z_T, or None
    grams_ptr,  # output (B, 3, words, words) G, K, E, or None
    pixels,
    student_count,
    words,  # the larger of both counts
    programs,
    student_scale,
    teacher_scale,
    TP: tl.constexpr,
    TERMS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,  # ≥ programs
):
    """Merge the partial sums of one sample per program."""
    sample = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = 8 * TP + 3 * TP * TP
    partials_ptr += sample * programs * SIZE
    loss_ptr += sample * 4
    n = pixels.to(tl.float32)
    if valid_ptr is not None:
        n = tl.load(valid_ptr + sample)

    pixel_to_word = 0.0
    if PIXEL_TO_WORD & TERMS:
        q = tl.arange(0, MAX_PROGRAMS)
        pixel_to_word = tl.sum(tl.load(partials_ptr + q * SIZE + 5 * TP, mask=q < programs, other=0.0), axis=0) / n
    tl.store(loss_ptr, pixel_to_word)

    word_to_pixel = 0.0
    if WORD_TO_PIXEL & TERMS:
        j = tl.arange(0, TP)
        m_s = tl.full((TP,), LOWEST, tl.float32)
        m_t = tl.full((TP,), LOWEST, tl.float32)
        z_s = tl.zeros((TP,), tl.float32)
        z_t = tl.zeros((TP,), tl.float32)
        c = tl.zeros((TP,), tl.float32)
        CHUNK: tl.constexpr = 16
        for start in range(0, programs, CHUNK):
            run = start + tl.arange(0, CHUNK)
            sums = partials_ptr + run[:, None] * SIZE + j[None, :]
            run_mask = (run < programs)[:, None]
            n_s = tl.load(sums, mask=run_mask, other=LOWEST)
            y_s = tl.load(sums + TP, mask=run_mask, other=0.0)
            n_t = tl.load(sums + 2 * TP, mask=run_mask, other=LOWEST)
            y_t = tl.load(sums + 3 * TP, mask=run_mask, other=0.0)
            d = tl.load(sums + 4 * TP, mask=run_mask, other=0.0)
            top_s = tl.max(n_s, axis=0)
            top_t = tl.max(n_t, axis=0)
            h_s = (n_s - top_s[None, :]) * student_scale
            h_t = (n_t - top_t[None, :]) * teacher_scale
            y_s, y_t, d = rescale(y_s, y_t, d, h_s, h_t)
            m_s, z_s, m_t, z_t, c = merge_columns(
                m_s, z_s, m_t, z_t, c, top_s, tl.sum(y_s, axis=0), top_t, tl.sum(y_t, axis=0), tl.sum(d, axis=0),
                student_scale, teacher_scale,
            )  # fmt: skip
        ok = valid_words(student_mask_ptr, sample, student_count, j)
        kl = c / z_t + tl.log(tl.div_rn(z_s, z_t))
        word_to_pixel = tl.sum(tl.where(ok, kl, 0.0), axis=0) / tl.sum(ok.to(tl.float32), axis=0)
        if columns_ptr is not None:
            column_out = columns_ptr + sample * 4 * student_count + j
            column_mask = j < student_count
            tl.store(column_out, m_s, mask=column_mask)
            tl.store(column_out + student_count, z_s, mask=column_mask)
            tl.store(column_out + 2 * student_count, m_t, mask=column_mask)
            tl.store(column_out + 3 * student_count, z_t, mask=column_mask)
    tl.store(loss_ptr + 1, word_to_pixel)

    pixel_pixel = 0.0
    word_word = 0.0
    if SECOND_ORDER & TERMS:
        FLAT: tl.constexpr = 1024 if TP >= 32 else TP * TP
        PROGRAM_CHUNK: tl.constexpr = 4
        pp = tl.zeros((FLAT,), tl.float32)
        ww = tl.zeros((FLAT,), tl.float32)
        for start in range(0, TP * TP, FLAT):
            entry = start + tl.arange(0, FLAT)
            row = entry // TP
            column = entry % TP
            g = tl.zeros((FLAT,), tl.float32)
            k = tl.zeros((FLAT,), tl.float32)
            k_t = tl.zeros((FLAT,), tl.float32)
            e = tl.zeros((FLAT,), tl.float32)
            for p0 in range(0, programs, PROGRAM_CHUNK):
                p = p0 + tl.arange(0, PROGRAM_CHUNK)
                program_mask = (p < programs)[:, None]
                base = partials_ptr + p[:, None] * SIZE + 8 * TP
                from_p = base + entry[None, :]
                g += tl.sum(tl.load(from_p, mask=program_mask, other=0.0), axis=0)
                k += tl.sum(tl.load(from_p + TP * TP, mask=program_mask, other=0.0), axis=0)
                e += tl.sum(tl.load(from_p + 2 * TP * TP, mask=program_mask, other=0.0), axis=0)
                transposed = base + TP * TP + (column * TP + row)[None, :]
                k_t += tl.sum(tl.load(transposed, mask=program_mask, other=0.0), axis=0)
            w = k + k_t - e
            pp += (g + (g - w)) * e + 2 * k * (k_t - e)
            ww += w * w
            if grams_ptr is not None:
                gram_out = grams_ptr + (sample * 3 * words + row) * words + column
                gram_mask = (row < words) & (column < words)
                tl.store(gram_out, g, mask=gram_mask)
                tl.store(gram_out + words * words, k, mask=gram_mask)
                tl.store(gram_out + 2 * words * words, e, mask=gram_mask)
        if PIXEL_PIXEL & TERMS:
            pixel_pixel = tl.sum(pp, axis=0) / (n * n)
        if WORD_WORD & TERMS:
            word_word = tl.sum(ww, axis=0) / (n * n)
    tl.store(loss_ptr + 2, pixel_pixel)
    tl.store(loss_ptr + 3, word_word)
