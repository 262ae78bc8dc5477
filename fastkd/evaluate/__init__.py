"""Evaluation: metrics, named protocols, and `evaluate`. Needs the ``[ris]`` extra; imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.evaluate.evaluation import EvalResult, evaluate
    from fastkd.evaluate.metrics import RISMetrics
    from fastkd.evaluate.protocols import PROTOCOLS, Protocol

_NAMES = {
    "PROTOCOLS": "protocols",
    "EvalResult": "evaluation",
    "Protocol": "protocols",
    "RISMetrics": "metrics",
    "evaluate": "evaluation",
}

__all__ = ["PROTOCOLS", "EvalResult", "Protocol", "RISMetrics", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"fastkd.evaluate.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'fastkd.evaluate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
