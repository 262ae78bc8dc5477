"""Scenes: shapes, their positions and their visibility.

All lengths are in units of the image side, so a scene does not depend on the image size; x points right and y down.
Shapes are listed from back to front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {
    "red": (208, 38, 38),
    "green": (42, 160, 58),
    "blue": (44, 76, 214),
    "yellow": (232, 212, 48),
    "purple": (138, 52, 168),
    "orange": (240, 132, 28),
    "cyan": (58, 196, 206),
}
TEXTURES = {"plain": 0.5, "striped": 0.25, "dotted": 0.25}
# side = sqrt(area of the outline); gaps between the classes make "small" and "big" unambiguous
SIZES = {"small": (0.145, 0.17), "medium": (0.205, 0.235), "large": (0.28, 0.33)}
SIZE_SHARES = {"small": 0.35, "medium": 0.4, "large": 0.25}

MIN_VISIBLE_SHARE = 0.4
MIN_VISIBLE_AREA = 0.009  # 36 pixels of a 64 x 64 image
GRID = 128  # visibility, centroids and overlaps are measured on this grid for every image size
_BORDER = 0.015


@dataclass(frozen=True, slots=True)
class Style:
    """Distribution of scenes; each range includes both ends.

    Args:
        count: Number of shapes.
        crowded: Number of shapes in a crowded scene.
        kinds: Number of kinds that a scene uses.
        colours: Number of colours that a scene uses.
        sizes: Range of the side, by size word.
        near: Share of shapes drawn close to another one, so that occlusion is frequent.
        min_area: Smallest visible area of a shape (the image is 1).
    """

    count: tuple[int, int] = (3, 8)
    crowded: tuple[int, int] = (6, 8)
    kinds: tuple[int, int] = (2, 4)
    colours: tuple[int, int] = (2, 4)
    sizes: Mapping[str, tuple[float, float]] = field(default_factory=lambda: SIZES)
    near: float = 0.35
    min_area: float = MIN_VISIBLE_AREA


STYLE = Style()


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape: attributes, position, side (square root of the area) and rotation (radians)."""

    kind: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    side: float
    angle: float

    def outline(self) -> np.ndarray:
        """Return the corners, (n, 2) float64, in units of the image side."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        rotation = np.array([[cos, sin], [-sin, cos]])
        return unit_outline(self.kind) @ rotation * self.side + (self.x, self.y)


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes from back to front and their visibility, measured on a fixed grid.

    Attributes:
        shapes: The shapes, from back to front.
        centre: Centroid of the visible part of each shape.
        area: Area of the visible part (the image is 1).
        visible: Visible share of each shape.
        overlap: ``overlap[i][j]`` is the overlap of shapes i and j, relative to the smaller one, if j is in front of i;
            otherwise 0.
        behind: ``behind[i][j]`` is the part of the overlap where j is visible, not hidden by a third shape.
    """

    shapes: tuple[Shape, ...]
    centre: tuple[tuple[float, float], ...] = field(repr=False)
    area: tuple[float, ...] = field(repr=False)
    visible: tuple[float, ...] = field(repr=False)
    overlap: tuple[tuple[float, ...], ...] = field(repr=False)
    behind: tuple[tuple[float, ...], ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.shapes)


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    corners = []
    for k in range(2 * points):
        radius = inner if k % 2 else 1.0
        corners.append((radius * math.sin(math.pi * k / points), -radius * math.cos(math.pi * k / points)))
    return corners


@cache
def unit_outline(kind: str) -> np.ndarray:
    """Return the outline of ``kind`` with area 1 and its centroid at the origin."""
    arm = 0.36
    corners = {
        "circle": [(math.cos(2 * math.pi * k / 40), math.sin(2 * math.pi * k / 40)) for k in range(40)],
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1.05), (1, 0.75), (-1, 0.75)],
        "diamond": [(0, -1.3), (0.95, 0), (0, 1.3), (-0.95, 0)],
        "star": _star(5, 0.45),
        "cross": [
            *[(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)],
            *[(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)],
        ],
    }[kind]
    xy = np.array(corners, dtype=np.float64)
    x, y = xy[:, 0], xy[:, 1]
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = cross.sum() / 2
    centroid = ((xy + np.roll(xy, -1, axis=0)) * cross[:, None]).sum(axis=0) / (6 * area)
    return (xy - centroid) / math.sqrt(abs(area))


