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

from fastkd.errors import BackendUnavailable
from fastkd.ops import checks
from fastkd.ops.availability import compare
from fastkd.ops.backends import BACKENDS
from fastkd.ops.dispatch import choose
from fastkd.ops.launch import converted, distinct, family_module
from fastkd.ops.pixel_word.plan import (
    MAX_WORDS,
    TERM_BITS,
    Inputs,
    Options,
    Saved,
    allocate,
    backward_flops,
    convert,
    forward_flops,
    gradient_like,
    rows_or_maps,
)
from fastkd.ops.pixel_word.reference import SIMILARITIES, TERMS
from fastkd.ops.pixel_word.reference import pixel_word as reference
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as reference_from_logits
from fastkd.ops.registration import (
    Implementation,
    gradient,
    number_of,
    operator,
    operator_argument,
    register,
    save_temperature,
    saved_temperature,
)
from fastkd.ops.torch_state import savable


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
    """Return per-sample terms (B,) from pixels and words, without the factor τ² of the first order.

    Args:
        student_pixels: (B, N, D_S), floating, any strides. Only the student's pixels and words receive gradients.
        student_words: (B, T, D_S).
        teacher_pixels: (B, N, D_T).
        teacher_words: (B, T, D_T); T may differ from the student's if "pixel_pixel" is the only term.
        student_word_mask: None or bool (B, T), True = valid.
        teacher_word_mask: the same for the teacher's words; must be equal unless "pixel_pixel" is the only term.
        pixel_mask: None or bool (B, N).
        similarity: "scaled_dot" or "cosine".
        temperature: τ > 0. Its gradient is computed by the reference only.
        terms: some of "pixel_to_word", "word_to_pixel", "pixel_pixel", "word_word".
        backend: "auto", "reference", "cpu", "triton" or "cuda" (the last two: at most 128 words). Kernels are
            differentiable once.

    Returns:
        The requested terms, in fp32 (fp64 if an input is fp64). NaN and Inf of valid pixels and words propagate.

    Raises:
        ValueError, TypeError: mismatched shapes, dtypes or devices, τ ≤ 0, a teacher that requires grad.
        fastkd.BackendUnavailable: a backend requested by name cannot compute this here.
    """
    checks.option("similarity", similarity, SIMILARITIES)
    inputs = Inputs(
        student_pixels, student_words, teacher_pixels, teacher_words, student_word_mask, teacher_word_mask, pixel_mask
    )
    features = (student_pixels, student_words, teacher_pixels, teacher_words)
    _check(dict(zip(Inputs._fields[:4], features, strict=True)), inputs, terms)
    for side, v, w in (("student", student_pixels, student_words), ("teacher", teacher_pixels, teacher_words)):
        if v.shape[0] != w.shape[0] or v.shape[2] != w.shape[2]:
            raise ValueError(
                f"{side}_pixels and {side}_words: expected (B, N, D) and (B, T, D), got {tuple(v.shape)} and "
                f"{tuple(w.shape)}"
            )
    return pixel_word_unchecked(inputs, similarity, checks.temperature(temperature), terms, backend)


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
    """Return per-sample terms (B,) from pixel–word logits (B, N, T); otherwise as :func:`pixel_word`."""
    inputs = Inputs(student_logits, None, teacher_logits, None, student_word_mask, teacher_word_mask, pixel_mask)
    _check({"student_logits": student_logits, "teacher_logits": teacher_logits}, inputs, terms)
    return pixel_word_unchecked(inputs, "scaled_dot", checks.temperature(temperature), terms, backend)


def pixel_word_unchecked(
    inputs: Inputs, similarity: str, temperature: float | Tensor, terms: Sequence[str], backend: str
) -> dict[str, Tensor]:
    """Return :func:`pixel_word`, or without words :func:`pixel_word_from_logits`, of checked arguments."""
    inputs = Inputs(*savable(*inputs))  # type: ignore[arg-type]
    if checks.differentiates_temperature(backend, temperature):
        chosen = "reference"
    else:
        chosen = _choose(backend, inputs)
    if chosen == "reference":
        return _reference(inputs, similarity, temperature, terms)
    tau = operator_argument(temperature)
    bits = 0
    for term in terms:
        bits |= TERM_BITS[term]
    options = Options(similarity == "cosine", tau, bits)
    v_s, w_s = inputs.student_pixels, inputs.student_words
    if torch.is_grad_enabled() and (v_s.requires_grad or (w_s is not None and w_s.requires_grad)):
        loss = _PixelWord.apply(*distinct(*inputs), *options, chosen)
    else:
        loss = operator("pixel_word_forward", tau)(*inputs, *options, False, chosen)[0]
    columns = loss.unbind(1)  # (B,) per term
    return {term: columns[TERMS.index(term)] for term in terms}


