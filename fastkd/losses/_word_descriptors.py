"""The terms of cross_modal_kd that compare the mean of the pixels that attend to each word."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.pixel_word.descriptors import Attended, descriptor_terms, logits_of
from fastkd.ops.pixel_word.plan import Inputs


def word_descriptor_terms(
    inputs: Inputs,
    similarity: str,
    temperatures: tuple[float | Tensor, float | Tensor],
    terms: Sequence[str],
    backend: str,
) -> dict[str, Tensor]:
    """Return the terms (B,) of checked inputs, whose words are the same in both networks.

    Raises:
        ValueError: widths that "word_channel" cannot compare.
        BackendUnavailable: ``backend`` was requested by name and cannot run here.
    """
    v_s, w_s, v_t, w_t = inputs.features
    assert w_s is not None
    assert w_t is not None
    if "word_channel" in terms and v_s.shape[2] != v_t.shape[2]:
        raise ValueError(
            f"student_pixels and teacher_pixels: widths D differ, {v_s.shape[2]} and {v_t.shape[2]}, but "
            "'word_channel' compares them channel by channel; project one network's pixels and words to the other's "
            "width, or use 'word_descriptor'"
        )
    checks.backend("pixel_word", backend, v_s)
    masks = inputs.student_word_mask, inputs.pixel_mask
    student, teacher = (
        Attended(logits_of(v, w, similarity, *masks), v, tau)
        for v, w, tau in ((v_s, w_s, temperatures[0]), (v_t, w_t, temperatures[1]))
    )
    return descriptor_terms(student, teacher, *masks, terms, backend)


def refuse_descriptors(terms: Sequence[str]) -> None:
    """Raise ``ValueError`` for terms that logits alone do not determine."""
    for term in terms:
        raise ValueError(
            f"terms: {term!r} averages the features of pixels, which logits do not contain; call cross_modal_kd, which "
            "takes pixels and words, or drop the term"
        )
