"""RefCOCO files: untrusted pickles, damaged files, contradictions."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refcoco_files import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    append_instances,
    box_mask,
    make_ref,
    write_set,
)

from fastkd.data import RefCOCO
from fastkd.errors import FastKDWarning


class TouchesFile:
    """Create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_rejects_a_pickle_with_code_without_running_it(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    write_set(tmp_path, pickle.dumps([{"ref_id": TouchesFile(marker)}]))
    with pytest.raises(pickle.UnpicklingError, match=r"refs\(unc\)\.p names pathlib.*not trusted") as error:
        RefCOCO(tmp_path)
    assert "original source" in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("harmless", [OrderedDict(a=1), complex(1, 2), {1, 2}, np.int64(3), bytearray(b"x")])
@pytest.mark.parametrize("protocol", [0, 2])
def test_rejects_harmless_classes_too(tmp_path: Path, harmless: Any, protocol: int) -> None:
    write_set(tmp_path, pickle.dumps([harmless], protocol=protocol))
    with pytest.raises(pickle.UnpicklingError, match="not trusted"):
        RefCOCO(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", pickle.dumps([make_ref(0, "train")])[:-20], b"\x80\x02}K\x01s."]
)
def test_rejects_a_damaged_pickle(tmp_path: Path, content: bytes) -> None:
    write_set(tmp_path, content)
    with pytest.raises(pickle.UnpicklingError, match=r"refs\(unc\)\.p can't be read as a pickle .*download it again"):
        RefCOCO(tmp_path)


def python2_pickle(refs: list[dict], text: str, stored: bytes) -> bytes:
    """Return a Python 2 pickle in which ``text`` is the byte string ``stored``."""
    unicode = b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()
    content = pickle.dumps(refs, protocol=2)
    assert unicode in content
    return content.replace(unicode, b"U" + bytes([len(stored)]) + stored)


def test_python_2_strings_are_read_as_utf8_or_latin1(tmp_path: Path) -> None:
    refs = [make_ref(0, "train", sentences=("the cafe",))]
    write_set(tmp_path, python2_pickle(refs, "the cafe", "the café".encode()))
    assert RefCOCO(tmp_path).refs[0].sentences[0].text == "the café"
    write_set(tmp_path, python2_pickle(refs, "the cafe", "the café".encode("latin1")))
    with pytest.warns(FastKDWarning, match="not utf-8.*latin1"):
        data = RefCOCO(tmp_path)
    assert data.refs[0].sentences[0].text == "the café"


def test_missing_files_report_path_and_layout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"refcoco.refs\(unc\)\.p doesn't exist; expected layout") as error:
        RefCOCO(tmp_path / "nowhere")
    assert "<root>/refcoco/{instances.json" in str(error.value)
    (write_set(tmp_path) / "refcoco/instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json doesn't exist; expected layout"):
        RefCOCO(tmp_path)


