"""Scores of single samples: intervals, histogram of IoU, P@X."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from fastkd.report import text
from fastkd.report.svg import COLOUR_OF, Chart, Style, axes_of, chart_of

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
_BINS = 10

Interval = tuple[float, float, float]
"""Mean, lower and upper end."""


@dataclass(frozen=True, eq=False)
class SampleIoU:
    """IoU of every sample under one model, and intervals of their mean.

    Args:
        name: name of the model, as in the results table.
        ious: (N,) IoU in percent; the samples of several seeds one after another.
        interval: mean IoU with the ends of its confidence interval, or None.
        gain: the same of the difference from a baseline, or None.
        baseline: name of that baseline.
        precision: P@0.5 to P@0.9 in percent, of a protocol that does not count all samples with an IoU of at least X;
            None counts those.

    Raises:
        ValueError: no IoU, or one that is not a percentage; an interval whose ends are not in order.
    """

    name: str
    ious: Any
    interval: Interval | None = None
    gain: Interval | None = None
    baseline: str = ""
    precision: Sequence[float] | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.ious, dtype=np.float64)
        if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 100)).all():
            raise ValueError(
                f"SampleIoU {self.name!r}: ious must be (N,) percentages, N >= 1, got {values.shape} from "
                f"{values.min(initial=np.inf):.3g} to {values.max(initial=-np.inf):.3g}"
            )
        if self.precision is not None and len(self.precision) != len(THRESHOLDS):
            raise ValueError(f"SampleIoU {self.name!r}: precision must have a value for each of P@0.5 to P@0.9")
        for field in ("interval", "gain"):
            given = getattr(self, field)
            if given is not None and not given[1] <= given[2]:
                raise ValueError(f"SampleIoU {self.name!r}: {field} must be (mean, low, high), got {given!r}")


def score_charts(scores: Sequence[SampleIoU], style: Mapping[str, Style]) -> list[Chart]:
    """Return the charts of intervals, of the histogram of IoU and of P@X."""
    charts = [_histogram(scores, style), _precision(scores, style)]
    return [_intervals(scores, style), *charts] if any(score.interval for score in scores) else charts


def interval_table(scores: Sequence[SampleIoU]) -> str:
    """Return the intervals as an HTML table; empty without any."""
    lines = []
    for score in scores:
        if score.interval is not None:
            gain = "–" if score.gain is None else _interval(score.gain, sign=True)
            against = f'<span class="note">over {escape(score.baseline)}</span>' if score.gain is not None else ""
            cells = f"<td>{_interval(score.interval)}</td><td>{gain}{against}</td><td>{len(score.ious):,}</td>"
            lines.append(f'<tr><th scope="row">{escape(score.name)}</th>{cells}</tr>\n')
    if not lines:
        return ""
    names = ("Model", "mIoU [interval]", "Gain [interval]", "Samples")
    header = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Intervals">\n'
        f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>"
    )


def _interval(values: Interval, sign: bool = False) -> str:
    mean, low, high = (text.signed(value) if sign else text.number(value) for value in values)
    return f'{mean} <span class="spread">[{low}, {high}]</span>'


def _intervals(scores: Sequence[SampleIoU], style: Mapping[str, Style]) -> Chart:
    shown = [score for score in scores if score.interval is not None]
    figure, axes = axes_of((3.4, max(2.3, 0.9 + 0.3 * len(shown))))
    described = []
    for row, score in enumerate(reversed(shown)):
        assert score.interval is not None
        mean, low, high = score.interval
        colour = COLOUR_OF[style[score.name].css]
        axes.plot([low, high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([low, high], [row, row], " ", marker="|", color=colour, markersize=8, markeredgewidth=1.6)
        axes.plot([mean], [row], "o", color=colour, markersize=5.5, markeredgewidth=0)
        described.append(f"{score.name} {mean:.1f}, {low:.1f} to {high:.1f}")
    labels = axes.set_yticks(range(len(shown)), [score.name for score in reversed(shown)])
    for tick in labels:
        tick.label1.set_parse_math(False)  # a name may hold a dollar sign
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="x", color=COLOUR_OF["var(--line)"], linewidth=0.8)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("mIoU (%)")
    description = f"Mean IoU and its interval: {'; '.join(reversed(described))}."
    return chart_of(figure, "mIoU with intervals", description, salt="score intervals")


def _histogram(scores: Sequence[SampleIoU], style: Mapping[str, Style]) -> Chart:
    figure, axes = axes_of((3.4, 2.3))
    edges = np.linspace(0, 100, _BINS + 1)
    described = []
    for score in scores:
        counts, _ = np.histogram(np.asarray(score.ious, np.float64), edges)
        shares = 100 * counts / counts.sum()
        colour, dashes = COLOUR_OF[style[score.name].css], style[score.name].dashes
        axes.stairs(shares, edges, color=colour, linewidth=1.7, linestyle=(0, dashes) if dashes else "-")
        low, high = (f"{share:.0f} %" for share in (shares[0], shares[-1]))
        described.append(f"{score.name} has {low} below {edges[1]:.0f} and {high} from {edges[-2]:.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("IoU (%)")
    axes.set_ylabel("samples (%)", color=COLOUR_OF["var(--muted)"], fontsize=9)
    return chart_of(figure, "Samples by IoU", f"Histogram of IoU: {'; '.join(described)}.", salt="score histogram")


def _shares(score: SampleIoU) -> Sequence[float]:
    """Return P@X for each of `THRESHOLDS`."""
    if score.precision is not None:
        return score.precision
    ious = np.asarray(score.ious, np.float64)
    return [100 * float((ious >= 100 * x - 1e-9).mean()) for x in THRESHOLDS]


def _precision(scores: Sequence[SampleIoU], style: Mapping[str, Style]) -> Chart:
    figure, axes = axes_of((3.4, 2.3))
    width = 0.8 / len(scores)
    described = []
    for number, score in enumerate(scores):
        shares = _shares(score)
        places = np.arange(len(THRESHOLDS)) + (number - (len(scores) - 1) / 2) * width
        axes.bar(places, shares, width * 0.9, color=COLOUR_OF[style[score.name].css], linewidth=0)
        described.append(f"{score.name} {', '.join(f'{share:.1f}' for share in shares)}")
    axes.set_xticks(range(len(THRESHOLDS)), [f"P@{x}" for x in THRESHOLDS])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("samples (%)", color=COLOUR_OF["var(--muted)"], fontsize=9)
    return chart_of(figure, "P@X", f"Bars of P@0.5 to P@0.9: {'; '.join(described)}.", salt="score precision")
