"""Draw scenes of ShapesRef, one for each kind of sentence, with the shape that the sentence refers to.

python -m benchmarks.shapesref_figure --write docs/shapesref.png
"""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.data.shapes.language import Expression
from fastkd.data.shapesref import KIND_SHARES
from fastkd.data.shapesref.generate import SHAPESREF, draw
from fastkd.report.overlays import overlay

SIZE = 64


def examples(seed: int) -> list[tuple[np.ndarray, np.ndarray, Expression]]:
    """Return an image, the mask and the sentence of the first scene with each kind of sentence."""
    found = []
    index = 0
    for kind in KIND_SHARES:
        while True:
            scene, expressions = draw(index, seed)
            chosen = [one for one in expressions if one.kind == kind]
            index += 1
            if chosen:
                image, labels, _ = SHAPESREF.image(scene, SIZE, index - 1, seed)
                found.append((image, labels == chosen[0].target + 1, chosen[0]))
                break
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the set")
    options = parser.parse_args(arguments)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = 4, 4
    figure = Figure(figsize=(8.8, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (image, mask, expression) in enumerate(examples(options.seed)):
        row, column = divmod(place, columns)
        plain, marked = axes[2 * row, column], axes[2 * row + 1, column]
        plain.imshow(image, interpolation="nearest")
        plain.set_title(f"{expression.kind}:\n" + textwrap.fill(expression.text, 28), fontsize=8)
        marked.imshow(overlay(image, mask, longest=4 * SIZE))
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=72)
    Image.open(drawn).convert("RGB").quantize(128).save(options.write, optimize=True)


if __name__ == "__main__":
    main()
