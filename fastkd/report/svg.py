"""Charts as inline SVG; colours are CSS variables, so that one drawing works in light, dark and print."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

COLOURS = 6  # --run-1 … --run-6 in the style sheet
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (6, 1.5, 1.4, 1.5), (2, 1.3), (10, 2))

# matplotlib draws with these placeholders, which `_themed` replaces by CSS variables.
_PLACEHOLDERS = {"#010204": "var(--muted)", "#010205": "var(--line)"} | {
    f"#01021{i}": f"var(--run-{i})" for i in range(1, COLOURS + 1)
}
COLOUR_OF = {css: placeholder for placeholder, css in _PLACEHOLDERS.items()}


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


def styles(runs: Iterable[str]) -> dict[str, Style]:
    """Return a colour and dashes for each run; dashes distinguish runs in print and without colour vision."""
    runs = dict.fromkeys(runs)
    return {run: Style(f"var(--run-{i % COLOURS + 1})", DASHES[i % len(DASHES)]) for i, run in enumerate(runs)}


def chart_of(figure: Any, heading: str, description: str, salt: str) -> Chart:
    """Return a figure as a chart; ``salt`` distinguishes its ids from those of other charts."""
    svg = _themed(figure, salt)
    return Chart(heading, svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))


def axes_of(inches: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure of this size and its axes, in the page's style."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Not pyplot, which needs global state and would change the user's backend.
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    muted, line = COLOUR_OF["var(--muted)"], COLOUR_OF["var(--line)"]
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
