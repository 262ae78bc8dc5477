r"""``pixel_word`` in Triton, backward: from the logits, what the columns summed to, and G, K, E (see ``pixel_word.py``).

With g_k the gradient of loss k, the second order gives dA = A X + D Z,

.. math:: X = \tfrac{4}{n^2} (g_{ww} W + g_{pp} K), \qquad Z = \tfrac{4}{n^2} g_{pp} (G - K),

since :math:`d\|AA^T - BB^T\|^2 / dA = 4 (DG + BK)` and :math:`d\|W\|^2 / dA = 4AW`. Then, per pixel,

.. math:: du = A \odot (dA - \langle dA, A\rangle) + \tfrac{g_{pw}}{n} D + \tfrac{g_{wp}}{t} (Q_S - Q_T), \qquad dM = s\,du,

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
from torch import Tensor

from fastkd.kernels._common import LOG2E, cdiv, launching_on, round_to
from fastkd.kernels._pixel_word import (
    MERGE_WORDS,
    MOST_SUMS,
    NORM_FLOOR,
    PIXEL_PIXEL,
    PIXEL_TO_WORD,
    SECOND_ORDER,
    UNIT,
    WORD_TO_PIXEL,
    WORD_WORD,
    Network,
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


@triton.jit
def product(x, y, acc, EXACT: tl.constexpr):
    """x y + acc in about fp32's precision; EXACT: y is of 16 bits, hence x in two parts will do."""
    y = y.to(tl.float32)
    if EXACT:
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # the digits that TF32 holds
        acc = tl.dot(x - high, y, acc, input_precision="tf32")
        return tl.dot(high, y, acc, input_precision="tf32")
    return tl.dot(x, y, acc, input_precision="tf32x3")


