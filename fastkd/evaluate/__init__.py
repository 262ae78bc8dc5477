"""Evaluation: metrics, named protocols, `evaluate`, and `predict` for one image.

Needs the ``[ris]`` extra; names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.evaluate.evaluation import EvalResult, evaluate
    from fastkd.evaluate.metrics import RISMetrics
    from fastkd.evaluate.prediction import Prediction, predict, tokenizer_of
    from fastkd.evaluate.protocols import PROTOCOLS, Protocol

__all__ = [
    "PROTOCOLS",
    "EvalResult",
    "Prediction",
    "Protocol",
    "RISMetrics",
    "evaluate",
    "predict",
    "tokenizer_of",
]

__getattr__ = lazy_names(
    __name__,
    {
        "PROTOCOLS": "fastkd.evaluate.protocols",
        "EvalResult": "fastkd.evaluate.evaluation",
        "Prediction": "fastkd.evaluate.prediction",
        "Protocol": "fastkd.evaluate.protocols",
        "RISMetrics": "fastkd.evaluate.metrics",
        "evaluate": "fastkd.evaluate.evaluation",
        "predict": "fastkd.evaluate.prediction",
        "tokenizer_of": "fastkd.evaluate.prediction",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
