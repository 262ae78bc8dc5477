"""Line charts as inline SVG; colours are CSS variables, so that one drawing works in light, dark and print."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from fastkd.report.records import CurveSeries

COLOURS = 6  # --run-1 … --run-6 in the style sheet
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (6, 1.5, 1.4, 1.5), (2, 1.3), (10, 2))
SMOOTH_FROM = 60  # points; shorter training curves are not smoothed
MAX_POINTS = 400  # longer curves are subsampled

# matplotlib draws with these placeholders, which `_themed` replaces by CSS variables.
_PLACEHOLDERS = {"#010204": "var(--muted)", "#010205": "var(--line)"} | {
    f"#01021{i}": f"var(--run-{i})" for i in range(1, COLOURS + 1)
}
_COLOUR_OF = {css: placeholder for placeholder, css in _PLACEHOLDERS.items()}


@dataclass(frozen=True)
class Style:
    """Colour and dashes of one run in every chart."""

    css: str
    dashes: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """One chart: its heading and its SVG element, which holds a description for screen readers."""

    heading: str
    svg: str


def styles(curves: Sequence[CurveSeries]) -> dict[str, Style]:
    """Return a colour and dashes for each run; dashes distinguish runs in print and without colour vision."""
    runs = dict.fromkeys(series.run for series in curves)
    return {run: Style(f"var(--run-{i % COLOURS + 1})", DASHES[i % len(DASHES)]) for i, run in enumerate(runs)}


def charts(curves: Sequence[CurveSeries], phase: str) -> list[Chart]:
    """Return the charts of a phase: one per quantity over steps; for validation also one over seconds."""
    style = styles(curves)
    drawn = []
    for quantity in dict.fromkeys(series.quantity for series in curves if series.phase == phase):
        group = [series for series in curves if series.phase == phase and series.quantity == quantity]
        drawn.append(_chart(group, style, quantity, "steps"))
        timed = [series for series in group if series.seconds is not None]
        if phase == "validation" and timed:
            drawn.append(_chart(timed, style, quantity, "seconds"))
    return drawn


def _chart(group: list[CurveSeries], style: dict[str, Style], quantity: str, axis: str) -> Chart:
    validation = group[0].phase == "validation"
    figure, axes = _axes((4.6, 2.7) if validation else (3.1, 2.2))
    last = []
    lowest, highest = np.inf, -np.inf
    for series in group:
        x = np.asarray(series.steps if axis == "steps" else series.seconds, dtype=float)
        y = np.asarray(series.values, dtype=float)
        line: dict[str, Any] = {"color": _COLOUR_OF[style[series.run].css], "dashes": style[series.run].dashes}
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
    svg = _themed(figure, salt=f"{quantity} {axis} {group[0].phase}")
    return Chart(heading, svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))


def _axes(inches: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Not pyplot, which needs global state and would change the user's backend.
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    muted, line = _COLOUR_OF["var(--muted)"], _COLOUR_OF["var(--line)"]
    axes.xaxis.label.set_color(muted)
    axes.xaxis.label.set_fontsize(9)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=muted, pad=5)
    axes.grid(axis="y", color=line, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(line)
    axes.margins(x=0.02, y=0.08)
    axes.locator_params(axis="x", nbins=5)
    return figure, axes


def _themed(figure: Any, salt: str) -> str:
    """Return the figure as an SVG element that takes its colours and font from the page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML declaration, no DTD
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")  # implied in HTML
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg)  # scalable: only the viewBox remains
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"(?<=\d\.\d\d)\d+", "", svg)  # two decimals, in points
    for placeholder, css in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, css)
    # Ids must be unique on a page with several drawings; unused ids are dropped.
    prefix = "c" + hashlib.sha256(salt.encode()).hexdigest()[:8]
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(href=\"#|url\(#)", rf"\g<1>{prefix}-", svg)
    return re.sub(r"\s*\n\s*", " ", svg)


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
