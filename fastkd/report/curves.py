"""Line charts of training and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastkd.report.records import CurveSeries
from fastkd.report.svg import COLOUR_OF, Chart, Style, axes_of, chart_of

SMOOTH_FROM = 60  # points; shorter training curves are not smoothed
MAX_POINTS = 400  # longer curves are subsampled


def charts(curves: Sequence[CurveSeries], phase: str, style: Mapping[str, Style]) -> list[Chart]:
    """Return the charts of a phase: one per quantity over steps; for validation also one over seconds."""
    drawn = []
    for quantity in dict.fromkeys(series.quantity for series in curves if series.phase == phase):
        group = [series for series in curves if series.phase == phase and series.quantity == quantity]
        drawn.append(_chart(group, style, quantity, "steps"))
        timed = [series for series in group if series.seconds is not None]
        if phase == "validation" and timed:
            drawn.append(_chart(timed, style, quantity, "seconds"))
    return drawn


def _chart(group: list[CurveSeries], style: Mapping[str, Style], quantity: str, axis: str) -> Chart:
    validation = group[0].phase == "validation"
    figure, axes = axes_of((4.6, 2.7) if validation else (3.1, 2.2))
    last = []
    lowest, highest = np.inf, -np.inf
    for series in group:
        x = np.asarray(series.steps if axis == "steps" else series.seconds, dtype=float)
        y = np.asarray(series.values, dtype=float)
        line: dict[str, Any] = {"color": COLOUR_OF[style[series.run].css], "dashes": style[series.run].dashes}
        if not validation and len(y) >= SMOOTH_FROM:
            axes.plot(*_subsampled(x, y), color=line["color"], alpha=0.22, linewidth=0.7)
            y = _smoothed(y)
        if validation:
            line |= {"marker": "o", "markersize": 3.2, "markeredgewidth": 0}
        axes.plot(*_subsampled(x, y), linewidth=1.7, **line)
        finite = y[np.isfinite(y)]
        if len(finite):
            last.append(f"{series.run} ends at {finite[-1]:.3g}")
            lowest, highest = min(lowest, finite.min()), max(highest, finite.max())
    if lowest > 0 and highest > 30 * lowest:
        axes.set_yscale("log")
    axes.set_xlabel("steps" if axis == "steps" else "wall-clock seconds")
    heading = f"{quantity} over {axis}" if validation else quantity
    description = (
        f"Line chart of {'validation' if validation else 'training'} {quantity} over {axis}: {', '.join(last)}."
    )
    return chart_of(figure, heading, description, salt=f"{quantity} {axis} {group[0].phase}")


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Return the centred moving mean over a thirtieth of the run, truncated at both ends; NaN is skipped."""
    window = max(3, len(y) // 30) | 1
    kernel = np.ones(window)
    valid = np.isfinite(y)
    total = np.convolve(np.where(valid, y, 0.0), kernel, mode="same")
    weight = np.convolve(valid.astype(float), kernel, mode="same")
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def _subsampled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MAX_POINTS:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int))
    return x[keep], y[keep]
