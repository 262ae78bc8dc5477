"""Distillation for any model: the distiller, its terms, taps and recipes. Needs only torch.

- `Distiller` combines student, teacher, task loss and terms in one module for any training loop.
- `Term` is one distillation loss with the tensors it compares and its weight.
- `Schedule` varies the weight of a term or of the task over the steps.
- `Taps` read intermediate features of a model by module path.
- `recipe` returns named terms for pairs of `fastkd.models`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.distill.distiller import Distiller, DistillOutput
    from fastkd.distill.gradients import GradientReport
    from fastkd.distill.recipes import recipe
    from fastkd.distill.schedules import Schedule
    from fastkd.distill.taps import Taps
    from fastkd.distill.terms import Term

__all__ = ["DistillOutput", "Distiller", "GradientReport", "Schedule", "Taps", "Term", "recipe"]

__getattr__ = lazy_names(
    __name__,
    {
        "DistillOutput": "fastkd.distill.distiller",
        "Distiller": "fastkd.distill.distiller",
        "GradientReport": "fastkd.distill.gradients",
        "Schedule": "fastkd.distill.schedules",
        "Taps": "fastkd.distill.taps",
        "Term": "fastkd.distill.terms",
        "recipe": "fastkd.distill.recipes",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
