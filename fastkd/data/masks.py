"""COCO segmentations to masks.

pycocotools is C code that trusts its arguments: it is given checked polygons only, and RLEs are decoded here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

RULES = ("union", "lavt")
_HINT = "leave this annotation's refs out, or restore instances.json from its source"
_NO_PIXEL = "{what} covers no pixel of its {height} x {width} image: the segmentation is empty or outside"
_FAR = 10.0  # image sides; polygons may leave their image, by far less than this
_LONGEST_OUTLINE = 1e7  # pixels; rasterising takes 40 bytes for each


def check_segmentation(segmentation: Any, what: str, size: tuple[int, int] | None = None) -> None:
    """Raise ``ValueError`` unless ``segmentation`` is polygons, an RLE or a list of RLEs; ``what`` names its owner.

    With the image's ``size`` (height, width), also refuse polygons that lie far outside of it and RLEs of another size.
    """
    if isinstance(segmentation, dict):
        _check_rle(segmentation, what, size)
        return
    if not isinstance(segmentation, list):
        raise ValueError(
            f"{what} has a segmentation of type {type(segmentation).__name__}, not a list or dict: {_HINT}"
        )
    if not segmentation:
        raise ValueError(f"{what} has an empty segmentation: {_HINT}")
    if any(isinstance(part, dict) for part in segmentation):
        for part in segmentation:
            if not isinstance(part, dict):
                raise ValueError(f"{what} mixes RLEs with {type(part).__name__} in one list: {_HINT}")
            _check_rle(part, what, size)
        return
    for polygon in segmentation:
        _check_polygon(polygon, what, size)
    if size is not None and all(_is_outside(polygon, size) for polygon in segmentation):
        raise ValueError(_NO_PIXEL.format(what=what, height=size[0], width=size[1]))


def _is_outside(polygon: list[float], size: tuple[int, int]) -> bool:
    """Return whether a polygon lies wholly to one side of its image."""
    height, width = size
    x, y = polygon[0::2], polygon[1::2]
    return max(x) < 0 or max(y) < 0 or min(x) > width or min(y) > height


def _check_rle(rle: dict[str, Any], what: str, size: tuple[int, int] | None) -> None:
    _runs(rle, what)
    if size is not None and list(rle["size"]) != list(size):
        raise ValueError(f"{what}: RLE of size {list(rle['size'])} for an image of {list(size)} (h, w)")


def _check_polygon(polygon: Any, what: str, size: tuple[int, int] | None) -> None:
    # a flat list of 4 numbers would be taken for a box by pycocotools
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"{what} has a polygon that is not a list of at least 3 points (6 numbers): {_HINT}")
    if not all(isinstance(number, int | float) for number in polygon):
        raise ValueError(f"{what} has a polygon that holds something else than numbers: {_HINT}")
    try:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)  # (points, x and y)
    except OverflowError:  # an integer beyond float64
        points = np.full((1, 2), np.inf)
    if not np.isfinite(points).all():
        raise ValueError(f"{what} has a polygon with a coordinate that is NaN or infinite: {_HINT}")
    if size is None:
        return
    height, width = size
    far = _FAR * max(height, width)
    outside = (points < -far) | (points > np.array([width, height]) + far)
    if outside.any():
        raise ValueError(
            f"{what} has a polygon with a coordinate of {points[outside][0]:g}, far outside its {height} x {width} "
            f"image: {_HINT}"
        )
    outline = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
    if outline > _LONGEST_OUTLINE:
        raise ValueError(f"{what} has a polygon whose outline is {outline:.3g} pixels long: {_HINT}")


def rasterise(
    segmentation: Any, height: int, width: int, *, rule: str = "union", what: str = "segmentation"
) -> np.ndarray:
    """Return the mask of a COCO segmentation, (height, width) bool, at the original size.

    ``rule`` says what several parts (polygons, or RLEs in a list) of one object mean: ``"union"`` takes pixels that any
    part covers, ``"lavt"`` those that exactly one covers (overlaps become background, as in LAVT's evaluation). A
    single RLE is the same under both.

    Raises:
        ValueError: unknown rule, unusable segmentation, RLE of another size, or a union that covers no pixel.
    """
    if rule not in RULES:
        raise ValueError(f"mask rule must be one of {', '.join(map(repr, RULES))}; got {rule!r}")
    check_segmentation(segmentation, what, (height, width))
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if isinstance(parts[0], dict):
        layers: np.ndarray = np.stack([_decoded(part, what) for part in parts], axis=2)
    else:
        layers = coco_mask.decode(coco_mask.frPyObjects(parts, height, width))
    covered = layers.sum(axis=2, dtype=np.int64)
    mask: np.ndarray = covered > 0 if rule == "union" else covered == 1
    if rule == "union" and not mask.any():
        raise ValueError(_NO_PIXEL.format(what=what, height=height, width=width))
    return mask


def _decoded(rle: dict[str, Any], what: str) -> np.ndarray:
    """Return an RLE as a mask (height, width): runs of 0 and 1 in turn, down the columns."""
    runs = _runs(rle, what)
    height, width = rle["size"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(rle: dict[str, Any], what: str) -> np.ndarray:
    """Return the lengths of the runs of an RLE, int64, which sum to the pixels of its size.

    Raises:
        ValueError: no counts or size, counts that are damaged or do not fill the size.
    """
    counts, size = rle.get("counts"), rle.get("size")
    sides = size if isinstance(size, list | tuple) else ()
    if not counts or len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{what} has an RLE without counts or size: {_HINT}")
    try:
        if isinstance(counts, str | bytes):
            numbers = _numbers(counts.encode("ascii") if isinstance(counts, str) else counts)
        elif isinstance(counts, list):
            numbers = counts
        else:
            raise TypeError(f"counts of type {type(counts).__name__}")
        exact = np.array(numbers, dtype=np.float64)  # every integer below 2**53 is exact
        if exact.ndim != 1 or not (np.isfinite(exact) & (exact >= 0) & (exact == np.floor(exact))).all():
            raise ValueError("a run whose length is not a whole number of pixels")
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{what} has an RLE that can't be decoded ({error}): restore it from its source") from error
    if exact.sum() != sides[0] * sides[1]:
        raise ValueError(f"{what} has an RLE whose runs do not fill {sides[0]} x {sides[1]} pixels: it is cut off")
    return exact.astype(np.int64)


def _numbers(text: bytes) -> list[int]:
    """Return the numbers of COCO's compressed counts.

    Each character, counted from "0", holds 5 bits of a number, lowest first, and a 6th that says whether more follow;
    the 5th bit of a number's last character is its sign. From the fourth number on, the difference to the number two
    before is stored.
    """
    numbers: list[int] = []
    value = bits = 0
    for character in text:
        group = character - ord("0")
        if not 0 <= group < 64:
            raise ValueError(f"character {chr(character)!r}")
        value |= (group & 31) << bits
        bits += 5
        if group & 32:
            if bits > 35:
                raise ValueError("a number of more than 40 bits")
            continue
        if group & 16:
            value -= 1 << bits
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
        value = bits = 0
    if bits:
        raise ValueError("its last number is cut off")
    return numbers
