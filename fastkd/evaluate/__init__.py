"""Evaluation: metrics, named protocols, `evaluate`, paired comparison, and predicted masks of images.

Needs the ``[ris]`` extra; names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.evaluate.bootstrap import PairedDifference, paired_bootstrap
    from fastkd.evaluate.evaluation import EvalResult, evaluate
    from fastkd.evaluate.metrics import RISMetrics
    from fastkd.evaluate.prediction import Prediction, predict, predict_batches, tokenizer_of
    from fastkd.evaluate.protocols import PROTOCOLS, Protocol

__all__ = [
    "PROTOCOLS",
    "EvalResult",
    "PairedDifference",
    "Prediction",
    "Protocol",
    "RISMetrics",
    "evaluate",
    "paired_bootstrap",
    "predict",
    "predict_batches",
    "tokenizer_of",
]

__getattr__ = lazy_names(
    __name__,
    {
        "PROTOCOLS": "fastkd.evaluate.protocols",
        "EvalResult": "fastkd.evaluate.evaluation",
        "PairedDifference": "fastkd.evaluate.bootstrap",
        "Prediction": "fastkd.evaluate.prediction",
        "Protocol": "fastkd.evaluate.protocols",
        "RISMetrics": "fastkd.evaluate.metrics",
        "evaluate": "fastkd.evaluate.evaluation",
        "paired_bootstrap": "fastkd.evaluate.bootstrap",
        "predict": "fastkd.evaluate.prediction",
        "predict_batches": "fastkd.evaluate.prediction",
        "tokenizer_of": "fastkd.evaluate.prediction",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
