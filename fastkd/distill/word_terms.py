"""Losses of word descriptors, from the pixel–word logits and a map that a model returns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastkd.losses.cross_modal import CrossModalKD, cross_modal_kd
from fastkd.ops import checks
from fastkd.ops.numerics import compute_dtype
from fastkd.ops.pixel_word.descriptors import Attended, descriptor_terms


def word_descriptor_kd(
    student_logits: Tensor,
    student_map: Tensor,
    teacher_logits: Tensor,
    teacher_map: Tensor,
    *,
    word_mask: Tensor | None = None,
    temperature: float | Tensor | tuple[float | Tensor, float | Tensor] = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return the term "word_descriptor" of :func:`fastkd.losses.cross_modal_kd`, with the networks' own attention.

    Logits are averaged over the heads. Numbers of heads, widths and map sizes may differ between the networks.

    Args:
        student_logits: (B, heads, N, T) pixel–word logits before masking, as `RISOutput.pixel_word_logits`.
        student_map: (B, C, H, W) with H·W = N: the pixels that a word's attention averages.
        teacher_logits: the same with the teacher's sizes.
        teacher_map: the same with the teacher's sizes. Must not require grad.
        word_mask: None or bool (B, T), True = valid.
        temperature: τ of the attention, or (τ_S, τ_T).
        backend: as in ``cross_modal_kd``.

    Raises:
        ValueError, TypeError: sizes that do not match, or a mask without a valid word in a sample.
    """
    return _term(
        "word_descriptor", student_logits, student_map, teacher_logits, teacher_map, word_mask, temperature, backend
    )


def word_channel_kd(
    student_logits: Tensor,
    student_map: Tensor,
    teacher_logits: Tensor,
    teacher_map: Tensor,
    *,
    word_mask: Tensor | None = None,
    temperature: float | Tensor | tuple[float | Tensor, float | Tensor] = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return the term "word_channel", as :func:`word_descriptor_kd`; the two maps have the same number of channels."""
    if (
        isinstance(student_map, Tensor)
        and isinstance(teacher_map, Tensor)
        and student_map.dim() == teacher_map.dim() > 1
    ):
        checks.same_size(
            "numbers of channels",
            ("student_map", "teacher_map"),
            (student_map.shape[1], teacher_map.shape[1]),
            "select maps of equal width, or use 'word_descriptor'",
        )
    return _term(
        "word_channel", student_logits, student_map, teacher_logits, teacher_map, word_mask, temperature, backend
    )


def compares_words(loss: object) -> bool:
    """Return whether a loss is one of this module."""
    return loss in (word_descriptor_kd, word_channel_kd)


def pools_words(loss: object, terms: object) -> bool:
    """Return whether a loss with this value of ``terms`` relates the words of different samples."""
    if loss is word_channel_kd:
        return True
    takes_terms = loss is cross_modal_kd or isinstance(loss, CrossModalKD)
    return takes_terms and isinstance(terms, Mapping) and "word_channel" in terms


def _term(
    term: str,
    student_logits: Tensor,
    student_map: Tensor,
    teacher_logits: Tensor,
    teacher_map: Tensor,
    word_mask: Tensor | None,
    temperature: float | Tensor | tuple[float | Tensor, float | Tensor],
    backend: str,
) -> Tensor:
    own, other = checks.temperatures(temperature)
    tensors = {
        "student_logits": student_logits,
        "student_map": student_map,
        "teacher_logits": teacher_logits,
        "teacher_map": teacher_map,
    }
    for name, tensor in tensors.items():
        layout = "(B, heads, N, T)" if name.endswith("logits") else "(B, C, H, W)"
        checks.floating(name, tensor, (4,), layout)
        if name.startswith("teacher"):
            checks.teacher(name, tensor)
    checks.same_device(**tensors)
    batch, words = student_logits.shape[0], student_logits.shape[3]
    dtype = compute_dtype(*tensors.values())
    networks = []
    for side, tau in (("student", own), ("teacher", own if other is None else other)):
        logits, features = tensors[f"{side}_logits"], tensors[f"{side}_map"].flatten(2).mT  # (B, N, C)
        names = (f"{side}_logits", f"{side}_map")
        fix = "select the logits and the map of one stage, or a map of its size"
        checks.same_size("(B, N)", names, ((logits.shape[0], logits.shape[2]), tuple(features.shape[:2])), fix)
        networks.append(Attended(logits.to(dtype).mean(1), features.to(dtype), tau))
    checks.same_size(
        "(B, T)",
        ("student_logits", "teacher_logits"),
        ((batch, words), (teacher_logits.shape[0], teacher_logits.shape[3])),
        "words are compared one by one: give the same samples to both, tokenised once",
    )
    if word_mask is not None:
        word_mask = checks.bool_mask("word_mask", word_mask, [(batch, words)], student_logits)
        checks.every_sample_valid("word_mask", word_mask, "word")
    checks.backend("pixel_word", backend, student_logits)
    return descriptor_terms(networks[0], networks[1], word_mask, None, (term,), backend)[term].mean()
