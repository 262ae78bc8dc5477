"""Distillation for any model: the distiller, its terms, taps and recipes. Needs only torch.

- `Distiller` combines student, teacher, task loss and terms in one module for any training loop.
- `Term` is one distillation loss with the tensors it compares and its weight.
- `Schedule` varies the weight of a term or of the task over the steps.
- `Taps` read intermediate features of a model by module path.
- `AttentionTap` reads the queries and keys of an attention module; `tapped_attention_kd` compares two networks'.
- `recipe` returns named terms for pairs of `fastkd.models`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.distill.attention_taps import AttentionTap, TappedAttention, tapped_attention_kd
    from fastkd.distill.distiller import Distiller, DistillOutput
    from fastkd.distill.gradients import GradientReport
    from fastkd.distill.recipes import recipe
    from fastkd.distill.schedules import Schedule
    from fastkd.distill.taps import Taps
    from fastkd.distill.terms import Term

__all__ = [
    "AttentionTap",
    "DistillOutput",
    "Distiller",
    "GradientReport",
    "Schedule",
    "TappedAttention",
    "Taps",
    "Term",
    "recipe",
    "tapped_attention_kd",
]

__getattr__ = lazy_names(
    __name__,
    {
        "AttentionTap": "fastkd.distill.attention_taps",
        "DistillOutput": "fastkd.distill.distiller",
        "Distiller": "fastkd.distill.distiller",
        "GradientReport": "fastkd.distill.gradients",
        "Schedule": "fastkd.distill.schedules",
        "TappedAttention": "fastkd.distill.attention_taps",
        "Taps": "fastkd.distill.taps",
        "Term": "fastkd.distill.terms",
        "recipe": "fastkd.distill.recipes",
        "tapped_attention_kd": "fastkd.distill.attention_taps",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
