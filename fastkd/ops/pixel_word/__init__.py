r"""``pixel_word``: the cross-modal terms of two networks' pixel–word attention.

From pixels V (B, N, D) and words L (B, T, D) of student and teacher, or from the logits M (B, N, T) themselves: two
first-order KL divergences and two second-order distances, as :mod:`fastkd.ops.pixel_word.reference` defines them.
Features and logits share one operator: without words, the "pixels" are the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._compile import operator_argument
from fastkd.errors import BackendUnavailable
from fastkd.ops.dispatch import choose
from fastkd.ops.launch import distinct
from fastkd.ops.pixel_word.checks import check
from fastkd.ops.pixel_word.native import MOST_WORDS, Masks
from fastkd.ops.pixel_word.operators import backward as _backward
from fastkd.ops.pixel_word.operators import forward as _forward
from fastkd.ops.pixel_word.reference import SIMILARITIES, TERMS
from fastkd.ops.pixel_word.reference import pixel_word as reference
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as reference_from_logits
from fastkd.ops.registration import operator, saved
from fastkd.ops.torch_state import refuse_tangent, savable

_SAVED = 10  # tensors of a forward, without the temperature's


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
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Per-sample terms (B,) from pixels (B, N, D) and words (B, T, D), without the factor τ² of the first order.

    Args:
        student_pixels: (B, N, D_S), floating, any strides. Gradients flow to it and to the student's words alone.
        student_words: (B, T, D_S).
        teacher_pixels: (B, N, D_T).
        teacher_words: (B, T, D_T); another number of words if "pixel_pixel" is the only term.
        student_word_mask: None or bool (B, T), True = valid.
        teacher_word_mask: the same mask, unless "pixel_pixel" is the only term.
        pixel_mask: None or bool (B, N).
        similarity: "scaled_dot" or "cosine".
        temperature: τ > 0.
        terms: some of "pixel_to_word", "word_to_pixel", "pixel_pixel", "word_word".
        backend: "auto", "reference", "cpu" or "triton" (at most 128 words). Kernels are differentiable once.

    Returns:
        The terms asked for, in fp32 (fp64 if an input is fp64). NaN and Inf of valid pixels and words propagate.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that don't fit, τ ≤ 0, a teacher requiring grad.
        fastkd.BackendUnavailable: the backend asked for by name cannot compute this here.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: expected one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    features = (student_pixels, student_words, teacher_pixels, teacher_words)
    masks = (student_word_mask, teacher_word_mask, pixel_mask)
    names = ("student_pixels", "student_words", "teacher_pixels", "teacher_words")
    check(dict(zip(names, features, strict=True)), (student_words.shape[1], teacher_words.shape[1]), temperature, terms)
    for side, v, w in (("student", student_pixels, student_words), ("teacher", teacher_pixels, teacher_words)):
        if v.shape[0] != w.shape[0] or v.shape[2] != w.shape[2]:
            raise ValueError(
                f"{side}_pixels and {side}_words: expected (B, N, D) and (B, T, D), got {tuple(v.shape)} and "
                f"{tuple(w.shape)}"
            )
    chosen = _choose(backend, max(student_words.shape[1], teacher_words.shape[1]), masks, *features)
    (v_s, w_s, v_t, w_t), masks = savable(*features), _savable_masks(masks)
    features = (v_s, w_s, v_t, w_t)
    if chosen == "reference":
        return reference(
            *features,
            student_word_mask=masks[0],
            teacher_word_mask=masks[1],
            pixel_mask=masks[2],
            similarity=similarity,
            temperature=temperature,
            terms=terms,
        )
    return _terms(features, masks, similarity == "cosine", temperature, terms, chosen)


def pixel_word_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_word_mask: Tensor | None = None,
    teacher_word_mask: Tensor | None = None,
    pixel_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    terms: Sequence[str] = TERMS,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Per-sample terms (B,) from pixel–word logits (B, N, T); all else as in :func:`pixel_word`."""
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check(logits, (student_logits.shape[2], teacher_logits.shape[2]), temperature, terms)
    words = max(student_logits.shape[2], teacher_logits.shape[2])
    masks = (student_word_mask, teacher_word_mask, pixel_mask)
    chosen = _choose(backend, words, masks, student_logits, teacher_logits)
    (student_logits, teacher_logits), masks = savable(student_logits, teacher_logits), _savable_masks(masks)
    if chosen == "reference":
        return reference_from_logits(
            student_logits,
            teacher_logits,
            student_word_mask=masks[0],
            teacher_word_mask=masks[1],
            pixel_mask=masks[2],
            temperature=temperature,
            terms=terms,
        )
    return _terms((student_logits, None, teacher_logits, None), masks, False, temperature, terms, chosen)


