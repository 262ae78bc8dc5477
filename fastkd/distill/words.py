"""Teachers with their own tokenizer: the inputs they receive, and the terms that such a pair can use.

Comparing word by word needs the same tokenizer on both sides. With two, word j of the teacher is not word j of the
student, and shapes do not reveal the mistake if both sentences are padded to the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastkd._wrappers import unwrap
from fastkd.distill.word_terms import compares_words
from fastkd.losses import CrossModalKD, cross_modal_kd, cross_modal_kd_from_logits
from fastkd.losses.cross_modal import DEFAULT_TERMS

PREFIX = "teacher_"
_SENTENCE = ("input_ids", "words", "word_mask")  # all three come from the same tokenizer


def is_sentence(key: str) -> bool:
    """Return whether a key of a batch holds tokens of the sentence, for the student or the teacher."""
    return key.removeprefix(PREFIX) in _SENTENCE


def has_teacher_words(inputs: Sequence[str], batch: Mapping[str, Any]) -> bool:
    """Return whether the batch holds the sentence tokenised for the teacher as well."""
    return any(key in inputs and PREFIX + key in batch for key in _SENTENCE)


def teacher_inputs(teacher: nn.Module, inputs: Sequence[str], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the teacher's inputs: ``teacher_key`` instead of ``key`` if the batch has it.

    Raises:
        ValueError: the teacher has its own tokenizer, but the batch holds only the student's tokens.
    """
    if not has_teacher_words(inputs, batch) and _has_own_tokenizer(teacher):
        raise ValueError(
            f"teacher {type(unwrap(teacher)).__name__} reads token ids of its own tokenizer, but the batch has no "
            "'teacher_input_ids': make them with ReferDataset(..., teacher_tokenizer=...); or, if the student has the "
            "same tokenizer, set teacher.has_own_tokenizer = False"
        )
    return {name: batch[key] for name, key in teacher_keys(inputs, batch).items()}


def teacher_keys(inputs: Sequence[str], batch: Mapping[str, Any]) -> dict[str, str]:
    """Return the batch's key of each of the teacher's inputs, by the name of the input."""
    words_differ = has_teacher_words(inputs, batch)
    chosen = {}
    for key in inputs:
        if PREFIX + key in batch:
            chosen[key] = PREFIX + key
        elif key in batch and not (words_differ and key in _SENTENCE):
            chosen[key] = key
    return chosen


def _has_own_tokenizer(teacher: nn.Module) -> bool:
    """Return the teacher's ``has_own_tokenizer``; if undefined, return whether any of its modules sets it to True."""
    teacher = unwrap(teacher)
    declared = getattr(teacher, "has_own_tokenizer", None)
    if declared is not None:
        return bool(declared)
    return any(getattr(module, "has_own_tokenizer", False) is True for module in teacher.modules())


def check_term(name: str, loss: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a cross-modal term that compares word by word or uses one word mask for both sides."""
    terms: Any
    if isinstance(loss, CrossModalKD):
        terms = loss.terms
    elif loss in (cross_modal_kd, cross_modal_kd_from_logits):
        terms = options.get("terms")
    elif compares_words(loss):
        terms = [getattr(loss, "__name__", "").removesuffix("_kd")]
    else:
        return
    undefined = [term for term in (DEFAULT_TERMS if terms is None else terms) if term != "pixel_pixel"]
    pair = 'word_mask=("student.word_mask", "teacher.word_mask")'
    if undefined:
        raise ValueError(
            f"term {name!r}: teacher and student are tokenised differently (the batch has words for each), so word j "
            f"of one is not word j of the other, and {', '.join(map(repr, undefined))} would compare them: only "
            f"'pixel_pixel' is defined then. Pass terms={{'pixel_pixel': 1.0}} and {pair}, as the recipe 'pixel_pixel' "
            "does; or compare no words, as the recipe 'mask' does"
        )
    mask = options.get("word_mask")
    if mask is not None and not isinstance(mask, tuple | list):
        raise ValueError(
            f"term {name!r}: teacher and student are tokenised differently, so one word_mask ({mask!r:.60}) does not "
            f"fit both: pass a pair, {pair}"
        )
