"""Convert COCO segmentations to masks.

pycocotools does not validate its arguments: polygons are validated before it sees them, and RLEs are decoded here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from fastkd.data.images import open_image

RULES = ("union", "lavt")
_HINT = "remove this annotation's refs, or download instances.json again"
_NO_PIXEL = "{owner} covers no pixel of its {height} x {width} image: the segmentation is empty or outside"
_FAR = 10.0  # in image sides; valid polygons exceed their image by much less
_LARGEST_COORDINATE = 1e8  # pycocotools multiplies by 5 and converts to 32 bits
_LONGEST_OUTLINE = 1e7  # pixels of all polygons of an annotation; rasterising needs 40 bytes per pixel of outline


class EmptyMask(ValueError):
    """A segmentation covers no pixel."""


def check_segmentation(segmentation: Any, owner: str, size: tuple[int, int] | None = None) -> None:
    """Raise ``ValueError`` unless ``segmentation`` is a list of polygons, an RLE or a list of RLEs.

    Args:
        segmentation: The value in instances.json.
        owner: Name of the annotation in error messages.
        size: (height, width) of the image; if given, also reject polygons far outside it and RLEs of another size.
    """
    if isinstance(segmentation, dict):
        _check_rle(segmentation, owner, size)
        return
    if not isinstance(segmentation, list):
        raise ValueError(
            f"{owner} has a segmentation of type {type(segmentation).__name__}, not a list or dict: {_HINT}"
        )
    if not segmentation:
        raise EmptyMask(f"{owner} has an empty segmentation: {_HINT}")
    if any(isinstance(part, dict) for part in segmentation):
        for part in segmentation:
            if not isinstance(part, dict):
                raise ValueError(f"{owner} mixes RLEs with {type(part).__name__} in one list: {_HINT}")
            _check_rle(part, owner, size)
        return
    outline = sum(_check_polygon(polygon, owner, size) for polygon in segmentation)
    if outline > _LONGEST_OUTLINE:
        raise ValueError(f"{owner} has polygons whose outline is {outline:.3g} pixels long: {_HINT}")
    if size is not None and all(_is_outside(polygon, size) for polygon in segmentation):
        raise EmptyMask(_NO_PIXEL.format(owner=owner, height=size[0], width=size[1]))


def _is_outside(polygon: list[float], size: tuple[int, int]) -> bool:
    """Return whether a polygon lies entirely to one side of its image."""
    height, width = size
    x, y = polygon[0::2], polygon[1::2]
    return max(x) < 0 or max(y) < 0 or min(x) > width or min(y) > height


def _check_rle(rle: dict[str, Any], owner: str, size: tuple[int, int] | None) -> None:
    _runs(rle, owner)
    if size is not None and list(rle["size"]) != list(size):
        raise ValueError(f"{owner}: RLE of size {list(rle['size'])} for an image of {list(size)} (h, w)")


def _check_polygon(polygon: Any, owner: str, size: tuple[int, int] | None) -> float:
    """Return the length of the outline in pixels."""
    # pycocotools would interpret a flat list of 4 numbers as a box
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"{owner} has a polygon that is not a list of at least 3 points (6 numbers): {_HINT}")
    if not all(isinstance(number, int | float) for number in polygon):
        raise ValueError(f"{owner} has a polygon with values other than numbers: {_HINT}")
    try:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)  # (points, 2)
    except OverflowError:  # an integer beyond float64
        points = np.full((1, 2), np.inf)
    if not np.isfinite(points).all():
        raise ValueError(f"{owner} has a polygon with a NaN or infinite coordinate: {_HINT}")
    if size is None:
        return 0.0
    height, width = size
    far = min(_FAR * max(height, width), _LARGEST_COORDINATE - max(height, width))
    outside = (points < -far) | (points > np.array([width, height]) + far)
    if outside.any():
        raise ValueError(
            f"{owner} has a polygon with a coordinate of {points[outside][0]:g}, far outside its {height} x {width} "
            f"image: {_HINT}"
        )
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def rasterise(
    segmentation: Any, height: int, width: int, *, rule: str = "union", owner: str = "segmentation"
) -> np.ndarray:
    """Return the mask of a COCO segmentation, (height, width) bool, at the original size.

    Args:
        segmentation: A list of polygons, an RLE, or a list of RLEs.
        height: Height of the image.
        width: Width of the image.
        rule: How to combine several polygons or RLEs of one object: ``"union"`` keeps the pixels that any part covers,
            ``"lavt"`` those that exactly one part covers (overlaps become background, as in LAVT's evaluation).
        owner: Name of the annotation in error messages.

    Raises:
        ValueError: The rule is unknown, the segmentation is unusable, an RLE has another size, or a union covers no
            pixel.
    """
    if rule not in RULES:
        raise ValueError(f"mask rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    check_segmentation(segmentation, owner, (height, width))
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    # Part by part: a segmentation may have thousands. All arrays are in column-major order, as pycocotools' are.
    if isinstance(parts[0], dict):
        layers = (_decoded(part, owner) for part in parts)  # (H, W) each
    else:
        layers = (coco_mask.decode(part).view(bool) for part in coco_mask.frPyObjects(parts, height, width))
    mask: np.ndarray = next(layers)
    several = np.zeros_like(mask) if rule == "lavt" and len(parts) > 1 else None  # covered by more than one part
    for layer in layers:
        if several is not None:
            several |= mask & layer
        mask |= layer
    if several is not None:
        mask &= ~several
    if rule == "union" and not mask.any():
        raise EmptyMask(_NO_PIXEL.format(owner=owner, height=height, width=width))
    return mask


def decode_mask(content: bytes) -> np.ndarray:
    """Return a mask image as (H, W) bool: True where any colour, or the palette's index, is not 0; alpha is ignored.

    Raises:
        ValueError: It is a JPEG, which changes the values at the object's border, or not in grey, RGB or a palette.
    """
    with open_image(content) as image:
        if image.format in ("JPEG", "MPO"):
            raise ValueError("JPEG changes the values of a mask; save it as PNG")
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            raise ValueError(f"a mask in {image.mode} is ambiguous; save it in grey")
        bands = len([band for band in image.getbands() if band not in "Aa"])
        values = np.asarray(image)
    return np.asarray(values[..., :bands].any(-1) if values.ndim == 3 else values.astype(bool))


def _decoded(rle: dict[str, Any], owner: str) -> np.ndarray:
    """Decode an RLE to a mask (height, width): alternating runs of 0 and 1, in column-major order."""
    runs = _runs(rle, owner)
    height, width = rle["size"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(rle: dict[str, Any], owner: str) -> np.ndarray:
    """Return an RLE's run lengths, int64, which sum to the number of pixels.

    Raises:
        ValueError: Counts or size are missing, or the counts are damaged or do not match the size.
    """
    counts, size = rle.get("counts"), rle.get("size")
    sides = size if isinstance(size, list | tuple) else ()
    if not counts or len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= 2**30 for side in sides):
        raise ValueError(f"{owner} has an RLE without counts or size: {_HINT}")
    try:
        if isinstance(counts, str | bytes):
            numbers = _decompress(counts.encode("ascii") if isinstance(counts, str) else counts)
        elif isinstance(counts, list):
            numbers = counts
        else:
            raise TypeError(f"counts of type {type(counts).__name__}")
        exact = np.array(numbers, dtype=np.float64)  # exact below 2**53
        if exact.ndim != 1 or not (np.isfinite(exact) & (exact >= 0) & (exact == np.floor(exact))).all():
            raise ValueError("a run length is not a whole number")
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{owner} has an RLE that can't be decoded ({error}): {_HINT}") from error
    if exact.sum() != sides[0] * sides[1]:
        raise ValueError(f"{owner} has an RLE whose runs do not fill {sides[0]} x {sides[1]} pixels: {_HINT}")
    return exact.astype(np.int64)


def _decompress(text: bytes) -> list[int]:
    """Decode COCO's compressed counts.

    Each character minus "0" holds 5 bits of a number, least significant first, and a 6th bit that is set if more
    follow; the 5th bit of a number's last character is its sign. From the fourth number on, differences to the number
    two positions before are stored.
    """
    numbers: list[int] = []
    value = bits = 0
    for character in text:
        group = character - ord("0")
        if not 0 <= group < 64:
            raise ValueError(f"invalid character {chr(character)!r}")
        value |= (group & 31) << bits
        bits += 5
        if group & 32:
            if bits > 35:
                raise ValueError("a number has more than 40 bits")
            continue
        if group & 16:
            value -= 1 << bits
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
        value = bits = 0
    if bits:
        raise ValueError("its last number is truncated")
    return numbers
