"""``pixel_word`` as the Triton kernels are given it: features and words where they lie, statistics in fp32."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.pixel_word.native import Features, Masks, Options, layout, scale_of


def forward(
    features: Features, masks: Masks, options: Options, kept: Sequence[Tensor], loss: Tensor, backend: str
) -> None:
    """Fill ``loss``, and of ``kept`` what is not empty."""
    cosine, temperature, terms = options
    student = _network(*features[:2], masks[0], temperature, cosine)
    teacher = _network(*features[2:], masks[1], temperature, cosine)
    pixel_mask, valid = _pixel_mask(masks[2])
    _kernels("forward").forward(student, teacher, pixel_mask, valid, cosine, terms, kept, loss)


def backward(
    student_pixels: Tensor,
    student_words: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_width: int,
    masks: Masks,
    options: Options,
    kept: Sequence[Tensor],
    grad_loss: Tensor,
    grad_pixels: Tensor,
    grad_words: Tensor,
    backend: str,
) -> None:
    """Fill ``grad_pixels`` and ``grad_words``, unless they are empty."""
    cosine, temperature, terms = options
    student = _network(student_pixels, student_words, masks[0], temperature, cosine)
    if teacher_logits is not None:
        teacher = _network(teacher_logits, None, masks[1], temperature, cosine)
    else:
        words, scale = kept[0].shape[1] - student.word_count, scale_of(teacher_width, temperature, cosine)
        teacher = _kernels("tiles").Side(None, None, _bytes(masks[1]), words, scale)
    pixel_mask, valid = _pixel_mask(masks[2])
    _kernels("backward").backward(student, teacher, pixel_mask, valid, terms, kept, grad_loss, grad_pixels, grad_words)


def _kernels(name: str) -> Any:
    return importlib.import_module(f"fastkd.kernels.pixel_word.{name}")


def _network(pixels: Tensor, words: Tensor | None, mask: Tensor | None, temperature: float, cosine: bool) -> Any:
    count, width = (pixels.shape[2], 0) if words is None else (words.shape[1], pixels.shape[2])
    scale = scale_of(width, temperature, cosine)
    return _kernels("tiles").Side(layout(pixels), words, _bytes(mask), count, scale)


def _pixel_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask, and how many pixels of each sample are valid."""
    return _bytes(mask), None if mask is None else mask.sum(1, dtype=torch.float32)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