@triton.jit
def inverse_norms(words_ptr, stride_t, stride_d, j, word_ok, width, TP: tl.constexpr, BD: tl.constexpr):
    """1/|L| of every word; the floor's inverse where it is shorter."""
    square = tl.zeros((TP,), tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        at = words_ptr + j.to(tl.int64)[:, None] * stride_t + d.to(tl.int64)[None, :] * stride_d
        w = tl.load(at, mask=word_ok[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(w * w, axis=1)
    return 1.0 / tl.maximum(tl.sqrt(square), NORM_FLOOR)


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


# ---------------------------------------------------------------------------------------------------------------------
# dV = dM L, or for the cosine (dM L̂ − V̂ ⟨dM, M⟩)/|V|.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["count"])
def pixels_kernel(
    grad_logits_ptr,  # dM (B, T, N)
    words_ptr,  # L (B, T, D)
    words_stride_b,
    words_stride_t,
    words_stride_d,
    word_mask_ptr,  # (B, T), or None
    pixel_mask_ptr,
    logits_ptr,  # M_S (B, T, N) but for the batch's stride, for the cosine, or None
    logits_stride_b,
    features_ptr,  # V (B, N, D), for the cosine, or None
    features_stride_b,
    features_stride_n,
    features_stride_d,
    norms_ptr,  # (B, N) |V|, for the cosine, or None
    grad_pixels_ptr,  # dV (B, N, D) to be written
    grad_pixels_stride_b,
    grad_pixels_stride_n,
    grad_pixels_stride_d,
    pixels,
    count,
    width,
    BN: tl.constexpr,
    TP: tl.constexpr,
    BD: tl.constexpr,
):
    """dV of one block of pixels."""
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
        along = tl.sum(dm * m, axis=1) * inv_v
        dm = dm * inverse_norms(words_ptr, words_stride_t, words_stride_d, j, word_ok, width, TP, BD)[None, :]
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        here = d < width
        d = d.to(tl.int64)
        at = words_ptr + j.to(tl.int64)[:, None] * words_stride_t + d[None, :] * words_stride_d
        w = tl.load(at, mask=word_ok[:, None] & here[None, :], other=0.0)
        dv = product(dm, w, tl.zeros((BN, BD), tl.float32), EXACT)
        if norms_ptr is not None:
            from_v = features_ptr + sample * features_stride_b
            from_v += n[:, None] * features_stride_n + d[None, :] * features_stride_d
            v = tl.load(from_v, mask=pixel_ok[:, None] & here[None, :], other=0.0).to(tl.float32)
            dv = tl.where((inv_v != 0.0)[:, None], (dv - v * along[:, None]) * inv_v[:, None], 0.0)
        dv = tl.where(pixel_ok[:, None], dv, 0.0)
        to = grad_pixels_ptr + n[:, None] * grad_pixels_stride_n + d[None, :] * grad_pixels_stride_d
        tl.store(to, round_to(dv, grad_pixels_ptr.dtype.element_ty), mask=exists[:, None] & here[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# dMᵀ V, or dMᵀ V̂: a program takes all words, BD features and one run of pixels. Then the runs' sums, in their order, are
# one; for the cosine, of each word what lies along L̂ is taken out.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["words", "each", "runs"])
def words_kernel(
    grad_logits_ptr,  # dM (B, T, N)
    features_ptr,  # V (B, N, D)
    features_stride_b,
    features_stride_n,
    features_stride_d,
    norms_ptr,  # (B, N), for the cosine, or None
    pixel_mask_ptr,
    sums_ptr,  # (B, runs, T, D)
    pixels,
    words,
    width,
    each,
    runs,
    BN: tl.constexpr,
    TP: tl.constexpr,
    BD: tl.constexpr,
):
    """``BD`` columns of dMᵀ V over ``each`` blocks of pixels."""
    sample = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, TP)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    here = d < width
    grad_logits_ptr += sample * words * pixels
    features_ptr += sample * features_stride_b
    EXACT: tl.constexpr = not features_ptr.dtype.element_ty.is_fp32()
    dl = tl.zeros((TP, BD), tl.float32)
    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, tl.cdiv(pixels, BN))):
        n = (block * BN + tl.arange(0, BN)).to(tl.int64)
        pixel_ok = valid_pixels(pixel_mask_ptr, sample, n, pixels)
        at = grad_logits_ptr + j.to(tl.int64)[:, None] * pixels + n[None, :]
        dm = tl.load(at, mask=(j < words)[:, None] & (n < pixels)[None, :], other=0.0)
        if norms_ptr is not None:
            norm = tl.load(norms_ptr + sample * pixels + n, mask=n < pixels, other=1.0)
            dm = dm * (1.0 / tl.maximum(norm, NORM_FLOOR))[None, :]
        at = features_ptr + n[:, None] * features_stride_n + d.to(tl.int64)[None, :] * features_stride_d
        v = tl.load(at, mask=pixel_ok[:, None] & here[None, :], other=0.0)
        dl = product(dm, v, dl, EXACT)
    at = sums_ptr + ((sample * runs + tl.program_id(1)) * words + j[:, None]) * width + d[None, :]
    tl.store(at, dl, mask=(j < words)[:, None] & here[None, :])


@triton.jit
def _sum_of_runs(sums_ptr, sample, word, words, width, runs, d, SOME: tl.constexpr, BD: tl.constexpr):
    """Some features of a word's dMᵀ V."""
    total = tl.zeros((BD,), tl.float32)
    for start in range(0, runs, SOME):
        run = start + tl.arange(0, SOME)
        at = sums_ptr + ((sample * runs + run[:, None]) * words + word) * width + d[None, :]
        total += tl.sum(tl.load(at, mask=(run < runs)[:, None] & (d < width)[None, :], other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["words", "runs"])
def merge_words_kernel(
    sums_ptr,  # (B, runs, T, D)
    words_ptr,  # L (B, T, D), for the cosine, or None
    words_stride_b,
    words_stride_t,
    words_stride_d,
    word_mask_ptr,
    grad_words_ptr,  # (B, T, D) contiguous
    words,
    width,
    runs,
    BD: tl.constexpr,
    SOME: tl.constexpr,
):
    """The gradient of one word."""
    sample = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    ok = valid_words(word_mask_ptr, sample, words, word)
    along = 0.0
    inv = 1.0
    if words_ptr is not None:
        words_ptr += sample * words_stride_b + word.to(tl.int64) * words_stride_t
        square = tl.zeros((BD,), tl.float32)
        inner = tl.zeros((BD,), tl.float32)
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            w = tl.load(words_ptr + d.to(tl.int64) * words_stride_d, mask=d < width, other=0.0).to(tl.float32)
            square += w * w
            inner += w * _sum_of_runs(sums_ptr, sample, word, words, width, runs, d, SOME, BD)
        norm = tl.sqrt(tl.sum(square, axis=0))
        ok = ok & (norm > NORM_FLOOR)
        inv = tl.where(ok, 1.0 / norm, 0.0)
        along = tl.sum(inner, axis=0) * inv * inv
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        dl = _sum_of_runs(sums_ptr, sample, word, words, width, runs, d, SOME, BD)
        if words_ptr is not None:
            w = tl.load(words_ptr + d.to(tl.int64) * words_stride_d, mask=d < width, other=0.0).to(tl.float32)
            dl = (dl - w * along) * inv
        dl = tl.where(ok, dl, 0.0)
        at = grad_words_ptr + (sample * words + word) * width + d
        tl.store(at, round_to(dl, grad_words_ptr.dtype.element_ty), mask=d < width)


def backward(
    student: Network,
    teacher: Network,
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
            num_warps=blocks.warps,
            num_stages=blocks.stages,
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
                num_warps=blocks.warps,
                num_stages=blocks.stages,
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
                num_warps=blocks.warps,
                num_stages=blocks.stages,
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
            )
