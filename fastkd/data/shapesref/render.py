"""Render the scenes of ShapesRef: uneven backgrounds, strokes, cast shadows, uneven light and noise.

Pixels are computed in integers, so that an image does not depend on the machine.
"""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image

from fastkd.data.shapes.render import SUPERSAMPLE, clutter, grey, paint
from fastkd.data.shapes.scene import Scene

_UNIT = 200  # brightness that leaves a pixel unchanged
_DARK, _LIGHT = 120, 240
_REACH = 8  # of shadows, in pixels of the canvas of a 64 x 64 image
_OPACITY = 130  # of shadows, of 255
_NOISE = 14  # largest standard deviation of the noise
_SPREAD = 148  # standard deviation of the sum of four random bytes


def render(scene: Scene, size: int, rng: Random) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``scene`` at ``size`` x ``size``; see `fastkd.data.shapes.render.render`."""
    s = SUPERSAMPLE
    canvas = _background(size, rng).resize((size * s, size * s), Image.Resampling.NEAREST)
    clutter(canvas, rng.choice((0, 6, 12, 20, 30)), rng)
    right, down = (rng.randint(-_REACH, _REACH) * size // 64 for _ in range(2))
    shadow = (right, down, rng.randint(0, _OPACITY))
    labels = paint(canvas, scene, size, rng, shadow=shadow)
    pixels = np.asarray(canvas.reduce(s), dtype=np.int32)
    pixels = pixels * _light(size, rng) // _UNIT + _noise(size, rng)
    return np.clip(pixels, 0, 255).astype(np.uint8), labels


def _background(size: int, rng: Random) -> Image.Image:
    """Return a smooth random field of nearly grey colours."""
    cells = rng.choice((1, 2, 3, 5, 9))
    colours = [grey(rng) for _ in range(cells * cells)]
    field = Image.frombytes("RGB", (cells, cells), bytes(value for colour in colours for value in colour))
    return field.resize((size, size), Image.Resampling.BICUBIC)


def _light(size: int, rng: Random) -> np.ndarray:
    """Return the brightness of each pixel, (size, size, 1) int32, where `_UNIT` changes nothing."""
    least = rng.randint(_DARK, _UNIT)
    corners = bytes(rng.randint(least, _LIGHT) for _ in range(9))
    field = Image.frombytes("L", (3, 3), corners).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(field, dtype=np.int32)[..., None]


def _noise(size: int, rng: Random) -> np.ndarray:
    """Return nearly normal noise, (size, size, 3) int32: sums of four random bytes, scaled."""
    deviation = rng.randint(0, _NOISE)
    own = Random(rng.getrandbits(64))  # so that the next number of rng does not depend on the size
    drawn = np.frombuffer(own.randbytes(4 * size * size * 3), dtype=np.uint8).reshape(4, size, size, 3)
    return (drawn.sum(axis=0, dtype=np.int32) - 510) * deviation // _SPREAD
