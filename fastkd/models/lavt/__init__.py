"""LAVT (Yang et al., CVPR 2022) for its published weights: model, checkpoints, conversion.

Implemented from the paper's formulas and a description of the checkpoints; contains no code of the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.models.lavt.config import LAVTConfig
    from fastkd.models.lavt.conversion import convert
    from fastkd.models.lavt.model import LAVT
    from fastkd.models.lavt.published import LAVTCheckpoint, read_checkpoint

__all__ = ["LAVT", "LAVTCheckpoint", "LAVTConfig", "convert", "read_checkpoint"]

__getattr__ = lazy_names(
    __name__,
    {
        "LAVT": "fastkd.models.lavt.model",
        "LAVTCheckpoint": "fastkd.models.lavt.published",
        "LAVTConfig": "fastkd.models.lavt.config",
        "convert": "fastkd.models.lavt.conversion",
        "read_checkpoint": "fastkd.models.lavt.published",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
