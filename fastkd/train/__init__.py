"""Training: the distiller, taps, and a short loop.

`Distiller`, `Term` and `Taps` need torch alone and drop into any loop; `train` needs the ``[ris]`` extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.train.checks import GradientReport
    from fastkd.train.config import TrainConfig
    from fastkd.train.distiller import Distiller, DistillOutput, Term
    from fastkd.train.loop import TrainResult, train
    from fastkd.train.taps import Taps
    from fastkd.train.task import segmentation_loss

_NAMES = {
    "DistillOutput": "distiller",
    "Distiller": "distiller",
    "GradientReport": "checks",
    "Taps": "taps",
    "Term": "distiller",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "segmentation_loss": "task",
    "train": "loop",
}

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


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"fastkd.train.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'fastkd.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
