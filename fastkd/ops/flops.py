"""FLOP formulas of operators, which ``torch.utils.flop_counter`` counts by.

A multiplication with its addition counts as two, in matrix products alone, each of which counts in full: the halves of
symmetric matrices, exponentials and sums are not taken into account, as in torch's own formulas. Operators are counted
by what their form computes: a backward without stored matrices counts them again.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def count_by(packet: Any, formula: Callable[..., int]) -> None:
    """Have torch count ``packet`` by ``formula``, a function of the operator's arguments with shapes for tensors.

    torch's module takes half a second to import, with all of Triton: where it is not there yet, that is left to its
    first import.
    """

    def enter(module: ModuleType) -> None:
        module.register_flop_formula(packet)(formula)

    if COUNTER in sys.modules:
        enter(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported(enter))


class _WhenImported(MetaPathFinder):
    """Calls ``action`` once with torch's module, when that has been imported."""

    def __init__(self, action: Callable[[ModuleType], None]) -> None:
        self._action = action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find the module as the other finders do, and have ``action`` follow its execution."""
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self._action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def softmax_kl(*_: Any) -> int:
    """No products."""
    return 0


def _relation_pairs(student: Shape, cross: bool) -> int:
    batch, rows = student[:2]
    return (batch * rows) ** 2 if cross else batch * rows**2


def relation_forward(
    student: Shape,
    teacher: Shape,
    similarity: str,
    distance: str,
    temperature: object,
    negate: bool,
    cross: bool,
    form: str,
    backend: str,
) -> int:
    """X Xᵀ of both networks; of the form "gram" ZᵀZ and W G (``csrc/common/relation.h``)."""
    both = student[2] + teacher[2]
    if form == "gram":
        return 2 * 2 * student[0] * student[1] * both**2
    return 2 * _relation_pairs(student, cross) * both


def relation_backward(
    grad_loss: Shape, student: Shape, teacher: Shape, statistics: Shape, stored: Shape, *options: Any
) -> int:
    """H X_S, and X Xᵀ of both networks if they were not stored; of the form "gram" the student's columns of W G.

    In that form a gradient that differs between rows takes three times as many, which shapes do not tell.
    """
    *_, cross, form, _ = options
    if form == "gram":
        return 2 * student[0] * student[1] * student[2] * (student[2] + teacher[2])
    again = relation_forward(student, teacher, *options) if form == "streamed" else 0
    return again + 2 * _relation_pairs(student, cross) * student[2]


_PIXEL_PIXEL, _WORD_WORD = 4, 8  # of terms


def pixel_word_forward(
    student_pixels: Shape,
    student_words: Shape | None,
    teacher_pixels: Shape,
    teacher_words: Shape | None,
    student_mask: Shape | None,
    teacher_mask: Shape | None,
    pixel_mask: Shape | None,
    cosine: bool,
    temperature: object,
    terms: int,
    keep: bool,
    backend: str,
) -> int:
    """Both networks' logits V Lᵀ, unless they are given, and of the second order AᵀA, DᵀA and DᵀD."""
    pixels = student_pixels[0] * student_pixels[1]
    total = 0
    if student_words is None or teacher_words is None:
        words = max(student_pixels[2], teacher_pixels[2])
    else:
        words = max(student_words[1], teacher_words[1])
        total += 2 * pixels * (student_words[1] * student_pixels[2] + teacher_words[1] * teacher_pixels[2])
    return total + (3 * 2 * pixels * words**2 if terms & (_PIXEL_PIXEL | _WORD_WORD) else 0)


def pixel_word_backward(
    grad_loss: Shape,
    student_pixels: Shape,
    student_words: Shape | None,
    teacher_logits: Shape | None,
    student_mask: Shape | None,
    teacher_mask: Shape | None,
    pixel_mask: Shape | None,
    logits: Shape,
    norms: Shape,
    columns: Shape,
    grams: Shape,
    teacher_width: int,
    cosine: bool,
    temperature: object,
    terms: int,
    for_pixels: bool,
    for_words: bool,
    backend: str,
) -> int:
    """A X and, of "pixel_pixel", D Z; dM L and dMᵀ V as far as they are needed."""
    pixels, total = student_pixels[0] * student_pixels[1], 0
    if terms & (_PIXEL_PIXEL | _WORD_WORD):
        total += (2 if terms & _PIXEL_PIXEL else 1) * 2 * pixels * grams[-1] ** 2
    if student_words is not None:
        total += (for_pixels + for_words) * 2 * pixels * student_words[1] * student_pixels[2]
    return total
