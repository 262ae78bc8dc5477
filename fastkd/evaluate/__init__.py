"""Evaluation: metrics, named protocols, `evaluate`, paired comparison, and predicted masks of images.

Needs the ``[ris]`` extra; names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.evaluate.bootstrap import PairedDifference, paired_bootstrap
    from fastkd.evaluate.comparison import Comparison, compare
    from fastkd.evaluate.evaluation import evaluate
    from fastkd.evaluate.metrics import RISMetrics
    from fastkd.evaluate.prediction import Prediction, predict, predict_batches, tokenizer_of
    from fastkd.evaluate.protocols import PROTOCOLS, Protocol
    from fastkd.evaluate.result import EvalResult
    from fastkd.evaluate.samples import SampleScores, read_samples, write_samples

__all__ = [
    "PROTOCOLS",
    "Comparison",
    "EvalResult",
    "PairedDifference",
    "Prediction",
    "Protocol",
    "RISMetrics",
    "SampleScores",
    "compare",
    "evaluate",
    "paired_bootstrap",
    "predict",
    "predict_batches",
    "read_samples",
    "tokenizer_of",
    "write_samples",
]

__getattr__ = lazy_names(
    __name__,
    {
        "PROTOCOLS": "fastkd.evaluate.protocols",
        "Comparison": "fastkd.evaluate.comparison",
        "EvalResult": "fastkd.evaluate.result",
        "PairedDifference": "fastkd.evaluate.bootstrap",
        "Prediction": "fastkd.evaluate.prediction",
        "Protocol": "fastkd.evaluate.protocols",
        "RISMetrics": "fastkd.evaluate.metrics",
        "SampleScores": "fastkd.evaluate.samples",
        "compare": "fastkd.evaluate.comparison",
        "evaluate": "fastkd.evaluate.evaluation",
        "paired_bootstrap": "fastkd.evaluate.bootstrap",
        "predict": "fastkd.evaluate.prediction",
        "predict_batches": "fastkd.evaluate.prediction",
        "read_samples": "fastkd.evaluate.samples",
        "tokenizer_of": "fastkd.evaluate.prediction",
        "write_samples": "fastkd.evaluate.samples",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