def _savable_masks(masks: Masks) -> Masks:
    student, teacher, pixels = (None if m is None else savable(m)[0] for m in masks)
    return student, teacher, pixels


def _choose(backend: str, words: int, masks: Masks, *inputs: Tensor) -> str:
    """The backend of this call; some take so many words and no more."""
    chosen = choose("pixel_word", backend, *inputs, masks=masks)
    most = MOST_WORDS.get(chosen, words)
    if words <= most:
        return chosen
    if backend == "auto":
        return "reference"
    raise BackendUnavailable(
        f"backend={chosen!r}: pixel_word's kernels hold at most {most} words, got {words}; use backend='auto' or "
        "'reference', or fewer words"
    )


def _terms(
    features: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    cosine: bool,
    temperature: float | Tensor,
    terms: Sequence[str],
    backend: str,
) -> dict[str, Tensor]:
    bits = sum(1 << TERMS.index(term) for term in set(terms))
    given = operator_argument(temperature)
    options = (cosine, given, bits)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in features):
        loss = _PixelWord.apply(*distinct(*features, *masks), *options, backend)
    else:
        loss = operator("pixel_word_forward", given)(*features, *masks, *options, False, backend)[0]
    columns = loss.unbind(1)
    return {term: columns[TERMS.index(term)] for term in terms}


class _PixelWord(torch.autograd.Function):
    """Saves the student's features, the logits, and matrices of words × words; the attention is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
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
        backend: str,
    ) -> Tensor:
        masks = (student_word_mask, teacher_word_mask, pixel_mask)
        loss, *kept = operator("pixel_word_forward", temperature)(
            student_pixels,
            student_words,
            teacher_pixels,
            teacher_words,
            *masks,
            cosine,
            temperature,
            terms,
            True,
            backend,
        )
        # Of the teacher's features the logits are left; where logits are given, they are kept as they are.
        teacher_logits = None if student_words is not None else teacher_pixels
        tensors, ctx.temperature = saved(temperature)
        ctx.save_for_backward(student_pixels, student_words, teacher_logits, *masks, *kept, *tensors)
        ctx.teacher_width = 0 if student_words is None else teacher_pixels.shape[2]
        ctx.options = (cosine, terms, backend)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        cosine, terms, backend = ctx.options
        refuse_tangent("pixel_word", backend, grad_loss)
        needs = ctx.needs_input_grad[:2]
        inputs, tensors = ctx.saved_tensors[:_SAVED], ctx.saved_tensors[_SAVED:]
        temperature = tensors[0] if tensors else ctx.temperature
        arguments = (grad_loss, *inputs, ctx.teacher_width, cosine, temperature, terms, *needs, backend)
        if torch.is_grad_enabled():  # create_graph=True: someone may differentiate the gradient
            grads = _PixelWordGradient.apply(temperature, *arguments)
        else:
            grads = operator("pixel_word_backward", temperature)(*arguments)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 9)


class _PixelWordGradient(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it again ends in a clear error, not in zeros."""

    @staticmethod
    def forward(ctx: Any, temperature: float | Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.backend = arguments[-1]
        return operator("pixel_word_backward", temperature)(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f'pixel_word: the {ctx.backend} backend is differentiable once; for double backward use backend="reference"'
        )


def self_test(backend: str, device: torch.device) -> str | None:
    """Run ``backend`` once on a few pixels on ``device``; return what is wrong with it, or None."""
    sizes = ((2, 37, 5), (2, 3, 5), (2, 37, 4), (2, 3, 4))
    exact = [
        (torch.arange(b * n * d, dtype=torch.float64) * (i + 1)).sin().reshape(b, n, d)
        for i, (b, n, d) in enumerate(sizes)
    ]
    inputs: list[Any] = [x.to(device, torch.float32) for x in exact]
    options: tuple[Any, ...] = (None, None, None, False, 0.5, 15)
    given: list[Any] = [*inputs, *options, True, backend]
    loss, *kept = _forward(*given)
    given = [torch.ones_like(loss), *inputs[:2], None, *options[:3], *kept, 4, *options[3:], True, True, backend]
    grads = _backward(*given)
    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in exact[:2]]
        terms = reference(*exact, temperature=0.5)
        exact_grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaves)
    exact_loss = torch.stack([terms[term].detach() for term in TERMS], 1)
    for name, got, want in (
        ("loss", loss, exact_loss),
        ("gradient of the pixels", grads[0], exact_grads[0]),
        ("gradient of the words", grads[1], exact_grads[1]),
    ):
        error = (got.cpu().double() - want).abs().max().item()
        if not error < 1e-5:
            return f"its self-test on {device} got a wrong {name} (off by {error:.1e})"
    return None
