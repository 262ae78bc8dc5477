"""gRefCOCO, RefCLEF, RRSIS-D: several targets or none, image folders, splits, published counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from refcoco_files import HEIGHT, LEFT, RIGHT, WIDTH, box_mask, make_ref, write_set
from stream_tools import Words

from fastkd.data import RefCOCO, ReferDataset, collate
from fastkd.data._known_sets import PUBLISHED_REFS

LEFT_MASK, RIGHT_MASK = box_mask(1, 2, 7, 8), box_mask(5, 4, 11, 10)


def write_grefcoco(root: Path, refs: list[dict[str, Any]]) -> Path:
    write_set(root, [], name="grefcoco", segmentations={1: [LEFT], 2: [LEFT], 3: [RIGHT]})
    (root / "grefcoco/refs(unc).p").unlink()
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(refs))
    return root


def gref(number: int, targets: list[int], categories: list[int], **fields: Any) -> dict[str, Any]:
    return {**make_ref(number, "train", image_id=2), "ann_id": targets, "category_id": categories, **fields}


def test_grefcoco_unites_targets_and_knows_none(tmp_path: Path) -> None:
    refs = [gref(0, [2, 3], [7, 7]), gref(1, [3], [7]), gref(2, [-1], [-1], no_target=True)]
    data = RefCOCO(write_grefcoco(tmp_path, refs), "grefcoco")
    assert [(ref.targets, ref.ann_id, ref.category_id) for ref in data] == [((2, 3), 2, 7), ((3,), 3, 7), ((), -1, -1)]
    for number, mask in enumerate((LEFT_MASK | RIGHT_MASK, RIGHT_MASK, np.zeros((HEIGHT, WIDTH), bool))):
        assert np.array_equal(data.mask(number), mask)
    batch = collate([ReferDataset(data, Words(), image_size=8, sentences="all")[n] for n in (0, 6)])
    assert batch["no_target"] == [False, True]
    assert batch["mask"].flatten(1).any(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (gref(0, [2, 2], [7, 7]), r"ann_id of ref number 0 must be a list of different integers, got \[2, 2\]"),
        (gref(0, ["2"], [7]), r"ann_id of ref number 0 must be a list of different integers, got \['2'\]"),
        (gref(0, [2], [None]), r"category_id of ref number 0 must be a list of different integers, got \[None\]"),
        (gref(0, [2, 9], [7, 7]), "has no annotation 9, which ref 0 refers to"),
        (gref(0, [2, 1], [7, 7]), "annotation 1 has image_id 1, but ref 0, which refers to it, has 2"),
        (gref(0, [2], [8]), "annotation 2 has category_id 7, but ref 0, which refers to it, has 8"),
    ],
)
def test_grefcoco_rejects_bad_targets(tmp_path: Path, ref: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefCOCO(write_grefcoco(tmp_path, [ref]), "grefcoco")


def test_rrsisd_reads_masks_stored_as_a_list_of_one_rle_and_tiff(tmp_path: Path) -> None:
    rle = coco_mask.encode(np.asfortranarray(LEFT_MASK.astype(np.uint8)))
    segmentation = [{"size": rle["size"], "counts": rle["counts"].decode()}]
    images = "images/rrsisd/JPEGImages"
    write_set(tmp_path, name="rrsisd", segmentations={1: segmentation}, images=images)
    instances = tmp_path / "rrsisd/instances.json"
    content = json.loads(instances.read_text())
    content["images"][0]["file_name"] = "00001.tif"
    instances.write_text(json.dumps(content))
    pixels = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
    Image.fromarray(pixels).save(tmp_path / images / "00001.tif", compression="tiff_lzw")
    data = RefCOCO(tmp_path, "rrsisd")
    assert np.array_equal(data.mask(0), LEFT_MASK)
    assert np.array_equal(data.image(1), pixels)


@pytest.mark.parametrize(("split", "expected"), [("testA", [0, 3]), ("testB", [1, 3]), ("testC", [2])])
def test_refclef_has_three_test_splits(tmp_path: Path, split: str, expected: list[int]) -> None:
    refs = [make_ref(number, name) for number, name in enumerate(["testA", "testB", "testC", "testAB"])]
    write_set(tmp_path, refs, name="refclef", images="images/saiapr_tc-12")
    data = RefCOCO(tmp_path, "refclef", "unc", split)
    assert [ref.ref_id for ref in data] == expected
    assert data.image_root == tmp_path / "images/saiapr_tc-12"


def test_refclef_of_berkeley(tmp_path: Path) -> None:
    write_set(tmp_path, [make_ref(0, "test")], name="refclef", split_by="berkeley", images="saiapr_tc-12")
    assert len(RefCOCO(tmp_path, "refclef", "berkeley", "test")) == 1


def test_published_counts_agree_with_each_other() -> None:
    totals = {key: sum(counts.values()) for key, counts in PUBLISHED_REFS.items()}
    assert totals["refcoco", "unc"] == totals["refcoco", "google"] == 50_000
    assert totals["refcocog", "umd"] == totals["refcocog", "google"] == 49_822
    assert totals["refcoco+", "unc"] == 49_856
    assert totals["rrsisd", "unc"] == 17_402


def test_counts_that_are_not_published_cannot_be_checked(tmp_path: Path) -> None:
    write_grefcoco(tmp_path, [gref(0, [2], [7])])
    with pytest.raises(ValueError, match=r"no published count is known for grefcoco \(unc\) train"):
        RefCOCO(tmp_path, "grefcoco", check_counts=True)
