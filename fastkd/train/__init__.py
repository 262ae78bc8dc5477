"""Training: the distiller, taps, and a short loop.

`Distiller`, `Term` and `Taps` need torch alone and drop into any loop; `train` needs the ``[ris]`` extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.distill.checks import GradientReport
    from fastkd.distill.distiller import Distiller, DistillOutput, Term
    from fastkd.distill.taps import Taps
    from fastkd.train.config import TrainConfig
    from fastkd.train.loop import train
    from fastkd.train.result import TrainResult
    from fastkd.train.task import segmentation_loss

__all__ = [
    "DistillOutput",
    "Distiller",
    "GradientReport",
    "Taps",
    "Term",
    "TrainConfig",
    "TrainResult",
    "segmentation_loss",
    "train",
]

__getattr__ = lazy_names(
    __name__,
    {
        "DistillOutput": "fastkd.distill.distiller",
        "Distiller": "fastkd.distill.distiller",
        "GradientReport": "fastkd.distill.checks",
        "Taps": "fastkd.distill.taps",
        "Term": "fastkd.distill.distiller",
        "TrainConfig": "fastkd.train.config",
        "TrainResult": "fastkd.train.result",
        "segmentation_loss": "fastkd.train.task",
        "train": "fastkd.train.loop",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
