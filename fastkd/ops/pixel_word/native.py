"""``pixel_word`` as the native kernels are given it: raw pointers and element strides, so that one build serves every
torch. The kernels read rows of features, maps and 16 bits where they lie; all else is copied here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops import workspace
from fastkd.ops.launch import dtype_name, launch_on, native

Features = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""Student's pixels and words, teacher's pixels and words; without words, the pixels are the logits."""
Masks = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Student's and teacher's words, pixels."""
Options = tuple[bool, float, int]
"""Whether cosine, the temperature, the terms or-ed."""


MOST_WORDS = {"triton": 128, "cuda": 128}
"""These backends hold all words of a pixel in registers."""


def fit(pixels: Tensor, words: Tensor | None, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor | None]:
    """Pixels and words in dtypes that ``backend`` takes, where the arithmetic is in ``dtype``; the pixels laid out."""
    if dtype == torch.float64:
        pixels = pixels.to(dtype)
    if words is not None and backend == "cuda":  # one dtype for both
        common = torch.promote_types(pixels.dtype, words.dtype)
        pixels, words = pixels.to(common), words.to(common)
    elif words is not None and backend == "cpu":
        words = words.to(dtype)
    return layout(pixels), words


def layout(x: Tensor) -> Tensor:
    """(B, N, D) as rows of features or as maps; a copy of anything else."""
    return x if x.stride(2) == 1 or x.stride(1) == 1 else x.contiguous()


def gradient_like(x: Tensor | None, device_of: Tensor) -> Tensor:
    """Where a gradient goes: the layout of ``x``, dense; empty without ``x``."""
    if x is None:
        return torch.empty(0, dtype=device_of.dtype, device=device_of.device)
    like = torch.empty_like(x)
    if like.stride(2) == x.stride(2) == 1 or like.stride(1) == x.stride(1) == 1:
        return like
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class Side(NamedTuple):
    """Student or teacher, fit for the kernels."""

    pixels: Tensor | None  # features, logits if there are no words, or None where a backward needs neither
    words: Tensor | None
    word_mask: Tensor | None
    word_count: int
    width: int
    scale: float  # of the logits
    bf16_words: bool  # each element of the words is a bfloat16, widened

    @classmethod
    def of(
        cls,
        pixels: Tensor,
        words: Tensor | None,
        mask: Tensor | None,
        temperature: float,
        cosine: bool,
        dtype: torch.dtype,
        backend: str,
    ) -> Side:
        """From what the operator was given."""
        bf16 = words is not None and words.dtype == torch.bfloat16
        pixels, words = fit(pixels, words, dtype, backend)
        if words is None:
            return cls(pixels, None, _contiguous(mask), pixels.shape[2], 0, scale_of(0, temperature, cosine), False)
        width = pixels.shape[2]
        scale = scale_of(width, temperature, cosine)
        return cls(pixels, words.contiguous(), _contiguous(mask), words.shape[1], width, scale, bf16)

    @classmethod
    def of_kept_logits(cls, mask: Tensor | None, word_count: int, width: int, temperature: float, cosine: bool) -> Side:
        """The teacher of a backward."""
        return cls(None, None, _contiguous(mask), word_count, width, scale_of(width, temperature, cosine), False)


def scale_of(width: int, temperature: float, cosine: bool) -> float:
    """What multiplies dot products, cosines or (with a width of 0) logits."""
    return 1 / (temperature * (1 if cosine or width == 0 else width**0.5))


def forward(
    features: Features, masks: Masks, options: Options, kept: Sequence[Tensor], loss: Tensor, backend: str
) -> None:
    """Fill ``loss``, and of ``kept`` what is not empty."""
    cosine, temperature, terms = options
    student_pixels, student_words, teacher_pixels, teacher_words = features
    student = Side.of(student_pixels, student_words, masks[0], temperature, cosine, loss.dtype, backend)
    teacher = Side.of(teacher_pixels, teacher_words, masks[1], temperature, cosine, loss.dtype, backend)
    if backend == "cuda" and student.words is not None and kept[0].numel() == 0:  # it goes through them in memory
        rows = student.word_count + teacher.word_count
        kept = (loss.new_empty((student_pixels.shape[0], rows, student_pixels.shape[1])), *kept[1:])
    Call(student, teacher, masks[2], cosine, terms, loss.dtype, backend).forward(kept, loss)


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
    dtype = grad_loss.dtype
    student = Side.of(student_pixels, student_words, masks[0], temperature, cosine, dtype, backend)
    if teacher_logits is not None:
        teacher = Side.of(teacher_logits, None, masks[1], temperature, cosine, dtype, backend)
    else:
        words = kept[0].shape[1] - student.word_count
        teacher = Side.of_kept_logits(masks[1], words, teacher_width, temperature, cosine)
    call = Call(student, teacher, masks[2], cosine, terms, dtype, backend)
    call.backward(kept, grad_loss, grad_pixels, grad_words)


class Call:
    """One call of the kernels of ``backend``, whose arithmetic is in ``dtype``."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        pixel_mask: Tensor | None,
        cosine: bool,
        terms: int,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        assert student.pixels is not None
        self._like = student.pixels
        self._dtype = dtype
        self._alive = (student, teacher, pixel_mask := _contiguous(pixel_mask))
        problem = (
            self._network(student),
            self._network(teacher),
            _address(pixel_mask),
            *student.pixels.shape[:2],
            _name(dtype),
            cosine,
            terms,
        )
        self._problem = problem
        self._backend = backend

    def forward(self, kept: Sequence[Tensor], loss: Tensor) -> None:
        """Fills ``loss``, and of ``kept`` what is not empty."""
        with self._call(False) as (call, scratch):
            call.forward([_address(x) for x in kept], loss.data_ptr(), scratch.data_ptr())

    def backward(self, kept: Sequence[Tensor], grad_loss: Tensor, grad_pixels: Tensor, grad_words: Tensor) -> None:
        """Fills ``grad_pixels`` and ``grad_words``, unless they are empty."""
        with self._call(True) as (call, scratch):
            call.backward(
                [_address(x) for x in kept],
                grad_loss.data_ptr(),
                grad_loss.stride(),
                self._array(grad_pixels if grad_pixels.numel() else None),
                _address(grad_words),
                scratch.data_ptr(),
            )

    @contextmanager
    def _call(self, backward: bool) -> Iterator[tuple[Any, Tensor]]:
        """The native call and its workspace, with the device current."""
        with launch_on(self._like) as extra:
            call = native(self._backend).PixelWord(self._problem, extra, workspace.limit())
            yield call, workspace.allocate(call, backward, self._like)

    def _network(self, network: Side) -> tuple[Any, ...]:
        pixels, words, word_mask, *sizes = network
        return (self._array(pixels), _address(words), _address(word_mask), *sizes)

    def _array(self, x: Tensor | None) -> tuple[int, str, tuple[int, ...]]:
        return (0, _name(self._dtype), (0, 0, 0)) if x is None else (x.data_ptr(), dtype_name(x), x.stride())


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
