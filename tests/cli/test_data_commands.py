"""Folders and mixtures as training data on the command line; ``fastkd data``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="needs the [ris] extra")

from fastkd.cli import main
from fastkd.cli._data import MixArgs
from fastkd.data import make_shapes

SHORT = ["--steps", "2", "--batch-size", "4", "--threads", "1", "--log-every", "1", "--no-check"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "data"
    make_shapes(root, images=20, image_size=64)
    return root


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
    assert main([*arguments, "--mix", "refcoco", "--out", str(tmp_path / "other"), *SHORT]) == 2
    assert "--mix: 'refcoco' occurs twice" in capsys.readouterr().err


def test_validates_on_a_folder(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next(shapes.rglob("*.jpg"))
    line = {"image": image.name, "mask": [[0, 0, 9, 0, 9, 9]], "sentence": ["the cup", "a cup"]}
    (tmp_path / "val.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / image.name).write_bytes(image.read_bytes())
    assert (
        main(["evaluate", "--data", str(tmp_path), "--dataset", "folder", "--model", "shapes", "--device", "cpu"]) == 0
    )
    assert f"{tmp_path.name} val, 2 sentences of 1 refs" in capsys.readouterr().out
