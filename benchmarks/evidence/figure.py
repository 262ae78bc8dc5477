"""Figure of the gains of all rows, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.tables import ALONE, PLAIN, ROWS, Sample, gain

INK, MUTED, ACCENT = "#1b1e23", "#6b7280", "#0b5cad"


def gains_figure(rows: Mapping[str, Sample], splits: Sequence[str], resamples: int = 10_000) -> str:
    """Return a chart of each row's gain in mIoU over the student alone, with its interval."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    gains = {name: gain(sample, rows[ALONE], splits, resamples) for name, sample in rows.items() if name != ALONE}
    shown = {name: one for name, one in reversed(gains.items()) if one is not None}
    figure = Figure(figsize=(7.2, 0.8 + 0.27 * len(shown)), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.axvline(0, color=MUTED, linewidth=0.8)
    if PLAIN in shown:
        axes.axvline(shown[PLAIN].mean, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for place, (name, one) in enumerate(shown.items()):
        colour = ACCENT if name.startswith("method") else INK
        axes.plot([one.low, one.high], [place, place], color=colour, linewidth=1.4, solid_capstyle="butt")
        axes.plot([one.mean], [place], "o", color=colour, markersize=4.5)
    axes.set_yticks(range(len(shown)), [ROWS.get(name, name) for name in shown])
    axes.set_xlabel("gain in mIoU over the student alone, with 95 % interval", fontsize=9)
    axes.tick_params(labelsize=9, length=0)
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return svg_text(figure, "gains")


def svg_text(figure: Any, salt: str) -> str:
    """Return a figure of matplotlib as SVG that is the same in every run; ``salt`` seeds the ids of its parts."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
