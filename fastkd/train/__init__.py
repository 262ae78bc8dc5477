"""Training loop, settings and result. Needs the ``[ris]`` extra.

`Distiller`, `Term` and `Taps` are re-exported from `fastkd.distill`, which needs only torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.distill import Distiller, DistillOutput, GradientReport, Taps, Term
    from fastkd.train.config import TrainConfig
    from fastkd.train.first_batch import PreflightReport
    from fastkd.train.loop import preflight, train
    from fastkd.train.result import TrainResult
    from fastkd.train.task import segmentation_loss
    from fastkd.train.teacher_cache.reader import TeacherCache
    from fastkd.train.teacher_cache.views import AugmentedViews

__all__ = [
    "AugmentedViews",
    "DistillOutput",
    "Distiller",
    "GradientReport",
    "PreflightReport",
    "Taps",
    "TeacherCache",
    "Term",
    "TrainConfig",
    "TrainResult",
    "preflight",
    "segmentation_loss",
    "train",
]

__getattr__ = lazy_names(
    __name__,
    {
        "AugmentedViews": "fastkd.train.teacher_cache.views",
        "DistillOutput": "fastkd.distill",
        "Distiller": "fastkd.distill",
        "GradientReport": "fastkd.distill",
        "PreflightReport": "fastkd.train.first_batch",
        "Taps": "fastkd.distill",
        "TeacherCache": "fastkd.train.teacher_cache.reader",
        "Term": "fastkd.distill",
        "TrainConfig": "fastkd.train.config",
        "TrainResult": "fastkd.train.result",
        "preflight": "fastkd.train.loop",
        "segmentation_loss": "fastkd.train.task",
        "train": "fastkd.train.loop",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
