"""The ``pixel_word`` family: the cross-modal terms of two networks' pixel–word attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd.ops import _backends
from fastkd.reference.pixel_word import TERMS
from fastkd.reference.pixel_word import pixel_word as reference
from fastkd.reference.pixel_word import pixel_word_from_logits as reference_from_logits


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
    temperature: float = 1.0,
    terms: Sequence[str] = TERMS,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Per-sample terms (B,) from pixels (B, N, D) and words (B, T, D).

    The arguments are those of :func:`fastkd.reference.pixel_word.pixel_word`.
    """
    _backends.choose("pixel_word", backend, student_pixels, student_words, teacher_pixels, teacher_words)
    return reference(
        student_pixels,
        student_words,
        teacher_pixels,
        teacher_words,
        student_word_mask=student_word_mask,
        teacher_word_mask=teacher_word_mask,
        pixel_mask=pixel_mask,
        similarity=similarity,
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
    temperature: float = 1.0,
    terms: Sequence[str] = TERMS,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Per-sample terms (B,) from pixel–word logits (B, N, T).

    The arguments are those of :func:`fastkd.reference.pixel_word.pixel_word_from_logits`.
    """
    _backends.choose("pixel_word", backend, student_logits, teacher_logits)
    return reference_from_logits(
        student_logits,
        teacher_logits,
        student_word_mask=student_word_mask,
        teacher_word_mask=teacher_word_mask,
        pixel_mask=pixel_mask,
        temperature=temperature,
        terms=terms,
    )
