"""Result of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.evaluate.result import EvalResult


@dataclass
class TrainResult:
    """Result of a training run.

    Attributes:
        steps: optimiser steps taken.
        seconds: wall-clock seconds of training, loading included; checks, evaluation and checkpoints excluded.
        cpu_seconds: CPU seconds of this process during training, all threads together, without loading processes.
        eval_seconds: wall-clock seconds of evaluation.
        samples_per_second: batch_size · steps / seconds.
        stopped: the limit that ended the run, "steps" or "max_seconds".
        history: the "train" lines of the log.
        evaluations: step and result of every evaluation; those before a resumed step have no per-sample values.
        out_dir: folder of log and checkpoints, or None.
        skipped: steps without an update since a loss or gradient was not finite.
        bad_samples: index in the training set to error, of samples replaced by ``skip_bad_samples``.
        resumed_at: step of the checkpoint that the run continued from, or None.
    """

    steps: int = 0
    seconds: float = 0.0
    eval_seconds: float = 0.0
    samples_per_second: float = 0.0
    stopped: str = "steps"
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[int, EvalResult]] = field(default_factory=list)
    out_dir: Path | None = None
    skipped: int = 0
    bad_samples: dict[int, str] = field(default_factory=dict)
    resumed_at: int | None = None
    cpu_seconds: float = 0.0

    @property
    def best(self) -> EvalResult | None:
        """Return the evaluation with the best mIoU, or None."""
        return max((result for _, result in self.evaluations), key=lambda r: r.miou, default=None)

    @property
    def last(self) -> EvalResult | None:
        """Return the final evaluation, or None."""
        return self.evaluations[-1][1] if self.evaluations else None
