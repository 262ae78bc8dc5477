"""Cross-modal distillation: match pixel–word attention and its second-order products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fastkd.losses._module import LossModule
from fastkd.losses._reduce import reduce_rows
from fastkd.losses._temperatures import Temperature, at_student_temperature
from fastkd.losses._word_descriptors import refuse_descriptors, word_descriptor_terms
from fastkd.ops import checks
from fastkd.ops.numerics import compute_dtype, full_precision
from fastkd.ops.pixel_word import pixel_word_unchecked
from fastkd.ops.pixel_word.descriptors import DESCRIPTOR_TERMS
from fastkd.ops.pixel_word.plan import Inputs
from fastkd.ops.pixel_word.reference import SIMILARITIES, TERMS, pixel_word_logits

DEFAULT_TERMS: Mapping[str, float] = MappingProxyType({"pixel_to_word": 1.0, "word_to_pixel": 1.0})
"""Weights used for ``terms=None``: the first order, to which no other term has added; see docs/maths.md."""

PIXELS, WORDS = "(B, N, D) or (B, D, H, W)", "(B, T, D)"
FIRST_ORDER = ("pixel_to_word", "word_to_pixel")
WordMask = Tensor | tuple[Tensor, Tensor]


def cross_modal_kd(
    student_pixels: Tensor,
    student_words: Tensor,
    teacher_pixels: Tensor,
    teacher_words: Tensor,
    *,
    word_mask: WordMask | None = None,
    pixel_mask: Tensor | None = None,
    similarity: str = "scaled_dot",
    temperature: Temperature = 1.0,
    terms: Mapping[str, float] | None = None,
    reduction: str = "mean",
    return_terms: bool = False,
    backend: str = "auto",
) -> Tensor | dict[str, Tensor]:
    """Compare the pixel–word attention of student and teacher, to first and, on request, second order.

    A reconstruction of the vision–language correlation term of "Channel Attention-Guided Cross-Modal Knowledge
    Distillation for Referring Image Segmentation" (arXiv 2604.16806). From pixels V (N×D) and words L (T×D) of a
    network, M = V Lᵀ/√D ("scaled_dot") or M = V̂ L̂ᵀ ("cosine"); A = softmax over valid words of M/τ, 0 for masked words
    and in the rows of masked pixels; Q = softmax over valid pixels of M/τ. With n valid pixels, per sample:

    - "pixel_to_word" = τ²·mean over valid pixels i of KL(A_T[i] ‖ A_S[i]);
    - "word_to_pixel" = τ²·mean over valid words j of KL(Q_T[:, j] ‖ Q_S[:, j]);
    - "pixel_pixel" = ‖A_S A_Sᵀ − A_T A_Tᵀ‖²_F / n², pixels related through words;
    - "word_word" = ‖A_Sᵀ A_S − A_Tᵀ A_T‖²_F / n², words related through pixels.

    Two more compare the words' descriptors D = AᵀV (T×D, each row divided by the word's Σ_i A[i, j]), each the mean of
    the pixels that attend to the word:

    - "word_descriptor" = mean over valid words j of KL(softmax(E_T[j]/0.1) ‖ softmax(E_S[j]/0.1)), E = D̂ D̂ᵀ the cosines
      between the sample's valid words;
    - "word_channel" = :func:`channel_kd`, with its defaults, between the channels of D over all valid words of the
      batch: channel attention guided by language. One number for the batch, the same for each sample.

    The loss is Σ weight·term. The values of masked pixels and words affect neither loss nor gradient.

    Args:
        student_pixels: (B, N, D_S) or (B, D_S, H, W), any floating dtype.
        student_words: (B, T, D_S).
        teacher_pixels: (B, N, D_T) or (B, D_T, H, W); D_T may differ from D_S, except for "word_channel". Must not
            require grad.
        teacher_words: (B, T, D_T). Must not require grad. Its number of words may differ from the student's if
            "pixel_pixel" is the only term, since different tokens cannot be compared one by one.
        word_mask: None or bool (B, T), True = valid; with "pixel_pixel" alone, also a pair (student's, teacher's).
        pixel_mask: None or bool (B, N) or (B, H, W), True = valid.
        similarity: "scaled_dot" or "cosine".
        temperature: τ > 0, or (τ_S, τ_T) for M_S/τ_S and M_T/τ_T, with the factor τ_S² in the first order.
        terms: weights ≥ 0 by term, for example ``{"pixel_to_word": 1.0, "pixel_pixel": 0.5}``; other terms are not
            computed. None means ``DEFAULT_TERMS``, the first two at 1. The last two are computed in plain torch, except
            for the relation of "word_channel".
        reduction: "mean" over the batch, "sum", or "none": (B,).
        return_terms: return a dict with each term, *unweighted*, reduced in the same way, instead of the weighted sum.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        The loss, or a dict of its terms, in fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: an invalid argument; the message names it and the fix. A sample without a valid word or
            pixel is an error on the CPU; on a GPU, where reading the mask would stall the stream, its loss is NaN.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> with torch.no_grad():
        ...     v_t, l_t = teacher_taps(image, words)
        >>> loss = cross_modal_kd(v_s, l_s, v_t, l_t, word_mask=word_mask)
    """
    weights, student_temperature, teacher_temperature = _check_options(
        temperature, terms, reduction, return_terms, similarity
    )
    checks.floating("student_pixels", student_pixels, (3, 4), PIXELS)
    checks.floating("student_words", student_words, (3,), WORDS)
    checks.floating("teacher_pixels", teacher_pixels, (3, 4), PIXELS)
    checks.floating("teacher_words", teacher_words, (3,), WORDS)
    checks.teacher("teacher_pixels", teacher_pixels)
    checks.teacher("teacher_words", teacher_words)
    checks.same_device(
        student_pixels=student_pixels,
        student_words=student_words,
        teacher_pixels=teacher_pixels,
        teacher_words=teacher_words,
    )
    maps = []
    if pixel_mask is not None:
        maps = [tuple(p.shape[2:]) for p in (student_pixels, teacher_pixels) if p.dim() == 4]
    student_pixels, teacher_pixels = _as_rows(student_pixels), _as_rows(teacher_pixels)
    for side, v, w in (("student", student_pixels, student_words), ("teacher", teacher_pixels, teacher_words)):
        if v.shape[0] != w.shape[0] or v.shape[2] != w.shape[2]:
            names = (f"{side}_pixels", f"{side}_words")
            checks.same_size(
                "widths D", names, (v.shape[2], w.shape[2]), "project the words or the pixels to one width"
            )
            checks.same_size("batch sizes", names, (v.shape[0], w.shape[0]), "give the same samples to both")
    _check_sizes(
        ("student_pixels", "teacher_pixels"),
        (student_pixels.shape[:2], teacher_pixels.shape[:2]),
        ("student_words", "teacher_words"),
        (student_words.shape[1], teacher_words.shape[1]),
        weights,
    )
    batch, pixels = student_pixels.shape[:2]
    words = (student_words.shape[1], teacher_words.shape[1])
    mask_s, mask_t = _word_masks(word_mask, batch, words, weights, student_words)
    mask_p = _pixel_mask(pixel_mask, batch, pixels, maps, student_pixels)
    inputs = Inputs(student_pixels, student_words, teacher_pixels, teacher_words, mask_s, mask_t, mask_p)
    descriptors = [term for term in weights if term in DESCRIPTOR_TERMS]
    others = tuple(term for term in weights if term in TERMS) if descriptors else tuple(weights)
    results = {}
    if descriptors:
        # Several parts add to a gradient: in half precision it would be rounded more than once.
        features = (student_pixels, student_words, teacher_pixels, teacher_words)
        dtype = compute_dtype(*features)
        v_s, w_s, v_t, w_t = (x.to(dtype) for x in features)
        inputs = Inputs(v_s, w_s, v_t, w_t, mask_s, mask_t, mask_p)
        temperatures = student_temperature, student_temperature if teacher_temperature is None else teacher_temperature
        results = word_descriptor_terms(inputs, similarity, temperatures, descriptors, backend)
    if others:
        if teacher_temperature is not None:
            inputs, backend = _with_ratio(inputs, similarity, student_temperature, teacher_temperature, backend)
            similarity = "scaled_dot"
        results |= pixel_word_unchecked(inputs, similarity, student_temperature, others, backend)
    if descriptors:
        results = {term: results[term] for term in weights}  # in the order of the weights
    return _combine(results, weights, student_temperature, reduction, return_terms)


def cross_modal_kd_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    word_mask: WordMask | None = None,
    pixel_mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    terms: Mapping[str, float] | None = None,
    reduction: str = "mean",
    return_terms: bool = False,
    backend: str = "auto",
) -> Tensor | dict[str, Tensor]:
    """Compare pixel–word logits M that the networks computed themselves, as :func:`cross_modal_kd` does.

    Args:
        student_logits: M_S, (B, N, T), before any softmax; or (B, heads, N, T), where every head is compared with the
            teacher's head of the same index and a sample's term is the mean over its heads.
        teacher_logits: M_T, the same shape; T may differ if "pixel_pixel" is the only term. Must not require grad.
        word_mask: None or bool (B, T), True = valid; with "pixel_pixel" alone, also a pair (student's, teacher's).
        pixel_mask: None or bool (B, N), True = valid.
        temperature: τ > 0, or (τ_S, τ_T) for M_S/τ_S and M_T/τ_T, with the factor τ_S² in the first order.
        terms: weights ≥ 0 by term; None means ``DEFAULT_TERMS``. "word_descriptor" and "word_channel" need the pixels'
            features, so they are an error here.
        reduction: "mean" over the batch, "sum", or "none": (B,).
        return_terms: return a dict with each term, *unweighted*, reduced in the same way, instead of the weighted sum.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        The loss, or a dict of its terms, in fp32 (fp64 if an input is fp64).

    Raises:
        ValueError, TypeError: as :func:`cross_modal_kd`.
        BackendUnavailable: ``backend`` cannot compute this here.

    Example:
        >>> loss = cross_modal_kd_from_logits(m_s, m_t.detach(), word_mask=word_mask, terms={"pixel_to_word": 1.0})
    """
    weights, student_temperature, teacher_temperature = _check_options(temperature, terms, reduction, return_terms)
    refuse_descriptors([term for term in weights if term in DESCRIPTOR_TERMS])
    layout = "(B, N, T) or (B, heads, N, T)"
    checks.floating("student_logits", student_logits, (3, 4), layout)
    checks.floating("teacher_logits", teacher_logits, (3, 4), layout)
    checks.teacher("teacher_logits", teacher_logits)
    checks.same_device(student_logits=student_logits, teacher_logits=teacher_logits)
    names = ("student_logits", "teacher_logits")
    heads_s, heads_t = tuple(student_logits.shape[1:-2]), tuple(teacher_logits.shape[1:-2])
    checks.same_size("heads", names, (heads_s, heads_t), "average each network's heads, or compare (B, N, T) logits")
    _check_sizes(
        names,
        ((student_logits.shape[0], student_logits.shape[-2]), (teacher_logits.shape[0], teacher_logits.shape[-2])),
        names,
        (student_logits.shape[-1], teacher_logits.shape[-1]),
        weights,
    )
    batch, pixels = student_logits.shape[0], student_logits.shape[-2]
    words = (student_logits.shape[-1], teacher_logits.shape[-1])
    mask_s, mask_t = _word_masks(word_mask, batch, words, weights, student_logits)
    mask_p = _pixel_mask(pixel_mask, batch, pixels, [], student_logits)
    if heads_s:  # each head is a separate sample: (B·heads, N, T)
        student_logits, teacher_logits = student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)
        mask_s, mask_t, mask_p = (
            None if m is None else m.repeat_interleave(heads_s[0], 0) for m in (mask_s, mask_t, mask_p)
        )
    inputs = Inputs(student_logits, None, teacher_logits, None, mask_s, mask_t, mask_p)
    if teacher_temperature is not None:
        inputs, backend = _with_ratio(inputs, "scaled_dot", student_temperature, teacher_temperature, backend)
    results = pixel_word_unchecked(inputs, "scaled_dot", student_temperature, tuple(weights), backend)
    if heads_s:
        results = {term: value.reshape(-1, heads_s[0]).mean(1) for term, value in results.items()}  # (B,)
    return _combine(results, weights, student_temperature, reduction, return_terms)


def _check_options(
    temperature: Temperature,
    terms: Mapping[str, float] | None,
    reduction: str,
    return_terms: bool,
    similarity: str = "scaled_dot",
) -> tuple[dict[str, float], float | Tensor, float | Tensor | None]:
    """Return the terms' weights and the temperatures of student and teacher."""
    checks.option("similarity", similarity, SIMILARITIES)
    checks.option("reduction", reduction, checks.REDUCTIONS)
    checks.flags(return_terms=return_terms)
    weights = dict(DEFAULT_TERMS) if terms is None else checks.term_weights(terms, (*TERMS, *DESCRIPTOR_TERMS))
    return weights, *checks.temperatures(temperature)


