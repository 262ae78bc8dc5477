"""The RefCOCO reader: refs, splits, image folders, skipped refs, options."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from refcoco_files import (
    HEIGHT,
    SENTENCES,
    WIDTH,
    box_mask,
    make_ref,
    prefix_file_names,
    write_set,
)

from fastkd.data import RefCOCO
from fastkd.errors import FastKDWarning


def test_reads_refs_images_and_masks(tmp_path: Path) -> None:
    data = RefCOCO(write_set(tmp_path))
    assert [ref.ref_id for ref in data] == [0, 2]
    assert len(data) == 2
    assert data.sentence_count == 6
    ref = data.ref(2)
    assert (ref.image_id, ref.ann_id, ref.category_id, ref.split) == (2, 2, 7, "train")
    assert [s.text for s in ref.sentences] == list(SENTENCES)
    assert [s.sent_id for s in ref.sentences] == [20, 21, 22]
    assert data.categories == {7: "circle"}
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)
    assert data.image(1).dtype == np.uint8
    assert np.array_equal(data.mask(0), box_mask(1, 2, 7, 8))
    assert "2 refs" in repr(data)
    with pytest.raises(KeyError, match="ref_id 1 is not in split 'train'"):
        data.ref(1)


def test_refs_may_share_an_annotation(tmp_path: Path) -> None:
    refs = [make_ref(0, "train", sentences=("one",)), make_ref(1, "train", sentences=("two",))]
    data = RefCOCO(write_set(tmp_path, refs))
    assert [data.ref(i).sentences[0].text for i in (0, 1)] == ["one", "two"]
    assert np.array_equal(data.mask(0), data.mask(1))


@pytest.mark.parametrize(("split", "expected"), [("testA", [0, 2]), ("testB", [1, 2]), ("val", [4])])
def test_testA_and_testB_include_refs_of_testAB(tmp_path: Path, split: str, expected: list[int]) -> None:
    splits = ["testA", "testB", "testAB", "train", "val"]
    write_set(tmp_path, [make_ref(k, s) for k, s in enumerate(splits)])
    assert [ref.ref_id for ref in RefCOCO(tmp_path, split=split)] == expected


@pytest.mark.parametrize(
    ("name", "split_by", "split"),
    [("refcoco", "google", "test"), ("refcoco+", "unc", "testB"), ("refcocog", "umd", "test")],
)
def test_other_sets_and_splits(tmp_path: Path, name: str, split_by: str, split: str) -> None:
    write_set(tmp_path, [make_ref(0, split)], name=name, split_by=split_by)
    assert len(RefCOCO(tmp_path, name, split_by, split)) == 1


def test_sentence_field(tmp_path: Path) -> None:
    write_set(tmp_path)
    for field, text in (("sent", "red circle"), ("raw", "Red Circle."), ("raw.lower", "red circle.")):
        assert RefCOCO(tmp_path, sentence_field=field).refs[0].sentences[0].text == text


@pytest.mark.parametrize(
    "folder", ["images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014"]
)
def test_finds_the_usual_image_folders(tmp_path: Path, folder: str) -> None:
    data = RefCOCO(write_set(tmp_path, images=folder))
    assert data.image_root == tmp_path / folder
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)


def test_image_root(tmp_path: Path) -> None:
    write_set(tmp_path / "set", images=None)
    write_set(tmp_path / "elsewhere", images="photos")
    data = RefCOCO(tmp_path / "set", image_root=tmp_path / "elsewhere/photos")
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("folder", "images", "image_root"),
    [
        ("train2014/", "images/train2014", None),
        ("train2014/", "train2014", None),
        ("day/one/", "images/train2014/day/one", None),
        ("JPEGImages/", "photos/JPEGImages", "photos"),
        ("JPEGImages/", "photos/JPEGImages", "photos/JPEGImages"),
    ],
)
def test_file_names_with_a_folder(tmp_path: Path, folder: str, images: str, image_root: str | None) -> None:
    prefix_file_names(write_set(tmp_path, images=images), folder)
    data = RefCOCO(tmp_path, image_root=None if image_root is None else tmp_path / image_root)
    assert data.image_path(1) == tmp_path / images / "COCO_train2014_000000000001.jpg"
    assert data.image(1).shape == (HEIGHT, WIDTH, 3)
    data.image_path(2).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing, such as .*000002\.jpg"):
        RefCOCO(tmp_path, image_root=data.image_root)


@pytest.mark.parametrize("folder", ["/etc/", "../", "train2014/../../"])
def test_rejects_file_names_outside_of_the_folder(tmp_path: Path, folder: str) -> None:
    prefix_file_names(write_set(tmp_path), folder)
    with pytest.raises(ValueError, match="points outside of its folder"):
        RefCOCO(tmp_path)


def test_missing_images_report_the_folders_tried(tmp_path: Path) -> None:
    write_set(tmp_path, images=None)
    with pytest.raises(FileNotFoundError, match="no image folder; tried") as error:
        RefCOCO(tmp_path)
    for folder in ("images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014"):
        assert str(tmp_path / folder) in str(error.value)
    write_set(tmp_path)
    (tmp_path / "images/train2014/COCO_train2014_000000000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images are missing, such as .*000002\.jpg"):
        RefCOCO(tmp_path)
    with pytest.raises(FileNotFoundError, match="image_root is not a folder"):
        RefCOCO(tmp_path, image_root=tmp_path / "nowhere")


def test_skip_unusable_counts_skipped_refs(tmp_path: Path) -> None:
    refs = [
        make_ref(0, "train"),
        make_ref(1, "train", sentences=()),
        make_ref(2, "train", sentences=("fine", " ")),
        make_ref(3, "train", sentences=("",)),
        make_ref(4, "train", ann_id=3, image_id=2),
        make_ref(5, "train", ann_id=9),
        make_ref(6, "train", image_id=9),
        make_ref(7, "train", ann_id=2, image_id=2),
        make_ref(8, "val", sentences=()),
    ]
    write_set(tmp_path, refs, segmentations={3: []})
    with pytest.raises(ValueError, match=r"ref 1 has no sentence; remove .* skip_unusable=True \(--skip-unusable\)"):
        RefCOCO(tmp_path)
    with pytest.warns(FastKDWarning, match=r"3 refs are used; skipped 2 × ref without a sentence \(e\.g\. .*ref 1 "):
        data = RefCOCO(tmp_path, skip_unusable=True)
    assert [ref.ref_id for ref in data] == [0, 2, 7]
    assert [s.text for s in data.ref(2).sentences] == ["fine"]
    expected = {
        "ref without a sentence": 2,
        "empty sentence": 2,
        "ref with an unusable segmentation": 1,
        "ref without an annotation": 1,
        "ref without an image": 1,
    }
    assert data.skipped == expected
    data.image_path(2).unlink()
    with pytest.warns(FastKDWarning, match=r"1 × ref without its image file \(e\.g\. .*000002\.jpg of ref 7"):
        data = RefCOCO(tmp_path, skip_unusable=True)
    assert data.skipped == expected | {"ref without its image file": 1}
    assert [ref.ref_id for ref in data] == [0, 2]
    assert "1 images" in repr(data)
    with pytest.raises(ValueError, match="no refs are left after skipping 1 × ref without a sentence"):
        RefCOCO(tmp_path, split="val", skip_unusable=True)


def test_skip_unusable_keeps_complete_sets_and_reports_contradictions(tmp_path: Path) -> None:
    data = RefCOCO(write_set(tmp_path), skip_unusable=True)
    assert (len(data), data.skipped) == (2, {})
    write_set(tmp_path, [make_ref(0, "train"), make_ref(1, "train", image_id=2)])
    with pytest.raises(ValueError, match="annotation 1 has image_id 1"):
        RefCOCO(tmp_path, skip_unusable=True)
    write_set(tmp_path)
    for path in (tmp_path / "images/train2014").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="images are missing"):
        RefCOCO(tmp_path, skip_unusable=True)


def test_rejects_unknown_ids(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = RefCOCO(tmp_path)
    for access, message in ((data.image, "image_id 99"), (data.image_size, "image_id 99"), (data.mask, "ref_id 99")):
        with pytest.raises(KeyError, match=f"{message} is not in split 'train' of refcoco"):
            access(99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"unknown split 'test': refcoco \(unc\) has 'train', 'val', 'testA', 'testB'"),
        ({"name": "refzoo"}, r"name='refzoo' with split_by='unc' is not a known set; known sets: refcoco \(unc\)"),
        ({"split_by": "umd"}, "split_by='umd' is not a known set"),
        ({"mask_rule": "xor"}, "mask_rule must be one of 'union', 'lavt', got 'xor'"),
        ({"sentence_field": "text"}, "sentence_field must be one of 'sent', 'raw', 'raw.lower', got 'text'"),
        ({"check_counts": True}, "has 2 refs of split 'train', but the published set has 42404"),
    ],
)
def test_rejects_bad_options(tmp_path: Path, options: dict, message: str) -> None:
    write_set(tmp_path)
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path, **options)
