"""``check_set``: every planted fault is listed with its id or file, and nothing is changed."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refcoco_files import HEIGHT, LEFT, RIGHT, WIDTH, box_mask, make_ref, write_set

from fastkd.data import check_set
from fastkd.data.check import CheckReport


class Planted:
    """A valid set of three refs in memory, to be changed and written."""

    def __init__(self, root: Path) -> None:
        self.root = write_set(root)
        self.instances = json.loads((root / "refcoco/instances.json").read_text())
        self.refs: list[Any] = [make_ref(0, "train"), make_ref(1, "val", 2, 2), make_ref(2, "train", 2, 2)]
        self.image = root / "images/train2014/COCO_train2014_000000000002.jpg"

    def write(self) -> Path:
        (self.root / "refcoco/instances.json").write_text(json.dumps(self.instances))
        (self.root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(self.refs, protocol=2))
        return self.root

    def annotation(self, **fields: Any) -> None:
        self.instances["annotations"][1] |= fields

    def picture(self, **fields: Any) -> None:
        self.instances["images"][1] |= fields

    def sentence(self, **fields: Any) -> None:
        self.refs[1]["sentences"][0] |= fields

    def save_image(self, array: np.ndarray, **options: Any) -> None:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", **options)
        self.image.write_bytes(buffer.getvalue())


OTHER_SIZE = "problem: image of another size"
PLANTS: list[tuple[str, str, Callable[[Planted], Any]]] = [
    ("problem: invalid ref", "ref number 1", lambda p: p.refs.__setitem__(1, 7)),
    ("problem: invalid ref", "ref number 1", lambda p: p.refs[1].update(ann_id="2")),
    ("problem: ref id occurs twice", "ref 0", lambda p: p.refs[1].update(ref_id=0)),
    ("problem: sentence id occurs twice", "sentence 0", lambda p: p.sentence(sent_id=0)),
    ("problem: unknown split", "ref 1", lambda p: p.refs[1].update(split="valid")),
    ("problem: ref without a sentence", "ref 1", lambda p: p.refs[1].update(sentences=[])),
    ("problem: invalid sentence", "ref 1, sentence number 0", lambda p: p.sentence(sent=3)),
    ("problem: unusable sentence", "sentence 10 (ref 1)", lambda p: p.sentence(sent=" ")),
    ("problem: truncated sentence", "sentence 10 (ref 1)", lambda p: p.sentence(sent="red", raw="Red circle.")),
    ("problem: truncated sentence", "sentence 10 (ref 1)", lambda p: p.sentence(sent="red", raw=None)),
    ("note: long sentence", "sentence 10 (ref 1)", lambda p: p.sentence(sent="a " * 19, raw="a " * 19)),
    ("problem: image not in instances.json", "ref 1", lambda p: p.refs[1].update(image_id=9)),
    ("problem: annotation not in instances.json", "ref 1", lambda p: p.refs[1].update(ann_id=9)),
    ("problem: annotation of another image", "annotation 2 (ref 1)", lambda p: p.annotation(image_id=1)),
    ("problem: annotation of another category", "annotation 2 (ref 1)", lambda p: p.annotation(category_id=3)),
    ("problem: image id occurs twice", "image 1", lambda p: p.picture(id=1)),
    ("problem: annotation id occurs twice", "annotation 1", lambda p: p.annotation(id=1)),
    ("note: repeated image entry", "image 1", lambda p: p.instances["images"].append(p.instances["images"][0])),
    ("problem: invalid image entry", "image 2", lambda p: p.picture(height=-1)),
    ("problem: invalid image entry", "image number 1", lambda p: p.picture(id="2")),
    ("problem: invalid annotation entry", "annotation number 1", lambda p: p.annotation(id=None)),
    ("problem: empty mask", "annotation 2 (ref 1)", lambda p: p.annotation(segmentation=[])),
    ("problem: empty mask", "annotation 2 (ref 1)", lambda p: p.annotation(segmentation=[[30, 30, 40, 30, 40, 40]])),
    ("problem: damaged mask", "annotation 2 (ref 1)", lambda p: p.annotation(segmentation=[[1, 2, 3]])),
    ("note: overlapping parts of a mask", "annotation 2 (ref 1)", lambda p: p.annotation(segmentation=[LEFT, RIGHT])),
    ("problem: file name outside of the folder", "image 2", lambda p: p.picture(file_name="../a.jpg")),
    ("problem: missing image", "000000000002.jpg", lambda p: p.image.unlink()),
    ("problem: unreadable image", "000000000002.jpg", lambda p: p.image.write_bytes(p.image.read_bytes()[:300])),
    (OTHER_SIZE, "000000000002.jpg", lambda p: p.save_image(np.zeros((9, 9, 3), np.uint8))),
    ("note: EXIF orientation", "000000000002.jpg", lambda p: p.save_image(rotated(), exif=turned(6))),
    (
        "problem: image of another size",
        "000000000002.jpg",
        lambda p: p.save_image(rotated().swapaxes(0, 1), exif=turned(6)),
    ),
    ("problem: link out of the folder", "000000000002.jpg", lambda p: link_out(p.image)),
    ("problem: link out of the folder", "train2014", lambda p: link_out(p.image.parent)),
    ("problem: no image folder", "2 images are not checked", lambda p: p.image.parent.rename(p.root / "elsewhere")),
]


def rotated() -> np.ndarray:
    return np.zeros((WIDTH, HEIGHT, 3), np.uint8)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def link_out(path: Path) -> None:
    elsewhere = path.parents[3] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def found(report: CheckReport) -> list[tuple[str, str]]:
    findings = [each for part in report.sets for each in part.findings if each.kind != "another number of refs"]
    return [(f"{each.level}: {each.kind}", each.where) for each in findings]


def content(root: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_valid_set_has_no_problems(tmp_path: Path) -> None:
    report = check_set(Planted(tmp_path).write())
    assert found(report) == []
    assert dict(report.sets[0].counts["train"]) == {"refs": 2, "sentences": 6, "images": 2}
    assert "train: 2 refs, 6 sentences, 2 images" in str(report)
    assert str(report).endswith("0 problems, 4 notes")  # four splits of other sizes than the published ones
    assert report.to_dict()["sets"][0]["findings"][0]["kind"] == "another number of refs"


@pytest.mark.parametrize(
    ("kind", "where", "plant"), PLANTS, ids=[f"{n} {kind}" for n, (kind, _, _) in enumerate(PLANTS)]
)
def test_finds(tmp_path: Path, kind: str, where: str, plant: Callable[[Planted], Any]) -> None:
    planted = Planted(tmp_path / "set")
    plant(planted)
    before = content(planted.write())
    report = check_set(tmp_path / "set")
    assert any(each == kind and place.endswith(where) for each, place in found(report)), found(report)
    assert kind.removeprefix("problem: ").removeprefix("note: ") in str(report)
    assert content(tmp_path / "set") == before


def test_finds_everything_at_once(tmp_path: Path) -> None:
    planted = Planted(tmp_path)
    planted.sentence(sent="")
    planted.annotation(segmentation=[], image_id=1)
    planted.refs.append(make_ref(2, "test", 1, 1))
    planted.image.unlink()
    kinds = {kind for kind, _ in found(check_set(planted.write()))}
    assert kinds == {
        "problem: unusable sentence",
        "problem: empty mask",
        "problem: annotation of another image",
        "problem: ref id occurs twice",
        "problem: sentence id occurs twice",
        "problem: unknown split",
        "problem: missing image",
    }


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    planted = Planted(tmp_path)
    planted.refs[1]["split"] = "\x1b[2Jval"
    assert "\x1b" not in str(check_set(planted.write()))


def test_headers_are_enough_without_images(tmp_path: Path) -> None:
    planted = Planted(tmp_path)
    planted.image.write_bytes(planted.image.read_bytes()[:-40])
    planted.write()
    assert found(check_set(tmp_path, images=False)) == []
    assert [kind for kind, _ in found(check_set(tmp_path))] == ["problem: unreadable image"]


def test_folders(tmp_path: Path) -> None:
    for name, array in (("a.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8)), ("m.png", box_mask(1, 1, 5, 5))):
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"")
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "empty.png")
    row = {"image": "a.png", "mask": "m.png", "sentence": "the cup"}
    rows = [
        row,
        {**row, "mask": None, "id": 0},
        {"image": "a.png"},
        {**row, "sentence": ["", "b " * 30]},
        {**row, "sentence": []},
        {**row, "mask": "empty.png"},
        {**row, "mask": "broken.png"},
        {**row, "mask": [LEFT, RIGHT]},
        {**row, "image": "broken.png"},
        {**row, "image": "b.png"},
        {**row, "mask": "n.png"},
        {**row, "image": "../a.png"},
    ]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = content(tmp_path)
    report = check_set(tmp_path)
    line = f"{tmp_path}/val.jsonl, line"
    assert sorted(found(report)) == sorted(
        [
            ("problem: id occurs twice", f"{line} 2"),
            ("problem: invalid row", f"{line} 3 has no 'mask'"),
            ("problem: unusable sentence", f"{line} 4"),
            ("note: long sentence", f"{line} 4"),
            ("problem: ref without a sentence", f"{line} 5"),
            ("problem: empty mask", f"{line} 6"),
            ("problem: damaged mask", f"{line} 7"),
            ("note: overlapping parts of a mask", f"{line} 8"),
            ("problem: unreadable image", "broken.png"),
            ("problem: missing image", "b.png"),
            ("problem: missing mask", "n.png"),
            ("problem: invalid row", f"{line} 12 has file name '../a.png', which points outside of its folder"),
        ]
    )
    assert report.sets[0].counts["val"]["refs"] == 10
    assert content(tmp_path) == before
    rows = [{**row, "sent_id": [1]}, row, {**row, "sent_id": [2]}]  # the second is number 1 by its place
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert found(check_set(tmp_path)) == [("problem: sent_id occurs twice", f"{line} 2")]
    (tmp_path / "val.jsonl").write_text("\n")
    assert found(check_set(tmp_path)) == [("problem: no rows", str(tmp_path / "val.jsonl"))]


def test_unreadable_sets(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        check_set(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no set"):
        check_set(tmp_path)
    planted = Planted(tmp_path)
    planted.write()
    (tmp_path / "refcoco/instances.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read as JSON"):
        check_set(tmp_path)
    (tmp_path / "val.jsonl").write_text("")
    kinds = [kind for kind, _ in found(check_set(tmp_path))]
    assert sorted(kinds) == ["problem: no rows", "problem: unreadable set"]
