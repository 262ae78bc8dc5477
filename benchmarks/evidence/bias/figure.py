"""Figure of the bias that each loss hands on, by what it gains, as SVG."""

from __future__ import annotations

from benchmarks.evidence.bias.measure import ALONE, BIASED, gain
from benchmarks.evidence.bias.tables import Found, comparison, points_of
from benchmarks.evidence.figure import INK, MUTED, svg_text
from benchmarks.evidence.tables import ROWS

COLOURS = {
    "pixel_relation": "#c2410c",
    "channel": "#0b5cad",
    "channel_batch": "#0e8a7d",
    "first_order": "#7c3aed",
    "cwd": "#8a6d0b",
    "logit_feature": "#1b1e23",
    "method": "#be185d",
}


def bias_figure(found: Found, resamples: int = 10_000) -> str:
    """Return a chart with a point per row and factor: gain on untouched sentences, share of the bias handed on."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for row, scale in points_of(found):
        compared = comparison(found, row, scale, with_control=True)
        gained = gain(found[BIASED, row, scale], found[BIASED, ALONE, 1.0], resamples)
        if compared is not None and gained is not None:
            shares = compared.handed_on(resamples=resamples)
            assert shares is not None
            curves.setdefault(row, []).append((gained.mean, shares.mean, shares.low, shares.high))
    for row, points in curves.items():
        colour = COLOURS.get(row, INK)
        x, y, low, high = zip(*points, strict=True)
        axes.vlines(x, low, high, color=colour, linewidth=0.9)
        axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.2, label=ROWS[row])
    axes.set_xlabel("gain in mIoU over the student alone, on sentences without a bias", fontsize=9)
    axes.set_ylabel("share of the teacher's bias, %", fontsize=9)
    axes.tick_params(labelsize=9, length=0)
    axes.grid(color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return svg_text(figure, "bias")