def _check_sizes(
    pixel_names: tuple[str, str],
    pixels: tuple[Sequence[int], Sequence[int]],
    word_names: tuple[str, str],
    words: tuple[int, int],
    weights: Mapping[str, float],
) -> None:
    checks.same_size("(B, N)", pixel_names, pixels, "resize or pool one to the other's map")
    if words[0] != words[1] and (others := [term for term in weights if term != "pixel_pixel"]):
        raise ValueError(
            f"{word_names[0]} and {word_names[1]}: numbers of words differ, {words[0]} and {words[1]}, which only "
            f"'pixel_pixel' allows, but terms has {', '.join(map(repr, others))}; use one tokenizer for both, or pass "
            "terms={'pixel_pixel': 1.0}"
        )


def _with_ratio(
    inputs: Inputs,
    similarity: str,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    backend: str,
) -> tuple[Inputs, str]:
    """Return the inputs with the teacher's logits times τ_S/τ_T, and the backend for this call.

    The operator divides cosines by the norms of both sides, so they are computed here and passed as logits.
    """
    temperatures = (student_temperature, teacher_temperature, backend)
    v_s, w_s, v_t, w_t = inputs.features
    if w_s is None or w_t is None:
        v_t, backend = at_student_temperature(v_t, *temperatures, v_s)
        return inputs._replace(teacher_pixels=v_t), backend
    if similarity == "scaled_dot":
        w_t, backend = at_student_temperature(w_t, *temperatures, v_s, w_s, v_t)
        return inputs._replace(teacher_words=w_t), backend
    checks.backend("pixel_word", backend, v_s)
    dtype, (mask_s, mask_t, mask_p) = compute_dtype(v_s, w_s, v_t, w_t), inputs.masks
    with full_precision(v_s.device):
        m_s = pixel_word_logits(v_s.to(dtype), w_s.to(dtype), mask_p, mask_s, similarity)
        m_t = pixel_word_logits(v_t.to(dtype), w_t.to(dtype), mask_p, mask_t, similarity)
    logits = inputs._replace(student_pixels=m_s, student_words=None, teacher_pixels=m_t, teacher_words=None)
    return _with_ratio(logits, "scaled_dot", *temperatures)


