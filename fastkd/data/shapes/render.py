"""Render scenes: an antialiased image, and the shape that each pixel belongs to."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from fastkd.data.shapes.scene import COLOURS, Scene, Shape

SUPERSAMPLE = 4
Colour = tuple[int, int, int]


def render(scene: Scene, size: int, rng: Random) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``scene`` at ``size`` x ``size``; ``rng`` affects only background, tints and noise.

    Returns:
        The image, (size, size, 3) uint8, and the labels, (size, size) uint8: 0 for the background, i + 1 where shape i
        covers at least half of the pixel and is visible.
    """
    s = SUPERSAMPLE
    canvas = _background(size, rng).resize((size * s, size * s), Image.Resampling.NEAREST)
    clutter(canvas, rng.choice((0, 0, 4, 8, 14)), rng)
    labels = paint(canvas, scene, size, rng)
    pixels = np.asarray(canvas.reduce(s), dtype=np.float32)
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    grain = noise.standard_normal((size, size, 3), dtype=np.float32) * rng.uniform(0.0, 9.0)
    return np.clip(pixels + grain + 0.5, 0, 255).astype(np.uint8), labels


def paint(
    canvas: Image.Image, scene: Scene, size: int, rng: Random, *, shadow: tuple[int, int, int] | None = None
) -> np.ndarray:
    """Draw the shapes on ``canvas``, which has `SUPERSAMPLE` times ``size`` pixels per side, and return the labels.

    ``shadow`` is the offset of cast shadows, right and down in pixels of the canvas, and their opacity (0 to 255).
    """
    s = SUPERSAMPLE
    owners = Image.new("L", canvas.size)
    boxes = []
    for index, shape in enumerate(scene.shapes):
        tile, mask, corner = _tile(shape, size * s, rng)
        if shadow is not None:
            at = (corner[0] + shadow[0], corner[1] + shadow[1])
            canvas.paste((0, 0, 0), at, mask.point([0] + [shadow[2]] * 255))
        canvas.paste(tile, corner, mask)
        box = (*corner, corner[0] + tile.width, corner[1] + tile.height)
        owners.paste(index + 1, box, mask)
        boxes.append(box)
    labels = np.zeros((size, size), dtype=np.uint8)
    owner = np.asarray(owners)
    for index, (left, top, right, bottom) in enumerate(boxes):
        fine = (owner[top:bottom, left:right] == index + 1).view(np.uint8)
        rows = np.add.reduce([fine[k::s] for k in range(s)])  # sum over the s rows of each pixel
        cover = np.add.reduce([rows[:, k::s] for k in range(s)])  # covered samples, of s * s per pixel
        labels[top // s : bottom // s, left // s : right // s][2 * cover >= s * s] = index + 1
    return labels


def _tile(shape: Shape, side: int, rng: Random) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """Return an image of one shape, its mask and its position; edges are multiples of the supersampling factor."""
    s = SUPERSAMPLE
    outline = shape.outline() * side
    low = np.maximum(np.floor(outline.min(axis=0) / s).astype(int), 0) * s
    high = np.minimum(np.ceil(outline.max(axis=0) / s).astype(int), side // s) * s
    left, top, width, height = int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1])
    corners = (outline - low - 0.5).ravel().tolist()
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).polygon(corners, fill=255)

    colour, other = _tints(COLOURS[shape.colour], rng)
    tile = Image.new("RGB", (width, height), colour)
    draw = ImageDraw.Draw(tile)
    if shape.texture == "striped":
        _stripes(draw, width, height, side * 0.066, other, rng)
    elif shape.texture == "dotted":
        _dots(draw, width, height, side * 0.075, other, rng)
    rim = max(1, round(side * 0.011))
    draw.line([*corners, *corners[:4]], fill=_mix(colour, (0, 0, 0), 0.45), width=2 * rim)
    return tile, mask, (left, top)


def _tints(base: Colour, rng: Random) -> tuple[Colour, Colour]:
    """Return the colours of a shape and of its texture, darker for light colours and lighter for dark ones."""
    light = rng.uniform(0.9, 1.08)
    r, g, b = (min(255, round(c * light * rng.uniform(0.97, 1.03))) for c in base)
    luma = 0.3 * r + 0.59 * g + 0.11 * b
    other = _mix((r, g, b), (0, 0, 0), 0.55) if luma > 120 else _mix((r, g, b), (255, 255, 255), 0.55)
    return (r, g, b), other


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    r, g, b_ = (round(x * (1 - share) + y * share) for x, y in zip(a, b, strict=True))
    return r, g, b_


def _stripes(draw: ImageDraw.ImageDraw, width: int, height: int, period: float, fill: Colour, rng: Random) -> None:
    angle = rng.choice((0.0, 0.25, 0.5, 0.75)) * math.pi
    across, along = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    reach = math.hypot(width, height) / 2
    at = -reach + rng.random() * period
    while at < reach:
        x, y = width / 2 + at * across[0], height / 2 + at * across[1]
        ends = [x - reach * along[0], y - reach * along[1], x + reach * along[0], y + reach * along[1]]
        draw.line(ends, fill=fill, width=max(1, round(period * 0.45)))
        at += period


def _dots(draw: ImageDraw.ImageDraw, width: int, height: int, period: float, fill: Colour, rng: Random) -> None:
    radius, y, odd = period * 0.3, period * rng.uniform(0.2, 0.7), False
    while y < height + radius:
        x = period * (0.75 if odd else 0.25)
        while x < width + radius:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            x += period
        y, odd = y + period * 0.87, not odd


def _background(size: int, rng: Random) -> Image.Image:
    """Return a nearly grey background, plain or a gradient."""
    first, second = grey(rng), grey(rng)
    if rng.random() < 0.3:
        return Image.new("RGB", (size, size), first)
    angle = rng.uniform(0, 2 * math.pi)
    at = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    ramp = np.clip(0.5 + 0.8 * (math.cos(angle) * at[None, :] + math.sin(angle) * at[:, None]), 0, 1)[..., None]
    pixels = np.array(first, np.float32) * (1 - ramp) + np.array(second, np.float32) * ramp
    return Image.fromarray((pixels + 0.5).astype(np.uint8))


def grey(rng: Random) -> Colour:
    """Return a random colour that is nearly grey."""
    level = rng.uniform(70, 200)
    r, g, b = (round(level + rng.uniform(-12, 12)) for _ in range(3))
    return r, g, b


def clutter(canvas: Image.Image, count: int, rng: Random) -> None:
    """Draw thin grey strokes and small blobs, which no sentence refers to."""
    draw = ImageDraw.Draw(canvas)
    side = canvas.width
    for _ in range(count):
        x, y, fill = rng.uniform(0, side), rng.uniform(0, side), grey(rng)
        if rng.random() < 0.7:
            length, angle = rng.uniform(0.05, 0.3) * side, rng.uniform(0, math.pi)
            ends = (x, y, x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line(ends, fill=fill, width=max(1, round(side * 0.008)))
        else:
            radius = rng.uniform(0.008, 0.02) * side
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
