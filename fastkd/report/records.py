"""Content of a report: result rows, curves and examples; all validated on construction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from statistics import fmean, stdev
from typing import Any, Literal

from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD

Metric = float | Sequence[float]
"""One number, or one number per seed."""


@dataclass(frozen=True)
class ResultRow:
    """One line of the results table.

    Args:
        name: name of the model, unique in its table ("teacher", "alone", "distilled").
        parameters: number of parameters, or None if unknown.
        metrics: metric name to percentage; a sequence holds one value per seed, shown as mean ± standard deviation.
        steps: optimiser steps taken.
        train_seconds: wall-clock seconds of training.
        note: one line shown under the name.
        latency: seconds per image and sentence, or None.
        baseline: name of the row to subtract for this row's gains, or None for no gains. With one value per seed on
            both sides the gain is the mean of the paired differences, so keep the seeds in the same order.

    Example:
        >>> ResultRow("distilled", 400_000, {"oIoU": 51.0, "mIoU": [53.6, 54.5, 53.0]}, steps=600, baseline="alone")
    """

    name: str
    parameters: int | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    steps: int | None = None
    train_seconds: float | None = None
    note: str = ""
    baseline: str | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"ResultRow: name must be a non-empty string, got {self.name!r}")
        for metric, value in self.metrics.items():
            if isinstance(value, str) or not values_of(value) or not all(isinstance(v, Real) for v in values_of(value)):
                raise ValueError(
                    f"ResultRow {self.name!r}: metric {metric!r} must be a number or a non-empty sequence of numbers "
                    f"(one per seed), got {value!r}"
                )
            if is_percentage(metric) and any(v < 0 or v > 100 for v in values_of(value)):
                raise ValueError(f"ResultRow {self.name!r}: {metric} must be in percent, 0 to 100, got {value!r}")
        for name, count in (
            ("parameters", self.parameters),
            ("steps", self.steps),
            ("train_seconds", self.train_seconds),
            ("latency", self.latency),
        ):
            if count is not None and not (math.isfinite(count) and count >= 0):
                raise ValueError(f"ResultRow {self.name!r}: {name} must be a number >= 0 or None, got {count!r}")


@dataclass(frozen=True)
class CurveSeries:
    """One line of a chart: a quantity of one run over steps and, if given, over seconds.

    Args:
        run: the run's name; a run keeps its colour and dash in every chart.
        quantity: quantity drawn ("loss", "task", "cross_modal", "mIoU"); series of one quantity share a chart.
        steps: (n,) optimiser steps.
        values: (n,) values; NaN leaves a gap.
        seconds: (n,) wall-clock seconds since the run began, or None.
        phase: "train" (over steps) or "validation" (over steps, and over seconds if given).
    """

    run: str
    quantity: str
    steps: Sequence[float]
    values: Sequence[float]
    seconds: Sequence[float] | None = None
    phase: Literal["train", "validation"] = "train"

    def __post_init__(self) -> None:
        where = f"CurveSeries {self.quantity!r} of run {self.run!r}"
        if self.phase not in ("train", "validation"):
            raise ValueError(f"{where}: phase must be 'train' or 'validation', got {self.phase!r}")
        if len(self.steps) == 0:
            raise ValueError(f"{where}: steps is empty: skip a series that has no points")
        for name, other in (("values", self.values), ("seconds", self.seconds)):
            if other is not None and len(other) != len(self.steps):
                raise ValueError(
                    f"{where}: {name} has {len(other)} points, but steps has {len(self.steps)}: pass the same number"
                )


@dataclass(frozen=True, eq=False)
class Example:
    """One sentence on one image, with the true mask and each model's prediction.

    Args:
        image: (H, W, 3) uint8, or float in [0, 1] as (H, W, 3) or (3, H, W): array, tensor or PIL image.
        truth: (H, W) mask, bool or 0/1.
        predictions: model name to (H, W) mask, in the order of the columns.
        sentence: the referring expression.
        ious: model name to IoU in percent; computed from the masks if omitted.
        group: heading of the examples that follow each other with the same group ("best", "worst"), or "".
    """

    image: Any
    truth: Any
    predictions: Mapping[str, Any]
    sentence: str
    ious: Mapping[str, float] | None = None
    group: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.ious or {}) - set(self.predictions))
        if unknown:
            raise ValueError(
                f"Example {self.sentence!r}: ious has {unknown}, but predictions has {sorted(self.predictions)}"
            )

    @classmethod
    def from_sample(
        cls,
        sample: Mapping[str, Any],
        predictions: Mapping[str, Any],
        ious: Mapping[str, float] | None = None,
        *,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
    ) -> Example:
        """Return an example from a sample of `fastkd.data.ReferDataset`.

        ``image_mean`` and ``image_std`` are those of the dataset; they undo the normalisation of the image.

        Example:
            >>> mask = student(**batch).logits.argmax(1)[0]
            >>> Example.from_sample(dataset[0], {"student": mask})
        """
        image = sample["image"].detach().cpu().float()
        mean, deviation = (image.new_tensor(values)[:, None, None] for values in (image_mean, image_std))
        return cls((image * deviation + mean).clamp(0, 1), sample["mask"], predictions, sample["sentence"], ious)


def is_percentage(metric: str) -> bool:
    """Return whether a metric is a percentage by definition."""
    return metric in ("oIoU", "mIoU") or metric.startswith("P@")


def values_of(metric: Metric) -> list[float]:
    """Return the values of a metric, one per seed."""
    return list(metric) if isinstance(metric, Iterable) else [metric]


def summary(metric: Metric) -> tuple[float, float | None]:
    """Return the mean and the standard deviation over seeds (None for a single value)."""
    values = values_of(metric)
    return fmean(values), (stdev(values) if len(values) > 1 else None)


def gain(metric: Metric, baseline: Metric) -> tuple[float, float | None]:
    """Return the mean gain over the baseline and the standard deviation of paired differences (None without pairs)."""
    ours, theirs = values_of(metric), values_of(baseline)
    if len(ours) == len(theirs):
        return summary([a - b for a, b in zip(ours, theirs, strict=True)])
    return fmean(ours) - fmean(theirs), None


def check_rows(rows: Sequence[ResultRow]) -> list[str]:
    """Check the rows of a table together and return its metric names in order of appearance."""
    if len(rows) == 0:
        raise ValueError("rows is empty: a results table needs at least one ResultRow")
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"rows: the names {repeated} appear more than once; give each ResultRow a unique name")
    for row in rows:
        if row.baseline is not None and (row.baseline not in names or row.baseline == row.name):
            raise ValueError(
                f"rows: the baseline of {row.name!r} is {row.baseline!r}, which is not another row of {names}"
            )
    return list(dict.fromkeys(metric for row in rows for metric in row.metrics))


def baseline_of(row: ResultRow, rows: Sequence[ResultRow]) -> ResultRow | None:
    """Return the baseline of a row, or None."""
    return next((other for other in rows if other.name == row.baseline), None)
