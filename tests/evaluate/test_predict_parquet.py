"""Prediction for parquet files, whose images are files or stored in the file itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("pyarrow", reason="needs the [stream] extra")

import pyarrow
from PIL import Image
from pyarrow.parquet import write_table

from fastkd.cli import main
from fastkd.data.requests import requests_of_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two images of different sizes, one of them below a folder, and a damaged one."""
    root, random = tmp_path / "pictures", np.random.default_rng(0)
    for name, size in (("b.jpg", (64, 64)), ("more/c.PNG", (50, 70))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name)
    (root / "damaged.png").write_bytes((root / "more/c.PNG").read_bytes()[:200])
    return root


def predicted(path: Path, out: Path) -> dict:
    """Predict the rows of a file, of which one at least cannot be read."""
    with pytest.raises(SystemExit, match="1"):
        main(["predict", str(path), "--model", "shapes", "--out", str(out)])
    return json.loads((out / "predictions.json").read_text())


@pytest.mark.parametrize("stored", [False, True])
def test_parquet_predicts_what_jsonl_does(folder: Path, tmp_path: Path, stored: bool) -> None:
    names, texts, ids = ["b.jpg", "more/c.PNG", "damaged.png"], [["red", "blue"], ["red"], ["green"]], ["r1", "7", None]
    records = [{"image": name, "sentence": text, "id": id} for name, text, id in zip(names, texts, ids, strict=True)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, records)))
    images = [(folder / name).read_bytes() for name in names] if stored else names
    table = pyarrow.table({"image": images, "mask": [None] * 3, "sentence": texts, "id": ids})
    write_table(table, folder / "set.parquet", row_group_size=2)
    lines, rows = (predicted(folder / f"set.{kind}", tmp_path / kind) for kind in ("jsonl", "parquet"))
    assert [image["file_name"] for image in lines["images"]] == names[:2]
    assert len(list((tmp_path / "parquet/overlays").iterdir())) == 3
    if stored:
        assert [image["file_name"] for image in rows["images"]] == ["set.parquet/0", "set.parquet/1"]
        assert [error["where"] for error in rows["errors"]] == ["set.parquet/2"]
        for found in (lines, rows):  # all but the names is equal
            for key, named in (
                ("images", ("file_name",)),
                ("annotations", ("overlay",)),
                ("errors", ("where", "error")),
            ):
                found[key] = [{k: value for k, value in row.items() if k not in named} for row in found[key]]
    assert rows == lines


def test_each_unusable_row_is_reported(folder: Path, tmp_path: Path) -> None:
    image = (folder / "b.jpg").read_bytes()
    cases = {
        "stored": ([image, b"", None], ["can't be read as an image", "image holds no bytes"]),
        "named": (["b.jpg", "../b.jpg", None], ["points outside of its folder", "expected the name of a file"]),
    }
    for kind, (images, messages) in cases.items():
        table = pyarrow.table({"image": images, "sentence": ["red"] * 3})
        write_table(table, folder / f"{kind}.parquet")
        content = predicted(folder / f"{kind}.parquet", tmp_path / kind)
        assert len(content["annotations"]) == 1
        for error, message in zip(content["errors"], messages, strict=True):
            assert message in error["error"]


def test_files_that_are_not_such_tables_are_refused(tmp_path: Path) -> None:
    write_table(pyarrow.table({"image": ["a.png"], "mask": [None]}), tmp_path / "set.parquet")
    with pytest.raises(ValueError, match="has no column 'sentence': expected image, sentence and perhaps id"):
        list(requests_of_file(tmp_path / "set.parquet"))
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "set.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="can't be read as parquet"):
        list(requests_of_file(tmp_path / "torn.parquet"))
    write_table(pyarrow.table({"image": [], "sentence": []}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="is empty"):
        list(requests_of_file(tmp_path / "none.parquet"))
