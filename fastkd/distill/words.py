"""Teachers that read a sentence in words of their own: what they are given, and which terms are defined then.

A word-by-word comparison needs one tokenizer on both sides. With two, word j of the teacher is not word j of the
student, even where both sentences are padded to one length, so nothing in the shapes would show the mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastkd._wrappers import unwrap
from fastkd.losses import CrossModalKD, cross_modal_kd, cross_modal_kd_from_logits
from fastkd.losses.cross_modal import DEFAULT_TERMS

PREFIX = "teacher_"
_SENTENCE = ("input_ids", "words", "word_mask")  # belong together: never one of the student's beside the teacher's


def tokenised_apart(inputs: Sequence[str], batch: Mapping[str, Any]) -> bool:
    """Whether the batch holds the sentence a second time, for the teacher."""
    return any(key in inputs and PREFIX + key in batch for key in _SENTENCE)


def teacher_inputs(teacher: nn.Module, inputs: Sequence[str], batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of the batch goes into the teacher: ``teacher_key`` in place of ``key`` where the batch has it.

    Raises:
        ValueError: the teacher reads words of its own tokenizer, and the batch has only the student's.
    """
    apart = tokenised_apart(inputs, batch)
    if not apart and _has_own_words(teacher):
        raise ValueError(
            f"teacher {type(unwrap(teacher)).__name__} reads token ids of its own tokenizer, but the batch has no "
            "'teacher_input_ids': make them with ReferDataset(..., teacher_tokenizer=...); or, if the student has the "
            "same tokenizer, set teacher.has_own_tokenizer = False"
        )
    mine = {key: batch[PREFIX + key] for key in inputs if PREFIX + key in batch}
    shared = [key for key in inputs if key in batch and key not in mine and not (apart and key in _SENTENCE)]
    return {key: mine[key] if key in mine else batch[key] for key in inputs if key in mine or key in shared}


def _has_own_words(teacher: nn.Module) -> bool:
    """Return what the teacher states, or else whether a module inside of it reads words of its own."""
    teacher = unwrap(teacher)
    own = getattr(teacher, "has_own_tokenizer", None)
    return (
        bool(own) if own is not None else any(getattr(m, "has_own_tokenizer", False) is True for m in teacher.modules())
    )


def check_term(name: str, loss: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a cross-modal term that compares words one by one, or masks the teacher's by the student's.

    Raises:
        ValueError: one of the two.
    """
    options: dict[str, Any] = dict(kwargs)
    while isinstance(loss, functools.partial):
        options = {**loss.keywords, **options}
        loss = loss.func
    if isinstance(loss, CrossModalKD):
        options["terms"] = loss.terms
    elif loss not in (cross_modal_kd, cross_modal_kd_from_logits):
        return
    terms = options.get("terms")
    others = [term for term in (DEFAULT_TERMS if terms is None else terms) if term != "pixel_pixel"]
    pair = 'word_mask=("student.word_mask", "teacher.word_mask")'
    if others:
        raise ValueError(
            f"term {name!r}: teacher and student are tokenised differently (the batch has words for each), so word j "
            f"of one is not word j of the other, and {', '.join(map(repr, others))} would compare them: only "
            f"'pixel_pixel' is defined then. Pass terms={{'pixel_pixel': 1.0}} and {pair}, as the recipe 'pixel_pixel' "
            "does; or compare no words, as the recipe 'mask' does"
        )
    mask = options.get("word_mask")
    if mask is not None and not isinstance(mask, tuple | list):
        raise ValueError(
            f"term {name!r}: teacher and student are tokenised differently, so one word_mask ({mask!r:.60}) does not "
            f"fit both: pass a pair, {pair}"
        )
