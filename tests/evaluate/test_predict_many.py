"""Prediction for folders and JSONL files: COCO masks, overlays, an error per record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")

from PIL import Image
from pycocotools.coco import COCO

from fastkd.cli import main
from fastkd.cli._models import shapes_teacher
from fastkd.data.requests import Failed, requests_of_file, requests_of_folder
from fastkd.evaluate import predict, predict_batches
from fastkd.models import RISModel

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def teacher() -> RISModel:
    return RISModel.from_pretrained(shapes_teacher())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with three images of different sizes, one of them below a folder, and a damaged one."""
    root = tmp_path / "pictures"
    for name, size in (("a.png", (40, 30)), ("b.jpg", (64, 64)), ("more/c.PNG", (50, 70)), (".hidden/d.png", (8, 8))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name)
    (root / "damaged.png").write_bytes((root / "a.png").read_bytes()[:200])
    (root / "notes.txt").write_text("not an image")
    return root


def result(out: Path) -> dict:
    return json.loads((out / "predictions.json").read_text())


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_predict_what_single_calls_predict(teacher, folder, batch_size):
    records = [(folder / name, text) for name in ("a.png", "b.jpg") for text in ("red circle", "the small blue thing")]
    records.insert(1, (folder / "damaged.png", "red"))
    records.insert(3, (folder / "a.png", " "))
    found = list(predict_batches(teacher, records, batch_size=batch_size))
    assert [type(each).__name__ for each in found] == [
        "Prediction", "ValueError", "Prediction", "ValueError", "Prediction", "Prediction"
    ]  # fmt: skip
    for (path, sentence), each in zip(records, found, strict=True):
        if isinstance(each, Exception):
            with pytest.raises(type(each)) as raised:
                predict(teacher, path, sentence)
            assert str(raised.value) == str(each)
        else:
            single = predict(teacher, path, sentence)
            np.testing.assert_allclose(each.probability, single.probability, atol=1e-5)
            assert (each.mask != single.mask).mean() < 1e-3
            assert each.sentence == sentence


