"""COCO segmentations to masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

RULES = ("union", "lavt")


def check_segmentation(segmentation: Any, what: str) -> None:
    """Raise ``ValueError`` if ``segmentation`` is neither usable polygons nor an RLE; ``what`` names its owner."""
    mend = "leave this annotation's refs out, or restore instances.json from its source"
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if not segmentation.get("counts") or not isinstance(size, list | tuple) or len(size) != 2:
            raise ValueError(f"{what} has an RLE without counts or size: {mend}")
        return
    if not isinstance(segmentation, list):
        raise ValueError(f"{what} has a segmentation of type {type(segmentation).__name__}, not a list or dict: {mend}")
    if not segmentation:
        raise ValueError(f"{what} has an empty segmentation: {mend}")
    for polygon in segmentation:
        # a flat list of 4 numbers would be taken for a box by pycocotools
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"{what} has a polygon that is not a list of at least 3 points (6 numbers): {mend}")
        if not all(isinstance(number, int | float) for number in polygon):
            raise ValueError(f"{what} has a polygon that holds something else than numbers: {mend}")


def rasterise(
    segmentation: Any, height: int, width: int, *, rule: str = "union", what: str = "segmentation"
) -> np.ndarray:
    """The mask of a COCO segmentation, (height, width) bool, at the original size.

    ``rule`` says what several polygons of one object mean: ``"union"`` takes pixels that any polygon covers,
    ``"lavt"`` those that exactly one covers (overlaps become background, as in LAVT's evaluation). An RLE is a single
    mask, the same under both.

    Raises:
        ValueError: unknown rule, unusable segmentation, RLE of another size, or a union that covers no pixel.
    """
    if rule not in RULES:
        raise ValueError(f"mask rule must be one of {', '.join(map(repr, RULES))}; got {rule!r}")
    check_segmentation(segmentation, what)
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"{what}: RLE of size {segmentation['size']} for an image of {[height, width]} (h, w)")
        mask = _decoded(segmentation, height, width, what)
    else:
        layers = coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width))
        mask = layers.any(axis=2) if rule == "union" else layers.sum(axis=2, dtype=np.int64) == 1
    if rule == "union" and not mask.any():
        raise ValueError(
            f"{what} covers no pixel of its {height} x {width} image: the segmentation is empty or outside"
        )
    return mask


def _decoded(segmentation: dict[str, Any], height: int, width: int, what: str) -> np.ndarray:
    """An RLE as a mask. pycocotools leaves what the runs do not reach unwritten, so they must fill the image."""
    counts, filled = segmentation["counts"], True
    try:
        if isinstance(counts, list):
            filled = sum(counts) == height * width
            segmentation = coco_mask.frPyObjects(segmentation, height, width)
        mask = coco_mask.decode(segmentation).astype(bool)
        filled = filled and int(coco_mask.area(segmentation)) == int(np.count_nonzero(mask))
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{what} has an RLE that can't be decoded ({error}): restore it from its source") from error
    if not filled:
        raise ValueError(f"{what} has an RLE whose runs do not fill {height} x {width} pixels: it is cut off")
    return mask
