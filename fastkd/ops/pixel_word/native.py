"""Call the C++ or CUDA C++ kernels of ``pixel_word`` with addresses and strides: one build serves every torch.

The kernels read features with stride 1 along D or N, also 16-bit ones, in place; other inputs are copied here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.launch import allocate_workspace, dtype_name, launch_on, native, workspace_limit
from fastkd.ops.pixel_word.plan import Inputs, Options, Saved, convert, scale_of


def forward(inputs: Inputs, options: Options, statistics: Sequence[Tensor], loss: Tensor, backend: str) -> None:
    """Fill ``loss`` and the statistics that are not empty."""
    v_s, w_s, v_t, w_t = inputs.features
    student = _side(v_s, w_s, inputs.student_word_mask, options, loss.dtype, backend)
    teacher = _side(v_t, w_t, inputs.teacher_word_mask, options, loss.dtype, backend)
    if backend == "cuda" and w_s is not None and statistics[0].numel() == 0:
        # The CUDA kernels pass the logits from one kernel to the next in memory.
        rows = student.word_count + teacher.word_count
        statistics = (loss.new_empty((v_s.shape[0], rows, v_s.shape[1])), *statistics[1:])
    pixel_mask = _contiguous(inputs.pixel_mask)  # kept alive until the end, as both sides are
    problem = _problem(student, teacher, pixel_mask, v_s.shape, options, loss.dtype)
    limit = workspace_limit(v_s.device)
    with launch_on(v_s) as extra:
        call = native(backend).PixelWord(problem, extra, limit)
        workspace = allocate_workspace(call, False, v_s, limit)
        call.forward([_address(x) for x in statistics], loss.data_ptr(), workspace.data_ptr())


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
    dtype = grad_loss.dtype
    student = _side(saved.student_pixels, saved.student_words, saved.student_word_mask, options, dtype, backend)
    if saved.teacher_logits is not None:
        teacher = _side(saved.teacher_logits, None, saved.teacher_word_mask, options, dtype, backend)
    else:
        mask, words = _contiguous(saved.teacher_word_mask), saved.logits.shape[1] - student.word_count
        scale = scale_of(teacher_width, options)
        teacher = Side(None, None, mask, words, teacher_width, scale, False)
    pixels, pixel_mask = saved.student_pixels, _contiguous(saved.pixel_mask)
    problem = _problem(student, teacher, pixel_mask, pixels.shape, options, dtype)
    limit = workspace_limit(pixels.device)
    with launch_on(pixels) as extra:
        call = native(backend).PixelWord(problem, extra, limit)
        workspace = allocate_workspace(call, True, pixels, limit)
        call.backward(
            [_address(x) for x in saved.statistics],
            grad_loss.data_ptr(),
            grad_loss.stride(),
            _array(grad_pixels if grad_pixels.numel() else None, dtype),
            _address(grad_words),
            workspace.data_ptr(),
        )


class Side(NamedTuple):
    """The student's or the teacher's operands, as the kernels take them."""

    pixels: Tensor | None  # (B, N, D), or the logits (B, N, T) without words, or None where a backward needs neither
    words: Tensor | None  # (B, T, D)
    word_mask: Tensor | None  # (B, T)
    word_count: int
    width: int
    scale: float  # of the logits
    bf16_words: bool  # every element of the words is exact in bfloat16


def _side(
    pixels: Tensor,
    words: Tensor | None,
    mask: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    backend: str,
) -> Side:
    """Return one network's operands for kernels whose arithmetic is in ``dtype``."""
    bf16_words = words is not None and words.dtype == torch.bfloat16
    pixels, words = convert(pixels, words, dtype, backend)
    if words is None:
        return Side(pixels, None, _contiguous(mask), pixels.shape[2], 0, scale_of(0, options), False)
    width = pixels.shape[2]
    scale = scale_of(width, options)
    return Side(pixels, words.contiguous(), _contiguous(mask), words.shape[1], width, scale, bf16_words)


def _problem(
    student: Side,
    teacher: Side,
    pixel_mask: Tensor | None,
    shape: Sequence[int],
    options: Options,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """Return the problem as the native modules take it. The caller keeps the tensors behind its addresses alive."""
    sizes, name = tuple(shape[:2]), dtype_name(dtype)
    sides = (_network(student, dtype), _network(teacher, dtype))
    return (*sides, _address(pixel_mask), *sizes, name, options.cosine, options.terms)


def _network(side: Side, dtype: torch.dtype) -> tuple[Any, ...]:
    pixels, words, word_mask, *sizes = side
    return (_array(pixels, dtype), _address(words), _address(word_mask), *sizes)


def _array(x: Tensor | None, dtype: torch.dtype) -> tuple[int, str, tuple[int, ...]]:
    """Return address, dtype and strides; for None return 0, ``dtype`` and zeros."""
    return (0, dtype_name(dtype), (0, 0, 0)) if x is None else (x.data_ptr(), dtype_name(x.dtype), x.stride())


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()
