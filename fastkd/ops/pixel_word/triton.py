"""Call the Triton kernels of ``pixel_word``, which read features and words in place; statistics are fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.launch import triton_module
from fastkd.ops.pixel_word.plan import Inputs, Options, Saved, rows_or_maps, scale_of


def forward(inputs: Inputs, options: Options, statistics: Sequence[Tensor], loss: Tensor, backend: str) -> None:
    """Fill ``loss`` and the statistics that are not empty."""
    student = _side(inputs.student_pixels, inputs.student_words, inputs.student_word_mask, options)
    teacher = _side(inputs.teacher_pixels, inputs.teacher_words, inputs.teacher_word_mask, options)
    pixel_mask, valid = _pixel_mask(inputs.pixel_mask)
    triton_module("pixel_word", "forward").forward(
        student, teacher, pixel_mask, valid, options.cosine, options.terms, statistics, loss
    )


def backward(
    saved: Saved,
    teacher_width: int,
    options: Options,
    grad_loss: Tensor,
    grad_pixels: Tensor,
    grad_words: Tensor,
    backend: str,
) -> None:
    """Fill ``grad_pixels`` and ``grad_words``, unless they are empty."""
    student = _side(saved.student_pixels, saved.student_words, saved.student_word_mask, options)
    if saved.teacher_logits is not None:
        teacher = _side(saved.teacher_logits, None, saved.teacher_word_mask, options)
    else:
        words = saved.logits.shape[1] - student.word_count
        word_mask = None if saved.teacher_word_mask is None else _bytes(saved.teacher_word_mask)
        teacher = triton_module("pixel_word", "tiles").Side(
            None, None, word_mask, words, scale_of(teacher_width, options)
        )
    pixel_mask, valid = _pixel_mask(saved.pixel_mask)
    triton_module("pixel_word", "backward").backward(
        student, teacher, pixel_mask, valid, options.terms, saved.statistics, grad_loss, grad_pixels, grad_words
    )


def _side(pixels: Tensor, words: Tensor | None, mask: Tensor | None, options: Options) -> Any:
    count, width = (pixels.shape[2], 0) if words is None else (words.shape[1], pixels.shape[2])
    word_mask = None if mask is None else _bytes(mask)
    return triton_module("pixel_word", "tiles").Side(
        rows_or_maps(pixels), words, word_mask, count, scale_of(width, options)
    )


def _pixel_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask as bytes, and the number of valid pixels of each sample."""
    if mask is None:
        return None, None
    return _bytes(mask), mask.sum(1, dtype=torch.float32)


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)
