"""Folders of images and masks with JSONL or parquet."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refcoco_files import HEIGHT, LEFT, WIDTH, box_mask
from stream_tools import Words

from fastkd.data import RefCOCO, ReferDataset, ReferFolder, ShardDataset, open_set, write_shards
from fastkd.errors import FastKDWarning

MASK = box_mask(1, 2, 7, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ROW = {"image": "images/a.png", "mask": "masks/a.png", "sentence": "the red cup"}


def png(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root: Path, *rows: Any, split: str = "train") -> Path:
    for name, array in (("images/a.png", PIXELS), ("masks/a.png", MASK.astype(np.uint8) * 255)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(array))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path.parent


def test_jsonl_with_mask_files_segmentations_and_no_target(tmp_path: Path) -> None:
    runs = np.diff(np.flatnonzero(np.diff(np.r_[2, MASK.T.ravel(), 2]))).tolist()
    rle = {"size": [HEIGHT, WIDTH], "counts": runs}
    rows = [
        ROW,
        {**ROW, "mask": [LEFT], "sentence": ["one", "two"]},
        "",
        {**ROW, "mask": rle, "id": "c"},
        {**ROW, "mask": None, "id": 7},
    ]
    data = ReferFolder(write_folder(tmp_path / "cups", *rows), "train")
    assert [ref.ref_id for ref in data] == [0, 1, "c", 7]
    assert [sentence.sent_id for ref in data for sentence in ref.sentences] == [0, 1, 2, 3, 4]
    for ref in data:
        assert np.array_equal(data.mask(ref.ref_id), MASK if ref.targets else np.zeros_like(MASK))
        assert np.array_equal(data.image(ref.image_id), PIXELS)
    assert {ref.image_id for ref in data} == {0}
    assert repr(data) == f"ReferFolder({str(tmp_path / 'cups')!r}, 'train': 4 refs, 5 sentences, 1 images)"
    samples = ReferDataset(data, Words(), image_size=8, sentences="all")
    assert [samples[n]["no_target"] for n in range(5)] == [False, False, False, False, True]
    assert samples.refcoco.name == "cups"


@pytest.mark.parametrize("stored", ["bytes", "named bytes", "struct", "names"])
def test_parquet(tmp_path: Path, stored: str) -> None:
    image, mask = png(PIXELS), png(MASK)
    rows = []
    for number in range(6):  # in row groups of 2; ref 5 has no target
        row = {"image": image, "mask": mask if number != 3 else png(~MASK), "sentence": [f"cup {number}"], "id": number}
        if stored == "struct":
            row |= {key: {"bytes": row[key], "path": None} for key in ("image", "mask")}
        row = ROW | {"id": number} if stored == "names" else row
        row |= {"image_name": "a.jpg" if number < 4 else "b.jpg"} if stored == "named bytes" else {}
        rows.append(row | {"mask": None} if number == 5 else row)
    write_folder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    data = ReferFolder(write_parquet(tmp_path / "train.parquet", rows))
    assert len({ref.image_id for ref in data}) == {"names": 1, "named bytes": 2}.get(stored, 6)
    assert [bool(ref.targets) for ref in data] == [True] * 5 + [False]
    for number in (4, 0, 3, 2, 1, 5):
        expected = np.zeros_like(MASK) if number == 5 else ~MASK if number == 3 and stored != "names" else MASK
        assert np.array_equal(data.image(data.ref(number).image_id), PIXELS)
        assert np.array_equal(data.mask(number), expected)


def test_parquet_with_rles_of_the_library_datasets(tmp_path: Path) -> None:
    rows = [{"image": png(PIXELS), "mask": {"size": [HEIGHT, WIDTH], "counts": "R1X7"}, "sentence": "cup"}]
    folder = write_parquet(tmp_path / "val.parquet", rows)
    with pytest.raises(ValueError, match=r"val\.parquet, row 0 has an RLE whose runs do not fill"):
        ReferFolder(folder, "val").mask(0)


def test_the_same_samples_as_refcoco(tmp_path: Path) -> None:
    from refcoco_files import write_set

    refcoco = RefCOCO(write_set(tmp_path / "set"))
    rows = [
        {
            "image": refcoco.image_name(ref.image_id),
            "mask": refcoco._segmentations[ref.ann_id],
            "sentence": [sentence.text for sentence in ref.sentences],
            "id": ref.ref_id,
        }
        for ref in refcoco
    ]
    folder = ReferFolder(write_folder(tmp_path / "folder", *rows), image_root=refcoco.image_root)
    ours, theirs = (ReferDataset(data, Words(), image_size=16, sentences="all") for data in (folder, refcoco))
    assert len(ours) == len(theirs)
    for n in range(len(ours)):
        assert ours[n]["image"].equal(theirs[n]["image"])
        assert ours[n]["mask"].equal(theirs[n]["mask"])
        assert (ours[n]["sentence"], ours[n]["ref_id"]) == (theirs[n]["sentence"], theirs[n]["ref_id"])


def test_shards_of_a_folder(tmp_path: Path) -> None:
    data = ReferFolder(write_folder(tmp_path / "cups", ROW))
    write_shards(data, tmp_path / "shards")
    [sample] = list(ShardDataset(tmp_path / "shards", Words(), image_size=8))
    assert sample["image"].equal(ReferDataset(data, Words(), image_size=8)[0]["image"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"train\.jsonl, line 1 can't be read as JSON"),
        ("[" * 10_000, r"line 1 can't be read as JSON"),
        ([1], r"line 1 must be an object with image, mask and sentence, got \[1\]"),
        ({"image": "a.png", "mask": None}, "line 1 has no 'sentence'"),
        ({**ROW, "image": "../a.png"}, "points outside of its folder"),
        ({**ROW, "image": 3}, "line 1 has file name 3"),
        ({**ROW, "mask": "/etc/passwd"}, "points outside of its folder"),
        ({**ROW, "mask": 3}, "mask must be a file name, a segmentation or null, got 3"),
        ({**ROW, "sentence": ["a", 3]}, "sentence must be a string or a list of strings"),
        ({**ROW, "sentence": []}, "line 1 has no sentence"),
        ({**ROW, "sentence": " "}, "its sentence is empty"),
        ({**ROW, "sentence": "\u200b \ufeff"}, r"its sentence holds no visible character \('\\u200b \\ufeff'\)"),
        ({**ROW, "id": 1.5}, "id must be an integer or a short string, got 1.5"),
        ({**ROW, "id": True}, "id must be an integer or a short string, got True"),
    ],
)
def test_rejects_rows(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferFolder(write_folder(tmp_path, row))


@pytest.mark.parametrize("sentence", ["ред", "वह", "🎈", "?", "\u200bred"])
def test_accepts_sentences_in_any_script(tmp_path: Path, sentence: str) -> None:
    [ref] = ReferFolder(write_folder(tmp_path, {**ROW, "sentence": sentence}))
    assert ref.sentences[0].text == sentence


def test_rejects_repeated_ids_missing_files_and_links(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl has ref_id 1 more than once"):
        ReferFolder(write_folder(tmp_path, {**ROW, "id": 1}, ROW))
    for field in ("image", "mask"):
        with pytest.raises(FileNotFoundError, match=rf"1 of 1 {field} files are missing, such as .*b\.png of .*line 1"):
            ReferFolder(write_folder(tmp_path, {**ROW, field: "b.png"}))
    with pytest.raises(ValueError, match="has no rows"):
        ReferFolder(write_folder(tmp_path))
    (tmp_path / "set").mkdir()
    write_folder(tmp_path / "set", ROW)
    (tmp_path / "set/masks/a.png").rename(tmp_path / "b.png")
    (tmp_path / "set/masks/a.png").symlink_to(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"a\.png is a link to .*b\.png, outside of"):
        ReferFolder(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"no val\.jsonl or val\.parquet in .*; splits there: train"):
        ReferFolder(tmp_path, "val")
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has train\.jsonl and train\.parquet: remove one"):
        ReferFolder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="can't be read as parquet"):
        ReferFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(MASK.astype(np.uint8) * 255, "JPEG"), "JPEG changes the values of a mask"),
        (png(MASK[:5].astype(np.uint8)), r"its mask is \(5, 20\), its image \(12, 20\)"),
        (png(np.zeros_like(MASK)), "its mask covers no pixel; write null"),
        (b"\x89PNG", "its mask can't be read"),
    ],
)
def test_rejects_masks_and_skips_them_if_asked(tmp_path: Path, content: bytes, message: str) -> None:
    root = write_folder(
        tmp_path, ROW, {**ROW, "mask": "masks/b.png"}, {**ROW, "mask": "c.png"}, {**ROW, "sentence": ""}
    )
    (root / "masks/b.png").write_bytes(content)
    (root / "c.png").write_bytes(content)
    write_folder(tmp_path, ROW, {**ROW, "mask": "masks/b.png"})
    with pytest.raises(ValueError, match=message):
        ReferFolder(root).mask(1)
    write_folder(tmp_path, ROW, {**ROW, "mask": "masks/b.png"}, {**ROW, "mask": "d.png"}, {**ROW, "sentence": ""})
    with pytest.warns(FastKDWarning, match=f"1 refs are used; skipped .*{message}"):
        data = ReferFolder(root, skip_unusable=True)
    assert data.skipped == {
        "ref without its image or mask file": 1,
        "empty sentence": 1,
        "ref without a sentence": 1,
        "ref with a damaged image or mask": 1,
    }


def test_open_set(tmp_path: Path) -> None:
    write_folder(tmp_path, ROW, split="val")
    assert isinstance(open_set(tmp_path, "val", "folder"), ReferFolder)
    with pytest.raises(FileNotFoundError) as error:
        open_set(tmp_path, "val")
    assert "holds val.jsonl: read it with the name 'folder' (--dataset folder)" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="a folder has no split_by, got 'unc'"):
        open_set(tmp_path, "val", "folder", "unc")
    with pytest.raises(ValueError, match="a folder has neither sentence_field nor check_counts"):
        open_set(tmp_path, "val", "folder", sentence_field="raw")
