"""Inputs, options and sizes of a ``pixel_word`` call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.launch import converted, promoted, statistics_dtype
from fastkd.ops.pixel_word.reference import TERMS

TERM_BITS = {term: 1 << i for i, term in enumerate(TERMS)}
PIXEL_TO_WORD, WORD_TO_PIXEL, PIXEL_PIXEL, WORD_WORD = TERM_BITS.values()
SECOND_ORDER = PIXEL_PIXEL | WORD_WORD

MAX_WORDS = {"triton": 128, "cuda": 128}
"""Maximum number of words by backend; these keep all words of a pixel in registers, and check the same limit."""

Shape = Sequence[int]


class Inputs(NamedTuple):
    """The tensors of the forward operator, in the order of its schema. Without words, the pixels are the logits."""

    student_pixels: Tensor  # (B, N, D_S)
    student_words: Tensor | None  # (B, T_S, D_S)
    teacher_pixels: Tensor  # (B, N, D_T)
    teacher_words: Tensor | None  # (B, T_T, D_T)
    student_word_mask: Tensor | None  # (B, T_S)
    teacher_word_mask: Tensor | None  # (B, T_T)
    pixel_mask: Tensor | None  # (B, N)

    @property
    def features(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return pixels and words of student and teacher."""
        return self[:4]

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the masks of the student's words, the teacher's words, and the pixels."""
        return self[4:]

    @property
    def word_counts(self) -> tuple[int, int]:
        """Return the numbers of words T_S and T_T."""
        if self.student_words is None or self.teacher_words is None:
            return self.student_pixels.shape[2], self.teacher_pixels.shape[2]
        return self.student_words.shape[1], self.teacher_words.shape[1]


class Saved(NamedTuple):
    """The tensors of the backward operator after ``grad_loss``, in the order of its schema."""

    student_pixels: Tensor  # (B, N, D_S)
    student_words: Tensor | None  # (B, T_S, D_S)
    teacher_logits: Tensor | None  # (B, N, T_T) if logits were given, else they are in ``logits``
    student_word_mask: Tensor | None  # (B, T_S)
    teacher_word_mask: Tensor | None  # (B, T_T)
    pixel_mask: Tensor | None  # (B, N)
    logits: Tensor  # (B, T_S + T_T, N); this and the next three are empty if not needed
    norms: Tensor  # (B, N)
    columns: Tensor  # (B, parts, T_S)
    grams: Tensor  # (B, 3, T, T)

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the tensors that the forward computed for the backward."""
        return self[6:]


class Options(NamedTuple):
    """The operators' options, in the order of their schemas."""

    cosine: bool
    temperature: float | Tensor
    terms: int  # bits: PIXEL_TO_WORD, ...


def allocate(inputs: Inputs, options: Options, keep: bool, backend: str) -> tuple[Tensor, ...]:
    """Return the unfilled loss and statistics of a forward; without ``keep`` the statistics are empty.

    ``csrc/common/pixel_word.h`` defines them.
    """
    dtype, device = statistics_dtype(*inputs[:4]), inputs.student_pixels.device
    batch, pixels = inputs.student_pixels.shape[:2]
    words = inputs.word_counts
    side = max(words) if words[0] != words[1] else words[0]
    # log Σ e^u of each column, S and T: one fp64 number on the CPU, a maximum and a sum on a GPU.
    parts, columns_dtype = (2, torch.float64) if backend == "cpu" else (4, dtype)
    logits = (batch, words[0] + words[1], pixels) if keep and inputs.student_words is not None else (0,)
    norms = (batch, pixels) if keep and options.cosine else (0,)
    columns = (batch, parts, words[0]) if keep and options.terms & WORD_TO_PIXEL else (0,)
    grams = (batch, 3, side, side) if keep and options.terms & SECOND_ORDER else (0,)
    loss = torch.empty((batch, len(TERMS)), dtype=dtype, device=device)
    return (
        loss,
        loss.new_empty(*logits),  # in half the time of torch.empty
        loss.new_empty(*norms),
        torch.empty(columns, dtype=columns_dtype, device=device),
        loss.new_empty(*grams),
    )


def convert(pixels: Tensor, words: Tensor | None, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor | None]:
    """Return pixels and words in dtypes and a layout that ``backend`` supports, for arithmetic in ``dtype``."""
    if dtype == torch.float64:
        pixels = pixels.to(dtype)
    if words is not None and backend == "cuda":  # one dtype for both
        pixels, words = promoted(pixels, words)
    elif words is not None and backend == "cpu":
        words = converted(words, dtype)
    return rows_or_maps(pixels), words


def rows_or_maps(x: Tensor) -> Tensor:
    """Return ``x`` (B, N, D) if its stride is 1 along D (rows of features) or N (maps), else a contiguous copy."""
    if x.stride(2) == 1 or (x.stride(1) == 1 and x.shape[1] > 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # .contiguous() keeps the strides of sizes of 1


def gradient_like(x: Tensor | None, like: Tensor) -> Tensor:
    """Return an unfilled dense gradient in the layout of ``x``, rows or maps; an empty tensor if ``x`` is None."""
    if x is None:
        return torch.empty(0, dtype=like.dtype, device=like.device)
    grad = torch.empty_like(x)
    if x.stride(2) == 1:
        return grad if grad.stride(2) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad.stride(1) == 1 != grad.stride(2):
        return grad
    return torch.empty((x.shape[0], x.shape[2], x.shape[1]), dtype=x.dtype, device=x.device).mT


def scale_of(width: int, options: Options) -> float:
    """Return the factor that multiplies dot products, cosines, or given logits (``width`` 0)."""
    temperature = options.temperature
    assert not isinstance(temperature, Tensor)
    return 1 / (temperature * (1 if options.cosine or width == 0 else width**0.5))


# --- FLOP (fastkd/ops/flops.py) ---------------------------------------------------------------------------------------


def forward_flops(*arguments: Any) -> int:
    """Return the FLOP of the logits V Lᵀ, unless they are given, and of the second-order AᵀA, DᵀA and DᵀD."""
    student_pixels, student_words, teacher_pixels, teacher_words = arguments[:4]  # shapes of Inputs
    terms = Options(*arguments[7:10]).terms
    pixels = student_pixels[0] * student_pixels[1]
    total = 0
    if student_words is None or teacher_words is None:
        words = max(student_pixels[2], teacher_pixels[2])
    else:
        words = max(student_words[1], teacher_words[1])
        total += 2 * pixels * (student_words[1] * student_pixels[2] + teacher_words[1] * teacher_pixels[2])
    return total + (3 * 2 * pixels * words**2 if terms & SECOND_ORDER else 0)


def backward_flops(grad_loss: Shape, *arguments: Any) -> int:
    """Return the FLOP of A X, of D Z (for "pixel_pixel"), and of the gradients dM L and dMᵀ V that are needed."""
    student_pixels, student_words, grams = arguments[0], arguments[1], arguments[9]  # shapes of Saved
    terms = Options(*arguments[11:14]).terms
    for_pixels, for_words = arguments[14:16]
    pixels, total = student_pixels[0] * student_pixels[1], 0
    if terms & SECOND_ORDER:
        total += (2 if terms & PIXEL_PIXEL else 1) * 2 * pixels * grams[-1] ** 2
    if student_words is not None:
        total += (for_pixels + for_words) * 2 * pixels * student_words[1] * student_pixels[2]
    return total