def _raster(shape: Shape) -> np.ndarray:
    """Return the mask of a shape on the grid, (GRID, GRID) bool."""
    image = Image.new("L", (GRID, GRID))
    # A grid cell is set if its centre is inside; Pillow's integer coordinates are pixel centres.
    corners = (shape.outline() * GRID - 0.5).ravel().tolist()
    ImageDraw.Draw(image).polygon(corners, fill=1)
    return np.asarray(image, dtype=bool)


def _pick(rng: Random, shares: dict[str, float]) -> str:
    return rng.choices(tuple(shares), tuple(shares.values()))[0]


def _draw_shape(
    rng: Random, kinds: list[str], colours: list[str], placed: list[Shape], style: Style, crowded: bool
) -> Shape:
    kind, size = rng.choice(kinds), _pick(rng, SIZE_SHARES)
    if crowded and size == "large" and rng.random() < 0.5:
        size = "medium"
    side = rng.uniform(*style.sizes[size])
    angle = rng.uniform(-0.2, 0.2)
    corners = unit_outline(kind)
    reach = float(np.hypot(corners[:, 0], corners[:, 1]).max()) * side * (1.0 if kind != "square" else 0.85) + _BORDER
    if placed and rng.random() < style.near:
        near = rng.choice(placed)
        direction, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.35, 0.6) * (near.side + side)
        x, y = near.x + distance * math.cos(direction), near.y + distance * math.sin(direction)
        x, y = min(max(x, reach), 1 - reach), min(max(y, reach), 1 - reach)
    else:
        x, y = rng.uniform(reach, 1 - reach), rng.uniform(reach, 1 - reach)
    return Shape(kind, rng.choice(colours), _pick(rng, TEXTURES), size, x, y, side, angle)


def draw_scene(rng: Random, *, crowded: bool = False, style: Style = STYLE) -> Scene:
    """Return a random scene of sufficiently visible shapes: 3 to 8, or 6 to 8 if ``crowded``, in the default style.

    Each scene uses a few kinds and colours, so that most scenes have several shapes of one kind or colour.
    """
    fewest, most = style.crowded if crowded else style.count
    while True:
        count = rng.randint(fewest, most)
        kinds = rng.sample(KINDS, rng.randint(*style.kinds))
        colours = rng.sample(tuple(COLOURS), rng.randint(*style.colours))
        shapes: list[Shape] = []
        seen: list[np.ndarray] = []  # visible part of each shape so far
        full: list[np.ndarray] = []  # each shape without occlusion
        for _ in range(6 * count):
            if len(shapes) == count:
                break
            shape = _draw_shape(rng, kinds, colours, shapes, style, crowded)
            mask = _raster(shape)
            left = [part & ~mask for part in seen]
            needed = (max(MIN_VISIBLE_SHARE * np.count_nonzero(m), style.min_area * GRID * GRID) for m in full)
            if all(np.count_nonzero(part) >= least for part, least in zip(left, needed, strict=True)):
                shapes.append(shape)
                seen = [*left, mask]
                full.append(mask)
        if len(shapes) >= fewest:
            return _measure(shapes, seen, full)


def _measure(shapes: list[Shape], seen: list[np.ndarray], full: list[np.ndarray]) -> Scene:
    """Return the scene of shapes with visible parts ``seen`` and unoccluded masks ``full``, on the grid."""
    at = (np.arange(GRID) + 0.5) / GRID
    counts = [int(np.count_nonzero(part)) for part in seen]
    totals = [int(np.count_nonzero(mask)) for mask in full]
    centre = tuple(
        (float(part.sum(axis=0) @ at) / n, float(part.sum(axis=1) @ at) / n)
        for part, n in zip(seen, counts, strict=True)
    )
    count = len(shapes)
    overlap = [[0.0] * count for _ in range(count)]
    behind = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            both = full[i] & full[j]
            if both.any():
                smaller = min(totals[i], totals[j])
                overlap[i][j] = int(np.count_nonzero(both)) / smaller
                behind[i][j] = int(np.count_nonzero(both & seen[j])) / smaller
    return Scene(
        shapes=tuple(shapes),
        centre=centre,
        area=tuple(n / GRID**2 for n in counts),
        visible=tuple(n / t for n, t in zip(counts, totals, strict=True)),
        overlap=tuple(map(tuple, overlap)),
        behind=tuple(map(tuple, behind)),
    )
