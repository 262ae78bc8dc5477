"""The operators of ``pixel_word``: definition, kernels and fakes. Without words, the "pixels" are the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._compile import number_of
from fastkd.ops import flops
from fastkd.ops.launch import statistics_dtype
from fastkd.ops.pixel_word import native, triton
from fastkd.ops.pixel_word.native import fit, gradient_like, layout
from fastkd.ops.pixel_word.reference import TERMS
from fastkd.ops.registration import Work, register

PIXEL_TO_WORD, WORD_TO_PIXEL, PIXEL_PIXEL, WORD_WORD = (1 << i for i in range(len(TERMS)))
SECOND_ORDER = PIXEL_PIXEL | WORD_WORD


def _kernels(backend: str) -> Any:
    """Return what computes: a module with ``forward`` and ``backward``, filling the outputs that they are given."""
    return triton if backend == "triton" else native


def forward(
    student_pixels: Tensor,
    student_words: Tensor | None,
    teacher_pixels: Tensor,
    teacher_words: Tensor | None,
    student_word_mask: Tensor | None,
    teacher_word_mask: Tensor | None,
    pixel_mask: Tensor | None,
    cosine: bool,
    temperature: float | Tensor,
    terms: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Compute the terms' losses, and what the backward needs."""
    features = (student_pixels, student_words, teacher_pixels, teacher_words)
    masks = (student_word_mask, teacher_word_mask, pixel_mask)
    options = (cosine, number_of(temperature), terms)
    loss, *kept = forward_fake(*features, *masks, *options, keep, backend)
    if loss.numel():
        _kernels(backend).forward(features, masks, options, kept, loss, backend)
    return loss, *kept


def forward_fake(
    student_pixels: Tensor,
    student_words: Tensor | None,
    teacher_pixels: Tensor,
    teacher_words: Tensor | None,
    student_word_mask: Tensor | None,
    teacher_word_mask: Tensor | None,
    pixel_mask: Tensor | None,
    cosine: bool,
    temperature: float | Tensor,
    terms: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Return the outputs of :func:`forward`, unfilled."""
    features = [x for x in (student_pixels, student_words, teacher_pixels, teacher_words) if x is not None]
    dtype, device = statistics_dtype(*features), student_pixels.device
    batch, pixels = student_pixels.shape[:2]
    if student_words is None or teacher_words is None:
        words = (student_pixels.shape[2], teacher_pixels.shape[2])
    else:
        words = (student_words.shape[1], teacher_words.shape[1])
    most = max(words) if words[0] != words[1] else words[0]
    # What each is for: csrc/common/pixel_word.h. Of a column's log Σ e^u two parts are kept on a GPU.
    parts, columns_dtype = (2, torch.float64) if backend == "cpu" else (4, dtype)
    shapes = {
        "logits": (batch, words[0] + words[1], pixels) if student_words is not None else None,
        "norms": (batch, pixels) if cosine else None,
        "columns": (batch, parts, words[0]) if terms & WORD_TO_PIXEL else None,
        "grams": (batch, 3, most, most) if terms & SECOND_ORDER else None,
    }
    kept = (
        torch.empty(
            shape if keep and shape is not None else (0,),
            dtype=columns_dtype if name == "columns" else dtype,
            device=device,
        )
        for name, shape in shapes.items()
    )
    return torch.empty((batch, len(TERMS)), dtype=dtype, device=device), *kept


def backward(
    grad_loss: Tensor,
    student_pixels: Tensor,
    student_words: Tensor | None,
    teacher_logits: Tensor | None,
    student_word_mask: Tensor | None,
    teacher_word_mask: Tensor | None,
    pixel_mask: Tensor | None,
    logits: Tensor,
    norms: Tensor,
    columns: Tensor,
    grams: Tensor,
    teacher_width: int,
    cosine: bool,
    temperature: float | Tensor,
    terms: int,
    for_pixels: bool,
    for_words: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the student's pixels and words, each empty unless requested."""
    # The arithmetic is that of the forward, which may be fp64 for the teacher's sake alone.
    dtype = grad_loss.dtype
    pixels, words = fit(student_pixels, student_words, dtype, backend)
    grad_pixels = gradient_like(pixels if for_pixels else None, student_pixels)
    shape, like = (words.shape, words) if for_words and words is not None else ((0,), pixels)
    grad_words = torch.empty(shape, dtype=like.dtype, device=like.device)
    if grad_pixels.numel() or grad_words.numel():
        masks = (student_word_mask, teacher_word_mask, pixel_mask)
        options = (cosine, number_of(temperature), terms)
        kept = (logits, norms, columns, grams)
        _kernels(backend).backward(
            pixels, words, teacher_logits, teacher_width, masks, options, kept, grad_loss, grad_pixels, grad_words,
            backend,
        )  # fmt: skip
    words_dtype = dtype if student_words is None else student_words.dtype
    return grad_pixels.to(student_pixels.dtype), grad_words.to(words_dtype)


def backward_fake(
    grad_loss: Tensor, student_pixels: Tensor, student_words: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    """Return the outputs of :func:`backward`, unfilled."""
    for_pixels, for_words, _ = others[-3:]
    pixels = layout(student_pixels) if for_pixels else None
    grad_pixels = gradient_like(pixels, student_pixels)
    words_dtype = grad_loss.dtype if student_words is None else student_words.dtype
    words = student_words.shape if for_words and student_words is not None else (0,)
    return grad_pixels, torch.empty(words, dtype=words_dtype, device=student_pixels.device)


_MASKS = "Tensor? student_word_mask, Tensor? teacher_word_mask, Tensor? pixel_mask"
_OPTIONS = "bool cosine, float temperature, int terms"
_KEPT = "Tensor logits, Tensor norms, Tensor columns, Tensor grams"
register(
    "pixel_word_forward",
    f"(Tensor student_pixels, Tensor? student_words, Tensor teacher_pixels, Tensor? teacher_words, {_MASKS}, "
    f"{_OPTIONS}, bool keep, str backend) -> (Tensor loss, {_KEPT})",
    Work(forward, forward_fake, flops.pixel_word_forward),
)
register(
    "pixel_word_backward",
    f"(Tensor grad_loss, Tensor student_pixels, Tensor? student_words, Tensor? teacher_logits, {_MASKS}, {_KEPT}, "
    f"SymInt teacher_width, {_OPTIONS}, bool for_pixels, bool for_words, str backend) "
    "-> (Tensor grad_pixels, Tensor grad_words)",
    Work(backward, backward_fake, flops.pixel_word_backward),
)
