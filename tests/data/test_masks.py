"""Masks: rules, polygons, RLEs, unusable segmentations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from refcoco_files import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    box_mask,
    write_set,
)

from fastkd.data import RefCOCO
from fastkd.data.masks import rasterise


def compressed(mask: np.ndarray) -> str:
    """Return the compressed RLE counts of a mask."""
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_mask_rules(tmp_path: Path) -> None:
    write_set(tmp_path, segmentations={1: [LEFT, RIGHT]})
    left, right = box_mask(1, 2, 7, 8), box_mask(5, 4, 11, 10)
    assert np.array_equal(RefCOCO(tmp_path).mask(0), left | right)
    assert np.array_equal(RefCOCO(tmp_path, mask_rule="lavt").mask(0), left ^ right)


@pytest.mark.parametrize("rule", ["union", "lavt"])
@pytest.mark.parametrize("compressed", [False, True])
def test_rle_masks(tmp_path: Path, rule: str, compressed: bool) -> None:
    truth = box_mask(3, 1, 9, 5)
    if compressed:
        rle = coco_mask.encode(np.asfortranarray(truth.astype(np.uint8)))
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    else:
        runs = np.diff(np.flatnonzero(np.diff(np.r_[2, truth.T.ravel(), 2])))  # column-major, starting with zeros
        segmentation = {"size": [HEIGHT, WIDTH], "counts": runs.tolist()}
    write_set(tmp_path, segmentations={1: segmentation})
    assert np.array_equal(RefCOCO(tmp_path, mask_rule=rule).mask(0), truth)


def test_compressed_rles_match_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98):
        for height, width in ((1, 7), (9, 1), (40, 70), (300, 200)):
            truth = rng.random((height, width)) < density
            truth[-1, -1] = True  # at least one pixel
            rle = {"size": [height, width], "counts": compressed(truth)}
            assert np.array_equal(rasterise(rle, height, width), truth)
    block = np.zeros((3000, 2000), dtype=bool)
    block[10:2000, 700:1900] = True  # runs of more than 20 bits
    assert np.array_equal(rasterise({"size": [3000, 2000], "counts": compressed(block)}, 3000, 2000), block)


def test_combines_a_list_of_rles(tmp_path: Path) -> None:
    left, right = box_mask(3, 1, 9, 5), box_mask(7, 2, 12, 8)
    rles = [{"size": [HEIGHT, WIDTH], "counts": compressed(mask)} for mask in (left, right)]
    for count, union, lavt in ((1, left, left), (2, left | right, left ^ right)):
        write_set(tmp_path, segmentations={1: rles[:count]})
        assert np.array_equal(RefCOCO(tmp_path).mask(0), union)
        assert np.array_equal(RefCOCO(tmp_path, mask_rule="lavt").mask(0), lavt)
    write_set(tmp_path, segmentations={1: [rles[0], LEFT]})
    with pytest.raises(ValueError, match=r"annotation 1 \(ref 0\) mixes RLEs with list in one list"):
        RefCOCO(tmp_path)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "annotation 1 .ref 0. has an empty segmentation"),
        ([[]], "not a list of at least 3 points"),
        ([[1, 2, 7, 8]], "not a list of at least 3 points"),
        ([LEFT, [1, 2, 3]], "not a list of at least 3 points"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "RLE without counts or size"),
        ({"counts": [4]}, "RLE without counts or size"),
        ({"counts": [4], "size": 5}, "RLE without counts or size"),
        ([["a", "b", "c", "d", "e", "f"]], "values other than numbers"),
        (None, "segmentation of type NoneType"),
    ],
)
def test_rejects_unusable_segmentations_at_construction(tmp_path: Path, segmentation: Any, message: str) -> None:
    write_set(tmp_path, segmentations={1: segmentation})
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)
    assert len(RefCOCO(tmp_path, split="val")) == 1  # the other split does not use it


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (10**400, "NaN or infinite"),
        (2.5e8, r"coordinate of 2.5e\+08, far outside its 12 x 20 image"),
        (-1e300, "far outside"),
    ],
)
def test_rejects_extreme_polygon_coordinates(tmp_path: Path, number: float, message: str) -> None:
    write_set(tmp_path, segmentations={1: [RIGHT, [1, 2, 7, 2, 7, number, 1, 8]]})
    with pytest.raises(ValueError, match=rf"annotation 1 \(ref 0\) has a polygon .*{message}"):
        RefCOCO(tmp_path)
    with pytest.raises(ValueError, match=f"my object has a polygon .*{message}"):
        rasterise([[1, 2, 7, 2, 7, number, 1, 8]], HEIGHT, WIDTH, owner="my object")


def test_rejects_an_excessive_outline() -> None:
    zigzag = [0.0, 0.0, 150.0, 1.0] * 50_000
    with pytest.raises(ValueError, match=r"outline is 1.5e\+07 pixels long"):
        rasterise([zigzag], HEIGHT, WIDTH)


def test_clips_polygons_at_the_image_border(tmp_path: Path) -> None:
    write_set(tmp_path, segmentations={1: [[-3.5, -2, 4, -2, 4, 30, -3.5, 30]]})
    assert np.array_equal(RefCOCO(tmp_path).mask(0), box_mask(0, 0, 4, HEIGHT))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-1], "can't be decoded .its last number is truncated"),
        (lambda text: text + "9", "do not fill 12 x 20 pixels"),
        (lambda text: "94", "do not fill 12 x 20 pixels"),
        (lambda text: text[:-1] + "o", "can't be decoded .its last number is truncated"),
        (lambda text: text + "o" * 30, "can't be decoded .a number has more than 40 bits"),
        (lambda text: "~" + text, "can't be decoded .invalid character '~'"),
        (lambda text: "é" + text, "can't be decoded"),
        (lambda text: "O" + text, "can't be decoded .a run length is not"),
        (lambda text: [240.5], "can't be decoded .a run length is not"),
        (lambda text: [float("nan"), 240], "can't be decoded .a run length is not"),
        (lambda text: [[240]], "can't be decoded"),
        (lambda text: ["2", "x"], "can't be decoded"),
        (lambda text: [2**70], "do not fill"),
        (lambda text: 240, "can't be decoded .counts of type int"),
    ],
)
def test_rejects_damaged_rles_at_construction(tmp_path: Path, damage: Any, message: str) -> None:
    counts = damage(compressed(box_mask(3, 1, 9, 5)))
    write_set(tmp_path, segmentations={1: {"size": [HEIGHT, WIDTH], "counts": counts}})
    with pytest.raises(ValueError, match=rf"annotation 1 \(ref 0\) has an RLE .*({message})"):
        RefCOCO(tmp_path)


def test_rejects_empty_masks_and_rles_of_another_size(tmp_path: Path) -> None:
    write_set(tmp_path, segmentations={1: [[30, 30, 40, 30, 40, 40]]})
    with pytest.raises(ValueError, match=r"annotation 1 \(ref 0\) covers no pixel of its 12 x 20 image"):
        RefCOCO(tmp_path)
    write_set(tmp_path, segmentations={1: [[-9, 2, -1, 2, -1, 8, -9, 8], LEFT]})  # one part inside suffices
    assert np.array_equal(RefCOCO(tmp_path).mask(0), box_mask(1, 2, 7, 8))
    write_set(tmp_path, segmentations={1: {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}})
    with pytest.raises(ValueError, match=r"annotation 1 \(ref 0\) covers no pixel of its 12 x 20 image"):
        RefCOCO(tmp_path).mask(0)
    write_set(tmp_path, segmentations={1: {"size": [5, 5], "counts": [3, 4, 18]}})
    with pytest.raises(ValueError, match=r"RLE of size \[5, 5\] for an image of \[12, 20\]"):
        RefCOCO(tmp_path).mask(0)
    for counts, message in (([3, 4], "do not fill 12 x 20 pixels"), ([-5, 245], "RLE that can't be decoded")):
        write_set(tmp_path, segmentations={1: {"size": [HEIGHT, WIDTH], "counts": counts}})
        with pytest.raises(ValueError, match=message):
            RefCOCO(tmp_path).mask(0)
    with pytest.raises(ValueError, match="mask rule must be one of 'union', 'lavt', got 'xor'"):
        rasterise([LEFT], HEIGHT, WIDTH, rule="xor")