def _as_rows(pixels: Tensor) -> Tensor:
    """Return pixels (B, N, D) or (B, D, H, W) as (B, N, D)."""
    return pixels.flatten(2).mT if pixels.dim() == 4 else pixels


def _word_masks(
    mask: WordMask | None, batch: int, words: tuple[int, int], weights: Mapping[str, float], like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the word masks of student and teacher, after checking them."""
    if mask is None:
        return None, None
    pair = isinstance(mask, tuple | list)
    if pair and (len(mask) != 2 or set(weights) != {"pixel_pixel"}):
        raise ValueError(
            f"word_mask: a pair of masks is for terms={{'pixel_pixel': ...}} alone, got {len(mask)} masks and terms "
            f"{', '.join(map(repr, weights))}; pass one (B, T) mask"
        )
    if not pair and words[0] != words[1]:
        raise ValueError(
            f"word_mask: student and teacher have {words[0]} and {words[1]} words; pass a pair (student's, teacher's)"
        )
    student, teacher = (mask[0], mask[1]) if pair else (mask, mask)
    return (
        _word_mask("word_mask[0]" if pair else "word_mask", student, (batch, words[0]), like),
        _word_mask("word_mask[1]" if pair else "word_mask", teacher, (batch, words[1]), like),
    )


def _word_mask(name: str, mask: object, shape: tuple[int, int], like: Tensor) -> Tensor:
    checked = checks.bool_mask(name, mask, [shape], like)
    checks.every_sample_valid(name, checked, "word")
    return checked


def _pixel_mask(
    mask: Tensor | None, batch: int, pixels: int, maps: list[tuple[int, ...]], like: Tensor
) -> Tensor | None:
    if mask is None:
        return None
    shapes = [(batch, pixels), *((batch, *m) for m in maps)]
    flat = checks.bool_mask("pixel_mask", mask, shapes, like).reshape(batch, pixels)
    checks.every_sample_valid("pixel_mask", flat, "pixel")
    return flat


def _combine(
    results: dict[str, Tensor],
    weights: dict[str, float],
    temperature: float | Tensor,
    reduction: str,
    return_terms: bool,
) -> Tensor | dict[str, Tensor]:
    if return_terms:
        terms = {term: value * temperature**2 if term in FIRST_ORDER else value for term, value in results.items()}
        return {term: reduce_rows(value, None, reduction) for term, value in terms.items()}
    total: Tensor | None = None
    traced = torch.compiler.is_compiling()
    for term, value in results.items():
        factor = weights[term] * temperature**2 if term in FIRST_ORDER else weights[term]
        if traced or isinstance(factor, Tensor):  # a traced ``alpha`` costs a graph per value
            total = value * factor if total is None else total + value * factor
        elif total is None:
            total = value if factor == 1 else value * factor
        else:
            total = torch.add(total, value, alpha=factor)  # one launch on a GPU
    assert total is not None
    return reduce_rows(total, None, reduction)


class CrossModalKD(LossModule):
    """:func:`cross_modal_kd` as a module with the same arguments; masks are passed to each call.

    The widths may differ; no aligner is needed, except for the term "word_channel", which compares equal widths.

    Example:
        >>> kd = CrossModalKD(terms={"pixel_to_word": 1.0, "word_to_pixel": 1.0})
        >>> loss = kd(v_s, l_s, v_t.detach(), l_t.detach(), word_mask=word_mask)
    """

    def __init__(
        self,
        *,
        similarity: str = "scaled_dot",
        temperature: Temperature = 1.0,
        terms: Mapping[str, float] | None = None,
        reduction: str = "mean",
        return_terms: bool = False,
        backend: str = "auto",
    ) -> None:
        weights, *_ = _check_options(temperature, terms, reduction, return_terms, similarity)
        super().__init__(
            {
                "similarity": similarity,
                "temperature": temperature,
                "terms": weights,
                "reduction": reduction,
                "return_terms": return_terms,
                "backend": backend,
            }
        )

    def forward(
        self,
        student_pixels: Tensor,
        student_words: Tensor,
        teacher_pixels: Tensor,
        teacher_words: Tensor,
        *,
        word_mask: WordMask | None = None,
        pixel_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss, or its terms with ``return_terms``."""
        return cross_modal_kd(
            student_pixels,
            student_words,
            teacher_pixels,
            teacher_words,
            word_mask=word_mask,
            pixel_mask=pixel_mask,
            **self._options(),
        )