def _check(tensors: dict[str, Tensor], inputs: Inputs, terms: Sequence[str]) -> None:
    """Raise for invalid tensors or terms, or sizes that do not match."""
    for name, tensor in tensors.items():
        checks.floating(name, tensor, (3,), "(B, T, D)" if name.endswith("words") else "(B, N, D)")
        if name.startswith("teacher"):
            checks.teacher(name, tensor)
    checks.same_device(**tensors)
    student, teacher = inputs.student_pixels, inputs.teacher_pixels
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student and teacher: expected the same samples and pixels (B, N), got {tuple(student.shape[:2])} and "
            f"{tuple(teacher.shape[:2])}"
        )
    if not terms or not set(terms) <= set(TERMS):
        raise ValueError(f"terms: expected some of {', '.join(TERMS)}, got {list(terms)}")
    words = inputs.word_counts
    if words[0] != words[1] and set(terms) != {"pixel_pixel"}:
        raise ValueError(
            f"terms: with {words[0]} and {words[1]} words only 'pixel_pixel' is defined, got {list(terms)}"
        )


def _choose(backend: str, inputs: Inputs) -> str:
    """Return the backend of this call; some support only a limited number of words."""
    v_s, w_s, v_t, w_t, *masks = inputs
    others = (v_t,) if w_s is None or w_t is None else (w_s, v_t, w_t)
    chosen = choose("pixel_word", backend, v_s, *others, masks=masks)
    limit = MAX_WORDS.get(chosen)
    if limit is None or (words := max(inputs.word_counts)) <= limit:
        return chosen
    if backend == "auto":
        return "reference"
    raise BackendUnavailable(
        f"backend={chosen!r}: pixel_word's kernels support at most {limit} words, got {words}; use backend='auto' or "
        "'reference', or fewer words"
    )


def _reference(inputs: Inputs, similarity: str, temperature: float | Tensor, terms: Sequence[str]) -> dict[str, Tensor]:
    options: dict[str, Any] = {
        "student_word_mask": inputs.student_word_mask,
        "teacher_word_mask": inputs.teacher_word_mask,
        "pixel_mask": inputs.pixel_mask,
        "temperature": temperature,
        "terms": terms,
    }
    v_s, w_s, v_t, w_t = inputs.features
    if w_s is None or w_t is None:
        return reference_from_logits(v_s, v_t, **options)
    return reference(v_s, w_s, v_t, w_t, similarity=similarity, **options)


class _PixelWord(torch.autograd.Function):
    """Saves the student's features, the logits and T×T matrices; the backward recomputes the attention."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, (cosine, temperature, terms, backend) = arguments[:7], arguments[7:]
        v_s, w_s, v_t, _, *masks = inputs
        loss, *statistics = operator("pixel_word_forward", temperature)(
            *inputs, cosine, temperature, terms, True, backend
        )
        # Logits computed from features are among the statistics; logits that are inputs are saved as they are.
        teacher_logits = v_t if w_s is None else None
        saved = (v_s, w_s, teacher_logits, *masks, *statistics)  # the fields of Saved
        ctx.save_for_backward(*saved, *save_temperature(ctx, temperature))
        ctx.teacher_width = 0 if w_s is None else v_t.shape[2]
        ctx.cosine, ctx.terms, ctx.backend = cosine, terms, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]  # pixels, words
        temperature = saved_temperature(ctx)
        saved = ctx.saved_tensors[: len(Saved._fields)]
        options = (ctx.cosine, temperature, ctx.terms)
        grads = gradient("pixel_word", temperature, grad_loss, *saved, ctx.teacher_width, *options, *needs, ctx.backend)
        return (grads[0] if needs[0] else None, grads[1] if needs[1] else None, *(None,) * 9)


# --- the operators ----------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (keep, backend) = Inputs(*arguments[:7]), arguments[10:]
    options = _with_number(Options(*arguments[7:10]))
    loss, *statistics = allocate(inputs, options, keep, backend)
    if loss.numel():
        _kernels(backend).forward(inputs, options, statistics, loss, backend)
    return loss, *statistics


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return allocate(Inputs(*arguments[:7]), Options(*arguments[7:10]), *arguments[10:])


def _backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of the student's pixels and words; a gradient that is not needed is empty."""
    saved, teacher_width = Saved(*arguments[:10]), arguments[10]
    options, (for_pixels, for_words, backend) = _with_number(Options(*arguments[11:14])), arguments[14:]
    # The dtype of the arithmetic is the forward's, which may be fp64 because of the teacher alone.
    dtype = grad_loss.dtype
    pixels, words = convert(saved.student_pixels, saved.student_words, dtype, backend)
    grad_pixels = gradient_like(pixels if for_pixels else None, saved.student_pixels)
    grad_words = words.new_empty(*words.shape) if for_words and words is not None else pixels.new_empty(0)
    if grad_pixels.numel() or grad_words.numel():
        if pixels is not saved.student_pixels or words is not saved.student_words:
            saved = saved._replace(student_pixels=pixels, student_words=words)
        _kernels(backend).backward(saved, teacher_width, options, grad_loss, grad_pixels, grad_words, backend)
    words_dtype = dtype if words is None else arguments[1].dtype
    return converted(grad_pixels, arguments[0].dtype), converted(grad_words, words_dtype)


