"""Folders and mixtures as training data on the command line; ``fastkd data``."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("timm", reason="needs the [ris] extra")

from fastkd.cli import main
from fastkd.cli._data import DataArgs, MixArgs
from fastkd.cli._models import load_model
from fastkd.data import RefCOCO, ReferFolder, make_shapes
from fastkd.errors import FastKDWarning
from fastkd.report import contact_sheet

SHORT = ["--steps", "2", "--batch-size", "4", "--threads", "1", "--log-every", "1", "--no-check"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "data"
    make_shapes(root, images=20, image_size=64)
    return root


@pytest.mark.parametrize("command", ["make-shapes", "make-shapesref"])
def test_making_a_set_prints_its_size(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    assert main(["data", command, str(root), "--images", "25", "--image-size", "32"]) == 0
    train = RefCOCO(root, split="train")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{root}: 25 images, ")
    refs, sentences = (int(number) for number in re.findall(r"(\d+) (?:refs|sentences)", printed))
    assert refs > len(train)
    assert sentences > train.sentence_count


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("refcoco+", (None, "refcoco+", None, 1.0, None)),
        ("refcocog/google=0.5", (None, "refcocog", "google", 0.5, None)),
        ("data/cups:folder", (Path("data/cups"), "folder", None, 1.0, None)),
        ("C:/data/cups:folder=2,size=300", (Path("C:/data/cups"), "folder", None, 2.0, 300)),
    ],
)
def test_mix_arguments(text: str, parts: tuple[object, ...]) -> None:
    parsed = MixArgs.parse(text)
    assert (parsed.root, parsed.dataset, parsed.split_by, parsed.weight, parsed.size) == parts
    assert MixArgs.parse(parsed.absolute()).absolute() == parsed.absolute()


@pytest.mark.parametrize("text", ["", ":folder=", "refcoco=x", "refcoco,size=1.5", "refcoco,weight=2", "a:="])
def test_rejects_other_mix_arguments(text: str) -> None:
    with pytest.raises(ValueError, match=r"--mix must be \[ROOT:\]DATASET"):
        MixArgs.parse(text)


def test_trains_on_a_mixture_and_names_its_sets(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cups = tmp_path / "cups"
    cups.mkdir()
    image = next(shapes.rglob("*.jpg"))
    line = {"image": image.name, "mask": [[0, 0, 9, 0, 9, 9]], "sentence": "the cup"}
    (cups / "train.jsonl").write_text(json.dumps(line) + "\n")
    (cups / image.name).write_bytes(image.read_bytes())
    out = tmp_path / "run"
    arguments = [
        "train",
        "--data",
        str(shapes),
        "--mix",
        f"{cups}:folder=3",
        "--tokenizer",
        "shapes",
        "--out",
        str(out),
    ]
    assert main([*arguments, *SHORT]) == 0
    assert "cups:folder 3 of 1" in capsys.readouterr().out
    assert f"{cups}:folder=3" in (out / "config.yaml").read_text()
    start = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert start["sets"]["cups:folder"] == 3
    assert main([*arguments, "--mix", "refcoco", "--out", str(tmp_path / "other"), *SHORT]) == 2
    assert "--mix: 'refcoco' occurs twice" in capsys.readouterr().err


def test_sets_of_equal_names_are_told_by_their_folders(shapes: Path, tmp_path: Path) -> None:
    roots = [tmp_path / parent / "set" for parent in "abc"]
    for root in roots:
        shutil.copytree(shapes, root)
    data = DataArgs(data=shapes, mix=(*(f"{root}:refcoco" for root in roots[:2]), f"{roots[2]}:refcoco/unc"))
    model = load_model("shapes")
    assert list(data._train_sets(model, sentences="all")) == [
        "refcoco",
        "set:refcoco",
        "b/set:refcoco",
        "set:refcoco/unc",
    ]
    for mixed in (f"{shapes}:refcoco", f"{shapes}:refcoco/unc", "refcoco/unc"):  # unc is the first author of refcoco
        again = replace(data, mix=(mixed,))
        with pytest.raises(ValueError, match="refcoco' occurs twice"):
            again._train_sets(model, sentences="all")
    assert MixArgs.parse("cups=0.123456789").absolute() == "cups=0.123456789"


def test_validates_on_a_folder(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next(shapes.rglob("*.jpg"))
    line = {"image": image.name, "mask": [[0, 0, 9, 0, 9, 9]], "sentence": ["the cup", "a cup"]}
    (tmp_path / "val.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / image.name).write_bytes(image.read_bytes())
    assert (
        main(["evaluate", "--data", str(tmp_path), "--dataset", "folder", "--model", "shapes", "--device", "cpu"]) == 0
    )
    assert f"{tmp_path.name} val, 2 sentences of 1 refs" in capsys.readouterr().out


class TestSets:
    def test_check_exits_with_0_1_or_2(self, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["data", "check", str(shapes), "--json", str(tmp_path / "report.json")]) == 0
        assert "0 problems" in capsys.readouterr().out
        assert json.loads((tmp_path / "report.json").read_text())["problems"] == 0
        copy = tmp_path / "set"
        shutil.copytree(shapes, copy)
        next(copy.rglob("*.jpg")).unlink()
        with pytest.raises(SystemExit) as status:
            main(["data", "check", str(copy), "--no-images"])
        assert status.value.code == 1
        assert "problem: missing image (1)" in capsys.readouterr().out
        (copy / "refcoco/refs(unc).p").write_bytes(b"")
        assert main(["data", "check", str(copy)]) == 2

    @pytest.mark.parametrize("options", [[], ["--copy-images"], ["--format", "parquet"]])
    def test_convert(
        self, shapes: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["data", "convert", str(shapes), str(tmp_path / "out"), "--splits", "val", *options]) == 0
        theirs = RefCOCO(shapes, split="val")
        assert f"{len(theirs)} refs, {theirs.sentence_count} sentences" in capsys.readouterr().out
        ours = ReferFolder(tmp_path / "out", "val", image_root=None if options else theirs.image_root)
        assert [(ref.ref_id, ref.sentences) for ref in ours] == [(ref.ref_id, ref.sentences) for ref in theirs]
        assert len({ref.image_id for ref in ours}) == len({ref.image_id for ref in theirs})
        for ref, other in zip(ours, theirs, strict=True):
            assert np.array_equal(ours.mask(ref.ref_id), theirs.mask(ref.ref_id))
            assert np.array_equal(ours.image(ref.image_id), theirs.image(other.image_id))
        assert main(["data", "convert", str(shapes), str(tmp_path / "out"), "--splits", "val", *options]) == 2
        assert "--overwrite" in capsys.readouterr().err

    def test_convert_keeps_refs_without_a_target(self, tmp_path: Path) -> None:
        line = {"image": "a.png", "mask": None, "sentence": "the cup", "id": "x"}
        (tmp_path / "set").mkdir()
        (tmp_path / "set/val.jsonl").write_text(
            json.dumps(line) + "\n" + json.dumps({**line, "mask": "m.png", "id": 2})
        )
        Image.new("RGB", (8, 9)).save(tmp_path / "set/a.png")
        Image.new("L", (8, 9), 255).save(tmp_path / "set/m.png")
        for format in ("jsonl", "parquet"):
            out = tmp_path / format
            arguments = ["data", "convert", str(tmp_path / "set"), str(out), "--dataset", "folder", "--format", format]
            assert main(arguments) == 0
            data = ReferFolder(out, "val", image_root=tmp_path / "set")
            assert [bool(ref.targets) for ref in data] == [False, True]
            assert [data.mask(ref.ref_id).sum() for ref in data] == [0, 72]

    def test_show_and_skip_bad(self, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        copy, sheet = tmp_path / "set", tmp_path / "sheet.png"
        shutil.copytree(shapes, copy)
        next(copy.rglob("*.jpg")).unlink()
        arguments = ["data", "show", str(copy), "--out", str(sheet), "--count", "5", "--columns", "2", "--tile", "64"]
        assert main(arguments) == 2
        assert not sheet.exists()
        with pytest.warns(FastKDWarning, match="ref without its image file"):
            assert main([*arguments, "--skip-bad"]) == 0
        assert "× ref without its image file" in capsys.readouterr().out
        with Image.open(sheet) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (3 * (64 + 3 * 17 + 10) + 10, 2 * 74 + 10, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
        assert main([*arguments, "--count", "0"]) == 2


def test_contact_sheets_wrap_and_clean_their_text() -> None:
    image, mask = np.zeros((10, 30, 3), np.uint8), np.zeros((10, 30), bool)
    texts = ["word " * 100, "\x1b[2J" * 3, "x" * 200]
    sheet = contact_sheet([(image, mask, text) for text in texts], columns=4, tile=100)
    assert sheet.shape == (100 + 3 * 17 + 20, 3 * 110 + 10, 3)
    below = [sheet[112:, 10 + 110 * n : 110 + 110 * n] for n in range(3)]
    assert all((part < 128).any() for part in below)
    with pytest.raises(ValueError, match="no samples"):
        contact_sheet([])
