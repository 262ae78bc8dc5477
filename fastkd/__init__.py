"""fastkd: fast, exact knowledge distillation of dense vision-language models.

The public names are in ``__all__`` and are imported on first use, so ``import fastkd`` is instant and needs no GPU, no
Triton and no ``[ris]`` extra.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd import data, distill, evaluate, losses, models, report, train
    from fastkd._info import info
    from fastkd.distill import Distiller, Taps, Term
    from fastkd.errors import BackendUnavailable, FastKDWarning

try:
    __version__ = version("fastkd")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_MODULES = {"data", "distill", "evaluate", "losses", "models", "report", "train"}
_NAMES = {
    "BackendUnavailable": "fastkd.errors",
    "Distiller": "fastkd.distill",
    "FastKDWarning": "fastkd.errors",
    "Taps": "fastkd.distill",
    "Term": "fastkd.distill",
    "info": "fastkd._info",
}

__all__ = [
    "BackendUnavailable",
    "Distiller",
    "FastKDWarning",
    "Taps",
    "Term",
    "__version__",
    "data",
    "distill",
    "evaluate",
    "info",
    "losses",
    "models",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastkd.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