def _backward_fake(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    student_pixels, student_words = arguments[:2]
    for_pixels, for_words, _ = arguments[14:]
    grad_pixels = gradient_like(rows_or_maps(student_pixels) if for_pixels else None, student_pixels)
    words_dtype = grad_loss.dtype if student_words is None else student_words.dtype
    shape = student_words.shape if for_words and student_words is not None else (0,)
    return grad_pixels, torch.empty(shape, dtype=words_dtype, device=student_pixels.device)


def _with_number(options: Options) -> Options:
    if isinstance(options.temperature, Tensor):
        return options._replace(temperature=number_of(options.temperature))
    return options


def _kernels(backend: str) -> Any:
    """Return the module that calls the backend's kernels, which fill preallocated outputs."""
    return family_module("pixel_word", BACKENDS[backend].module)


_MASKS = "Tensor? student_word_mask, Tensor? teacher_word_mask, Tensor? pixel_mask"
_OPTIONS = "bool cosine, float temperature, int terms"
_STATISTICS = "Tensor logits, Tensor norms, Tensor columns, Tensor grams"
register(
    "pixel_word_forward",
    f"(Tensor student_pixels, Tensor? student_words, Tensor teacher_pixels, Tensor? teacher_words, {_MASKS}, "
    f"{_OPTIONS}, bool keep, str backend) -> (Tensor loss, {_STATISTICS})",
    Implementation(_forward, _forward_fake, forward_flops),
)
register(
    "pixel_word_backward",
    f"(Tensor grad_loss, Tensor student_pixels, Tensor? student_words, Tensor? teacher_logits, {_MASKS}, "
    f"{_STATISTICS}, SymInt teacher_width, {_OPTIONS}, bool for_pixels, bool for_words, str backend) "
    "-> (Tensor grad_pixels, Tensor grad_words)",
    Implementation(_backward, _backward_fake, backward_flops),
)


def self_test(backend: str, device: torch.device) -> str | None:
    """Run ``backend`` on a few pixels on ``device``; return the error found, or None."""
    sizes = ((2, 37, 5), (2, 3, 5), (2, 37, 4), (2, 3, 4))  # (B, N, D_S), (B, T, D_S), (B, N, D_T), (B, T, D_T)
    exact = [
        (torch.arange(b * n * d, dtype=torch.float64) * (i + 1)).sin().reshape(b, n, d)
        for i, (b, n, d) in enumerate(sizes)
    ]
    inputs: list[Any] = [x.to(device, torch.float32) for x in exact]
    masks, options = (None, None, None), Options(False, 0.5, 15)
    loss, *statistics = _forward(*inputs, *masks, *options, True, backend)
    saved = (*inputs[:2], None, *masks, *statistics)
    grads = _backward(torch.ones_like(loss), *saved, sizes[2][2], *options, True, True, backend)
    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in exact[:2]]
        terms = reference(*exact, temperature=0.5)
        exact_grads = torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaves)
    exact_loss = torch.stack([terms[term] for term in TERMS], 1)
    return compare(
        {
            "loss": (loss, exact_loss),
            "gradient of the pixels": (grads[0], exact_grads[0]),
            "gradient of the words": (grads[1], exact_grads[1]),
        },
        device,
    )
