"""Generate ShapesRef and write it in the layout of RefCOCO."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random
from typing import Any

from fastkd.data.shapes.language import Expression, describe
from fastkd.data.shapes.scene import Scene, Style, draw_scene
from fastkd.data.shapes.write import Procedure, write_set
from fastkd.data.shapesref.language import KIND_SHARES, draw_kinds, propose
from fastkd.data.shapesref.render import render

VERSION = "fastkd-shapesref-1"
SPLITS = ("train", "val", "testA", "testB", "testC")

# Fewer kinds and colours for more shapes than in `shapes`, so that nearly every shape has others like it.
STYLE = Style(
    count=(5, 9),
    crowded=(9, 12),
    kinds=(2, 3),
    colours=(2, 3),
    sizes={"small": (0.12, 0.14), "medium": (0.17, 0.2), "large": (0.24, 0.28)},
    near=0.4,
    min_area=0.007,
)
_ATTEMPTS = 2000


def make_shapesref(
    root: str | os.PathLike[str],
    *,
    images: int = 12000,
    image_size: int = 64,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the benchmark ShapesRef under ``root`` in the layout of RefCOCO.

    Compared with `make_shapes`: 5 to 9 smaller shapes of two or three kinds and colours per image, so that most shapes
    have others of the same kind and colour; sentences of eight kinds in the fixed proportions of
    ``fastkd.data.shapesref.KIND_SHARES``, among them negations, comparisons and nested relations; cast shadows, uneven
    light and background, more strokes and noise. As there, each sentence fits exactly one shape by a margin. Where a
    scene has no such sentence of a drawn kind, another scene is drawn, not another kind. The visible part of every
    shape covers at least 0.7 % of the image (28 pixels of 64 x 64), and 40 % of the shape.

    Of every 25 images, 21 are train and one each val, testA, testB (crowded: 9 to 12 shapes) and testC (without words
    of place: attribute, negation, comparison and superlative only).

    Image i depends only on the version (``fastkd.data.shapesref.VERSION``), ``seed``, i and ``image_size``; scenes and
    sentences do not depend on ``image_size``. Tests compare digests. Pillow before 11.3 draws a few pixels differently.

    Args:
        root: The folder to create, atomically.
        images: Number of images, at least 5, so that every split has one.
        image_size: Side of the square images in pixels, at least 32.
        seed: Random seed, any integer. The shipped teacher was trained on seed 1.
        overwrite: Replace an earlier procedural set at ``root``; a folder with other files is never replaced.
        progress: Called as ``progress(done, images)`` after each image.

    Returns:
        Counts: images, objects, refs, sentences, ``refs_by_split``, ``sentences_by_kind``.

    Raises:
        ValueError: An argument is out of range.
        FileExistsError: ``root`` holds files and ``overwrite`` does not allow replacing them.

    Example::

        fastkd.data.make_shapesref("data/shapesref")
        crowded = fastkd.data.RefCOCO("data/shapesref", split="testB")
    """
    return write_set(SHAPESREF, root, images, image_size, seed, overwrite, progress)


def split_of(index: int) -> str:
    """Return the split of image ``index``: per 25, 21 train and one of each other split; the first five differ."""
    return {1: "val", 2: "testA", 3: "testB", 4: "testC"}.get(index % 25, "train")


def draw(index: int, seed: int) -> tuple[Scene, list[Expression]]:
    """Return scene ``index`` of the set and its sentences, independent of the number of images."""
    rng = Random(f"{VERSION}/{seed}/{index}/scene")
    split = split_of(index)
    kinds = draw_kinds(rng, placeless=split == "testC")
    for _ in range(_ATTEMPTS):
        scene = draw_scene(rng, crowded=split == "testB", style=STYLE)
        expressions = describe(scene, kinds, rng, shares=KIND_SHARES, propose=propose)
        if expressions is not None:
            return scene, expressions
    raise RuntimeError(f"no scene for the sentence kinds {kinds} in {_ATTEMPTS} attempts (seed {seed}, image {index})")


SHAPESREF = Procedure(
    version=VERSION,
    description="fastkd ShapesRef, a procedural benchmark of referring image segmentation",
    shares=KIND_SHARES,
    split_of=split_of,
    fewest_images=5,
    draw=draw,
    render=render,
)
