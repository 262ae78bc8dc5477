"""``fastkd data``: write procedural referring-expression sets in RefCOCO's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from fastkd._console import show


def make_shapes(
    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    images: int = 5000,
    image_size: int = 128,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a procedural referring-expression set in RefCOCO's layout.

    Args:
        root: folder to write; without --overwrite it must be empty or not exist.
        images: number of scenes over all splits.
        image_size: side of the square JPEG images, in pixels.
        seed: random seed; the same seed writes the same files.
        overwrite: replace the content of the folder.
    """
    from fastkd.data import shapes

    counts = shapes.make_shapes(root, images=images, image_size=image_size, seed=seed, overwrite=overwrite)
    _show_counts(root, counts)


def make_shapesref(
    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    images: int = 12000,
    image_size: int = 64,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write the benchmark ShapesRef, which is harder than make-shapes, in RefCOCO's layout.

    Args:
        root: folder to write; without --overwrite it must be empty or not exist.
        images: number of scenes over all splits.
        image_size: side of the square JPEG images, in pixels.
        seed: random seed; the same seed writes the same files. The shipped teacher was trained on seed 1.
        overwrite: replace the content of the folder.
    """
    from fastkd.data import shapesref

    counts = shapesref.make_shapesref(root, images=images, image_size=image_size, seed=seed, overwrite=overwrite)
    _show_counts(root, counts)


def _show_counts(root: Path, counts: dict[str, Any]) -> None:
    show(f"{root}: {counts['images']} images, {counts['refs']} refs, {counts['sentences']} sentences")
