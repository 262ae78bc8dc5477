"""``pixel_word`` in plain torch: first- and second-order distances between two networks' pixel–word attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops.numerics import compute_dtype, computes_fp64, full_precision, normalise_rows
from fastkd.ops.products import product
from fastkd.ops.softmax_kl.reference import kl, softmax_kl, tempered

SIMILARITIES = ("scaled_dot", "cosine")
TERMS = ("pixel_to_word", "word_to_pixel", "pixel_pixel", "word_word")


def pixel_word(
    student_pixels: Tensor,
    student_words: Tensor,
    teacher_pixels: Tensor,
    teacher_words: Tensor,
    *,
    student_word_mask: Tensor | None = None,
    teacher_word_mask: Tensor | None = None,
    pixel_mask: Tensor | None = None,
    similarity: str = "scaled_dot",
    temperature: float | Tensor = 1.0,
    terms: Sequence[str] = TERMS,
) -> dict[str, Tensor]:
    """Return the cross-modal terms (B,) of two networks' pixels V (B, N, D) and words L (B, T, D).

    The logits M = V Lᵀ/√D ("scaled_dot") or the cosines of V and L ("cosine") are passed to
    :func:`pixel_word_from_logits`. The values of masked pixels and words, even NaN, affect neither loss nor gradient.
    """
    dtype = compute_dtype(student_pixels, student_words, teacher_pixels, teacher_words)
    with full_precision(student_pixels.device):
        student = pixel_word_logits(
            student_pixels.to(dtype), student_words.to(dtype), pixel_mask, student_word_mask, similarity
        )
        teacher = pixel_word_logits(
            teacher_pixels.to(dtype), teacher_words.to(dtype), pixel_mask, teacher_word_mask, similarity
        )
    return pixel_word_from_logits(
        student,
        teacher,
        student_word_mask=student_word_mask,
        teacher_word_mask=teacher_word_mask,
        pixel_mask=pixel_mask,
        temperature=temperature,
        terms=terms,
    )


def pixel_word_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_word_mask: Tensor | None = None,
    teacher_word_mask: Tensor | None = None,
    pixel_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    terms: Sequence[str] = TERMS,
) -> dict[str, Tensor]:
    """Return the cross-modal terms (B,) of two sets of pixel–word logits M (B, N, T).

    With A = softmax over valid words of M/τ (0 for masked words and in the rows of masked pixels), Q = softmax over
    valid pixels of M/τ, and n, t the numbers of valid pixels and words of a sample:

    - "pixel_to_word": the mean over valid pixels of KL(A_T[i] ‖ A_S[i]), without the factor τ²;
    - "word_to_pixel": the mean over valid words of KL(Q_T[:, j] ‖ Q_S[:, j]), without the factor τ²;
    - "pixel_pixel": ‖A_S A_Sᵀ − A_T A_Tᵀ‖²_F / n², from T×T matrices, without an N×N matrix (except for networks
      with different T on a device without fp64);
    - "word_word": ‖A_Sᵀ A_S − A_Tᵀ A_T‖²_F / n².

    The two networks may differ in T if "pixel_pixel" is the only term. Results are fp32 (fp64 if an input is fp64).
    """
    dtype = compute_dtype(student_logits, teacher_logits)
    batch, pixels, _ = student_logits.shape
    student = _masked(_masked(student_logits.to(dtype), pixel_mask, 1), student_word_mask, 2)
    teacher = _masked(_masked(teacher_logits.to(dtype), pixel_mask, 1), teacher_word_mask, 2)
    if pixel_mask is None:
        n = torch.full((batch,), float(pixels), dtype=dtype, device=student.device)
    else:
        n = pixel_mask.sum(1).to(dtype)

    results: dict[str, Tensor] = {}
    if set(terms) != {"word_to_pixel"}:  # log A of both networks (B, N, T), −inf for masked words
        log_a = torch.log_softmax(tempered(_masked(student, student_word_mask, 2, -torch.inf), temperature), 2)
        log_b = torch.log_softmax(tempered(_masked(teacher, teacher_word_mask, 2, -torch.inf), temperature), 2)
    if "pixel_to_word" in terms:
        results["pixel_to_word"] = _masked(kl(log_a, log_b), pixel_mask, 1).sum(1) / n
    if "word_to_pixel" in terms:
        columns = softmax_kl(
            _masked(student, pixel_mask, 1, -torch.inf), _masked(teacher, pixel_mask, 1, -torch.inf), temperature, 1
        )
        words = columns.shape[1] if student_word_mask is None else student_word_mask.sum(1).to(dtype)
        results["word_to_pixel"] = _masked(columns, student_word_mask, 1).sum(1) / words
    if "pixel_pixel" in terms or "word_word" in terms:
        with full_precision(student.device):
            a, b = _masked(log_a.exp(), pixel_mask, 1), _masked(log_b.exp(), pixel_mask, 1)
            results.update(_second_order(a, b, n, terms))
    return {term: results[term] for term in terms}


def pixel_word_logits(
    pixels: Tensor, words: Tensor, pixel_mask: Tensor | None, word_mask: Tensor | None, similarity: str
) -> Tensor:
    """Return the logits M (B, N, T) of pixels (B, N, D) and words (B, T, D), 0 where either is masked.

    Masked rows are set to 0 first, as NaN in them would reach the other operand's gradient.
    """
    v, w = _masked(pixels, pixel_mask, 1), _masked(words, word_mask, 1)
    if similarity == "cosine":
        return product(normalise_rows(v), normalise_rows(w).mT)
    return product(v, w.mT) / v.shape[-1] ** 0.5


def _second_order(a: Tensor, b: Tensor, n: Tensor, terms: Sequence[str]) -> dict[str, Tensor]:
    """Return the second-order terms of attention a, b (B, N, T) with n valid pixels, from T×T matrices.

    With d = a − b: aaᵀ − bbᵀ = d aᵀ + b dᵀ and aᵀa − bᵀb = dᵀa + bᵀd. Every product has the factor d, so nothing
    cancels as the student approaches the teacher. If the widths T differ, d is undefined; ‖aᵀa‖² + ‖bᵀb‖² − 2‖aᵀb‖² is
    then computed in fp64, or on a device without fp64 ‖aaᵀ − bbᵀ‖² from N×N matrices.
    """
    dtype, results = a.dtype, {}
    if a.shape[2] != b.shape[2] and not computes_fp64(a.device):
        return {"pixel_pixel": _norm2(product(a, a.mT) - product(b, b.mT)) / n.square()}
    if a.shape[2] != b.shape[2]:
        a, b = a.double(), b.double()
        square = _norm2(a.mT @ a) + _norm2(b.mT @ b) - 2 * _norm2(a.mT @ b)
        return {"pixel_pixel": (square / n.double().square()).to(dtype)}
    d = a - b
    d_a, b_d = product(d.mT, a), product(b.mT, d)  # (B, T, T)
    if "pixel_pixel" in terms:
        d_d = product(d.mT, d)
        square = ((product(a.mT, a) + product(b.mT, b)) * d_d).sum((1, 2)) + 2 * (d_a * b_d).sum((1, 2))
        results["pixel_pixel"] = square / n.square()
    if "word_word" in terms:
        results["word_word"] = _norm2(d_a + b_d) / n.square()
    return results


def _masked(x: Tensor, mask: Tensor | None, dim: int, value: float = 0.0) -> Tensor:
    """Return ``x`` with ``value`` where ``mask``, of shape (B, size of ``dim``), is False."""
    if mask is None:
        return x
    shape = [mask.shape[0]] + [1] * (x.dim() - 1)
    shape[dim] = mask.shape[1]
    return torch.where(mask.reshape(shape), x, torch.full((), value, dtype=x.dtype, device=x.device))


def _norm2(matrix: Tensor) -> Tensor:
    """Return the squared Frobenius norm of each matrix."""
    return matrix.square().sum((1, 2))
