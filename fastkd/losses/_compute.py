"""The operators as the losses call them: computed by the plain formula where a temperature's gradient is asked for.

The kernels take the temperature as a number, so that a gradient with respect to it would end there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd.errors import BackendUnavailable
from fastkd.ops.pixel_word import pixel_word as _pixel_word
from fastkd.ops.pixel_word import pixel_word_from_logits as _pixel_word_from_logits
from fastkd.ops.pixel_word.reference import pixel_word as _pixel_word_formula
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as _pixel_word_from_logits_formula
from fastkd.ops.relation import relation as _relation
from fastkd.ops.relation.reference import relation as _relation_formula
from fastkd.ops.softmax_kl import softmax_kl as _softmax_kl
from fastkd.ops.softmax_kl.reference import softmax_kl as _softmax_kl_formula
from fastkd.ops.torch_state import savable, transformed


def learned(backend: str, *temperatures: float | Tensor) -> bool:
    """Return whether a temperature's gradient is asked for, which the plain formula alone has.

    Raises:
        BackendUnavailable: a backend of kernels was requested by name.
    """
    if not any(isinstance(t, Tensor) and (t.requires_grad or transformed(t)) for t in temperatures):
        return False
    if backend not in ("auto", "reference"):
        raise BackendUnavailable(
            f"backend={backend!r}: the kernels have no gradient with respect to the temperature; pass "
            "temperature.detach(), or use backend='auto' or 'reference'"
        )
    return True


def softmax_kl(student: Tensor, teacher: Tensor, *, temperature: float | Tensor, formula: bool, backend: str) -> Tensor:
    """:func:`fastkd.ops.softmax_kl.softmax_kl`, or its plain formula."""
    if formula:
        student, teacher = savable(student, teacher)
        return _softmax_kl_formula(student, teacher, temperature)
    return _softmax_kl(student, teacher, temperature=temperature, backend=backend)


def relation(student: Tensor, teacher: Tensor, *, keep: bool = False, backend: str, **options: Any) -> Tensor:
    """:func:`fastkd.ops.relation.relation`, or its plain formula."""
    if learned(backend, options["temperature"]):
        return _relation_formula(*savable(student, teacher), **options)
    return _relation(student, teacher, keep=keep, backend=backend, **options)


def pixel_word(*features: Tensor, backend: str, **options: Any) -> dict[str, Tensor]:
    """:func:`fastkd.ops.pixel_word.pixel_word`, or its plain formula."""
    if learned(backend, options["temperature"]):
        return _pixel_word_formula(*savable(*features), **options)
    return _pixel_word(*features, backend=backend, **options)


def pixel_word_from_logits(student: Tensor, teacher: Tensor, *, backend: str, **options: Any) -> dict[str, Tensor]:
    """:func:`fastkd.ops.pixel_word.pixel_word_from_logits`, or its plain formula."""
    if learned(backend, options["temperature"]):
        return _pixel_word_from_logits_formula(*savable(student, teacher), **options)
    return _pixel_word_from_logits(student, teacher, backend=backend, **options)
