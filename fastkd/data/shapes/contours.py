"""Convert masks to polygons along pixel edges, which rasterise to exactly the same mask."""

from __future__ import annotations

import numpy as np


def mask_polygons(mask: np.ndarray) -> list[list[float]]:
    """Return COCO polygons ``[x0, y0, x1, y1, ...]`` that cover exactly the true pixels of ``mask`` (H, W) bool.

    Coordinates are pixel edges. Polygons do not overlap and have no holes: a mask with a hole is split through it.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return []
    top, left = int(rows[0]), int(columns[0])
    outlines, holes = _loops(mask[top : rows[-1] + 1, left : columns[-1] + 1], left, top)
    if not holes:
        return outlines
    xs = holes[0][0::2]
    cut = int(min(xs) + max(xs)) // 2
    before, after = mask.copy(), mask.copy()
    before[:, cut:] = False
    after[:, :cut] = False
    return mask_polygons(before) + mask_polygons(after)


def _loops(mask: np.ndarray, left: int, top: int) -> tuple[list[list[float]], list[list[float]]]:
    """Return closed loops along pixel edges, with true pixels on the right: outer loops and holes.

    A pixel corner (x, y) is encoded as x * stride + y, an edge as the step to the next corner.
    """
    height, width = mask.shape
    stride = height + 1
    padded = np.zeros((height + 2, width + 2), dtype=bool)
    padded[1:-1, 1:-1] = mask
    right_of = {stride: 1, 1: -stride, -stride: -1, -1: stride}
    starts: list[int] = []
    steps: list[int] = []
    for outside, corner, step in (
        (padded[:-2, 1:-1], 0, stride),  # top edges run right
        (padded[1:-1, 2:], stride, 1),  # right edges run down
        (padded[2:, 1:-1], stride + 1, -stride),  # bottom edges run left
        (padded[1:-1, :-2], 1, -1),  # left edges run up
    ):
        y, x = np.nonzero(mask & ~outside)
        starts += (x * stride + y + corner).tolist()
        steps += [step] * len(x)
    edges = dict(zip(starts, steps, strict=True))
    # Where two pixels touch only at a corner, two edges start; the dict keeps the second one.
    forks = {start: step for start, step in zip(starts, steps, strict=True) if edges[start] != step}
    outer: list[list[float]] = []
    holes: list[list[float]] = []
    while edges:
        first = at = min(edges)  # the leftmost corner: only one edge starts here
        last = 0
        corners: list[int] = []
        while not corners or at != first:
            step = edges[at]
            if at in forks:
                other, step = forks.pop(at), right_of[last]  # turn right, which separates the two pixels
                if other != step:
                    edges[at] = other
            else:
                del edges[at]
            if step != last:
                corners.append(at)
                last = step
            at += step
        xs, ys = [c // stride for c in corners], [c % stride for c in corners]
        area = sum(xs[k - 1] * ys[k] - xs[k] * ys[k - 1] for k in range(len(xs)))
        flat = [float(v) for x, y in zip(xs, ys, strict=True) for v in (x + left, y + top)]
        (outer if area > 0 else holes).append(flat)
    return outer, holes
