"""What inputs ``pixel_word`` refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.ops.pixel_word.reference import TERMS
from fastkd.ops.torch_state import check_dense, check_temperature


def check(
    tensors: dict[str, Tensor], words: tuple[int, int], temperature: float | Tensor, terms: Sequence[str]
) -> None:
    """Raise for named inputs that do not fit each other or the options."""
    first, *_ = student, teacher = [x for name, x in tensors.items() if not name.endswith("words")]
    for name, x in tensors.items():
        check_dense(name, x)
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating tensor of 3 dimensions, got {x.dtype} {tuple(x.shape)}")
        if x.device != first.device:
            raise ValueError(f"{name}: expected on the student's device {first.device}, got {x.device}; use .to(...)")
        if torch.is_grad_enabled() and x.requires_grad and name.startswith("teacher"):
            raise ValueError(
                f"{name}: gradients flow to the student only, got a teacher that requires grad; detach() it"
            )
        if x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"{name}: no pixel, no word or no feature, got shape {tuple(x.shape)}")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student and teacher: expected the same samples and pixels (B, N), got {tuple(student.shape[:2])} and "
            f"{tuple(teacher.shape[:2])}"
        )
    if not terms or not set(terms) <= set(TERMS):
        raise ValueError(f"terms: expected some of {', '.join(TERMS)}, got {list(terms)}")
    if words[0] != words[1] and set(terms) != {"pixel_pixel"}:
        raise ValueError(f"terms: {words[0]} and {words[1]} words leave only 'pixel_pixel', got {list(terms)}")
    check_temperature(temperature)