def test_nan_of_one_record_does_not_affect_the_others(teacher, folder, monkeypatch):
    forward = RISModel.forward

    def damaged(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits[1, 0, 3, 4] = torch.nan
        return output

    monkeypatch.setattr(RISModel, "forward", damaged)
    found = list(predict_batches(teacher, [(folder / "a.png", text) for text in ("red", "blue", "green")]))
    assert [isinstance(each, FloatingPointError) for each in found] == [False, True, False]


def test_rejects_a_batch_size_below_1(teacher):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        list(predict_batches(teacher, [], batch_size=0))


def test_folder_gives_coco_masks_and_overlays(teacher, folder, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="1"):
        main(
            ["predict", str(folder), "red circle", "blue", "--model", "shapes", "--out", str(out), "--batch-size", "4"]
        )
    printed = capsys.readouterr()
    assert "6 of 8 records" in printed.out
    assert "damaged.png can't be read as an image" in printed.err
    content = result(out)
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.jpg", "more/c.PNG"]
    assert [(error["where"], error["sentence"]) for error in content["errors"]] == [
        ("damaged.png", "red circle"),
        ("damaged.png", "blue"),
    ]
    coco = COCO(out / "predictions.json")
    for image in coco.loadImgs(coco.getImgIds()):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert [annotation["sentence"] for annotation in annotations] == ["red circle", "blue"]
        for annotation in annotations:
            found = predict(teacher, folder / image["file_name"], annotation["sentence"])
            mask = coco.annToMask(annotation).astype(bool)
            assert mask.shape == found.mask.shape == (image["height"], image["width"])
            assert (mask != found.mask).mean() < 1e-3
            assert annotation["score"] == pytest.approx(found.score, abs=1e-4)
            assert annotation["area"] == mask.sum()
            drawn = Image.open(out / annotation["overlay"])
            assert max(drawn.size) == 384
    assert len(list((out / "overlays").iterdir())) == 6


def test_output_in_the_folder_of_the_images_and_long_names(folder, capsys):
    for name in ("n" * 250, "n" + "é" * 124):  # é takes two bytes
        (folder / "a.png").rename(folder / f"{name}.png")
        Image.new("RGB", (9, 9)).save(folder / "a.png")
    (folder / "damaged.png").unlink()
    for _ in range(2):  # the second time, the overlays of the first are not images to predict
        assert main(["predict", str(folder), "red", "--model", "shapes", "--out", str(folder / "out")]) == 0
    content = result(folder / "out")
    names = [image["file_name"] for image in content["images"]]
    assert names == ["a.png", "b.jpg", "more/c.PNG", "n" * 250 + ".png", "n" + "é" * 124 + ".png"]
    overlays = [annotation["overlay"] for annotation in content["annotations"]]
    assert all(overlay.isprintable() for overlay in overlays)  # no half of a character
    assert sorted(overlays) == sorted(f"overlays/{path.name}" for path in (folder / "out" / "overlays").iterdir())


def test_jsonl_names_images_sentences_and_ids(teacher, folder, tmp_path, capsys):
    lines = [
        {"image": "b.jpg", "mask": "ignored.png", "sentence": ["red", "blue"], "id": "r1"},
        {"image": "more/c.PNG", "sentence": "red", "id": 7},
        {"image": "b.jpg", "sentence": "green"},
    ]
    (tmp_path / "set.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    arguments = ["predict", str(tmp_path / "set.jsonl"), "--image-root", str(folder), "--no-overlays"]
    assert main([*arguments, "--model", "shapes", "--out", str(out)]) == 0
    content = result(out)
    found = [(a["image_id"], a["sentence"], a.get("record")) for a in content["annotations"]]
    assert found == [(1, "red", "r1"), (1, "blue", "r1"), (2, "red", 7), (1, "green", None)]
    assert content["errors"] == []
    assert [path.name for path in out.iterdir()] == ["predictions.json"]


def test_each_unusable_line_is_reported(folder, tmp_path, capsys):
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    lines = {
        '{"image": "../outside.png", "sentence": "red"}': "points outside of its folder",
        '{"image": "/etc/hostname", "sentence": "red"}': "points outside of its folder",
        '{"image": "link.png", "sentence": "red"}': "is a link to",
        '{"image": "a.png"}': "must be an object with image and sentence",
        '{"image": "a.png", "sentence": []}': "must be a string or a list of strings, got []",
        '{"image": "a.png", "sentence": " "}': "its sentence is empty",
        '{"image": "a.png", "sentence": "\\u200b"}': "its sentence holds no visible character",
        '{"image": "a.png", "sentence": "red", "id": 1.5}': "id must be an integer or a short string",
        '{"image": 3, "sentence": "red"}': "expected the name of a file",
        "[" * 100_000: "can't be read as JSON",
        '{"image": "absent.png", "sentence": "red"}': "no image at",
        '{"image": "a.png", "sentence": "red"}': "",
    }
    (folder / "set.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match="1"):
        main(["predict", str(folder / "set.jsonl"), "--model", "shapes", "--out", str(tmp_path / "out")])
    content = result(tmp_path / "out")
    assert len(content["annotations"]) == 1
    for number, (error, message) in enumerate(zip(content["errors"], lines.values(), strict=False), start=1):
        assert message in error["error"], error
        assert error["where"].endswith(f"line {number}") or error["where"] == "absent.png"
    assert len(content["errors"]) == len(lines) - 1
    assert "and 6 more under 'errors'" in capsys.readouterr().err


def test_nothing_is_written_if_no_record_is_usable(tmp_path, capsys):
    (tmp_path / "set.jsonl").write_text('{"image": "none.png", "sentence": "red"}\n{}\n')
    assert main(["predict", str(tmp_path / "set.jsonl"), "--model", "shapes", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "none of 2 records could be predicted: none.png: no image at" in error
    assert "(and 1 more)" in error
    assert not (tmp_path / "out").exists()


def test_rejects_folders_and_files_without_records(tmp_path):
    with pytest.raises(ValueError, match="has no image file"):
        list(requests_of_folder(tmp_path, ["red"]))
    (tmp_path / "set.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="is empty: expected rows like"):
        list(requests_of_file(tmp_path / "set.jsonl"))
    (tmp_path / "a.png").symlink_to("/etc/hostname")
    assert isinstance(next(requests_of_folder(tmp_path, ["red"])), Failed)
