"""Masks to polygons: the exact outline along pixel edges, so that rasterising gives the mask back."""

from __future__ import annotations

import numpy as np

_RIGHT = {(1, 0): (0, 1), (0, 1): (-1, 0), (-1, 0): (0, -1), (0, -1): (1, 0)}


def mask_polygons(mask: np.ndarray) -> list[list[float]]:
    """COCO polygons ``[x0, y0, x1, y1, ...]`` that cover exactly the true pixels of ``mask`` (H, W) bool.

    Coordinates are pixel edges. Polygons don't overlap and have no holes: a part with a hole is cut in two through it.
    """
    outlines, holes = _loops(mask)
    if not holes:
        return outlines
    columns = holes[0][0::2]
    cut = int(min(columns) + max(columns)) // 2
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return mask_polygons(left) + mask_polygons(right)


def _loops(mask: np.ndarray) -> tuple[list[list[float]], list[list[float]]]:
    """Closed loops along pixel edges, true pixels on the right-hand side: the outer ones, and those around holes."""
    wide = np.pad(np.asarray(mask, dtype=bool), 1)
    inside = wide[1:-1, 1:-1]
    ways: dict[tuple[int, int], list[tuple[int, int]]] = {}  # from each corner of a pixel, the edges that start there
    for outside, start, step in (
        (wide[:-2, 1:-1], (0, 0), (1, 0)),  # top edges run right
        (wide[1:-1, 2:], (1, 0), (0, 1)),  # right edges run down
        (wide[2:, 1:-1], (1, 1), (-1, 0)),  # bottom edges run left
        (wide[1:-1, :-2], (0, 1), (0, -1)),  # left edges run up
    ):
        rows, columns = np.nonzero(inside & ~outside)
        for x, y in zip((columns + start[0]).tolist(), (rows + start[1]).tolist(), strict=True):
            ways.setdefault((x, y), []).append(step)
    outer: list[list[float]] = []
    holes: list[list[float]] = []
    while ways:
        first = min(ways)  # nothing lies further left, so exactly one edge starts here
        (x, y), step = first, (0, 0)
        corners: list[float] = []
        while not corners or (x, y) != first:
            here = ways[x, y]
            # where two pixels touch at a corner, two edges start: keep right, which separates the pixels
            follow = _RIGHT[step] if len(here) == 2 else here[0]
            here.remove(follow)
            if not here:
                del ways[x, y]
            if follow != step:
                corners += (float(x), float(y))
                step = follow
            x, y = x + step[0], y + step[1]
        (outer if _signed_area(corners) > 0 else holes).append(corners)
    return outer, holes


def _signed_area(corners: list[float]) -> float:
    xs, ys = corners[0::2], corners[1::2]
    return sum(xs[k - 1] * ys[k] - xs[k] * ys[k - 1] for k in range(len(xs))) / 2