def test_rejects_damaged_json_and_missing_entries(tmp_path: Path) -> None:
    write_set(tmp_path, [make_ref(0, "train", image_id=9)])
    with pytest.raises(ValueError, match=r"no image 9, which ref 0"):
        RefCOCO(tmp_path)
    write_set(tmp_path, [make_ref(0, "train", ann_id=9)])
    with pytest.raises(ValueError, match=r"no annotation 9, which ref 0"):
        RefCOCO(tmp_path)
    path = write_set(tmp_path) / "refcoco/instances.json"
    for content, message in (
        ("{", "can't be read as JSON"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{}], "annotations": []}', "without the field 'id'"),
        ('{"images": [1], "annotations": []}', "is not a COCO instances file"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            RefCOCO(tmp_path)


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"a": 1}, "must hold a list of dicts, got dict"),
        ([{**make_ref(0, "train"), "ann_id": [1]}], r"ann_id of ref number 0 must be int, got \[1\]"),
        (
            [{k: v for k, v in make_ref(0, "train").items() if k != "split"}],
            "split of ref number 0 must be str, got None",
        ),
        ([make_ref(0, "train"), make_ref(0, "train")], "ref_id 0 more than once"),
        (
            [make_ref(0, "train"), {**make_ref(1, "train"), "sentences": make_ref(0, "train")["sentences"]}],
            "sent_id 0 more than",
        ),
        (
            [{**make_ref(0, "train"), "sentences": [{"sent": t, "sent_id": 8} for t in ("red", "left")]}],
            "sent_id 8 more than once",
        ),
        ([make_ref(0, "train", sentences=())], "ref 0 has no sentence"),
        ([make_ref(0, "train", sentences=("fine", " "))], "sentence 1 of ref 0 is empty in the field 'sent'"),
        ([{**make_ref(0, "train"), "sentences": [{"raw": "x"}]}], "a sentence of ref 0 has no 'sent'"),
        ([{**make_ref(0, "train"), "sentences": [{"sent": "x", "sent_id": "y"}]}], "or no 'sent_id'"),
        ([make_ref(0, "val"), make_ref(1, "val")], r"no ref of split 'train'; it has val \(2\)"),
    ],
)
def test_rejects_bad_refs(tmp_path: Path, refs: Any, message: str) -> None:
    write_set(tmp_path, refs)
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"annotations": [{"id": 1, "image_id": 2, "category_id": 7, "segmentation": [LEFT]}]},
            "annotation 1 .image_id",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 1, "category_id": 7, "segmentation": [RIGHT]}]},
            "annotation 1 .segment",
        ),
        (
            {"annotations": [{"id": 1, "image_id": 1, "category_id": 8, "segmentation": [LEFT]}]},
            "annotation 1 .category",
        ),
        ({"images": [{"id": 1, "file_name": "b.jpg", "height": HEIGHT, "width": WIDTH}]}, "image 1 .file_name differs"),
        (
            {"images": [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "height": 13, "width": WIDTH}]},
            "image 1 .height differs: 12 and 13",
        ),
        ({"categories": [{"id": 7, "name": "square"}]}, "category 7 .name differs: 'circle' and 'square'"),
    ],
)
def test_rejects_different_entries_with_one_id(tmp_path: Path, more: dict, message: str) -> None:
    append_instances(write_set(tmp_path), **more)
    with pytest.raises(ValueError, match=rf"instances\.json has two different entries for {message}"):
        RefCOCO(tmp_path)


def test_accepts_repetitions_and_unused_ambiguous_ids(tmp_path: Path) -> None:
    path = write_set(tmp_path) / "refcoco/instances.json"
    content = json.loads(path.read_text())
    unused = [{"id": 5, "image_id": i, "category_id": 7, "segmentation": [LEFT]} for i in (1, 2)]
    append_instances(
        tmp_path,
        annotations=[{**content["annotations"][0], "area": 36.0}, *unused],
        images=content["images"],
        categories=content["categories"],
    )
    assert np.array_equal(RefCOCO(tmp_path).mask(0), box_mask(1, 2, 7, 8))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (
            make_ref(3, "train", image_id=2, ann_id=1),
            "annotation 1 has image_id 1, but ref 3, which refers to it, has 2",
        ),
        ({**make_ref(3, "train"), "category_id": 9}, "annotation 1 has category_id 7, but ref 3, .* has 9"),
    ],
)
def test_rejects_a_ref_that_contradicts_its_annotation(tmp_path: Path, ref: dict, message: str) -> None:
    write_set(tmp_path, [make_ref(0, "train"), ref])
    with pytest.raises(ValueError, match=message):
        RefCOCO(tmp_path)


@pytest.mark.parametrize("size", [(0, WIDTH), (HEIGHT, -1), (10**6, 10**6)])
def test_rejects_an_impossible_image_size(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_set(tmp_path) / "refcoco/instances.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"height": size[0], "width": size[1]}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image 1 cannot be "):
        RefCOCO(tmp_path)
