"""``fastkd convert``: both published layouts, metadata, destinations, and converted files in other commands."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_lavt import CHECKPOINT_BERT, training_checkpoint

import fastkd
from fastkd.cli import main
from fastkd.data import load_tokenizer, make_shapes
from fastkd.errors import FastKDWarning
from fastkd.evaluate import tokenizer_of
from fastkd.models import LAVT, RISModel
from fastkd.models.lavt import convert
from fastkd.models.lavt.io import read as read_converted

UNTRAINED = ("--backbone-weights", "random", "--text-weights", "random", "--allow-untrained-teacher")
VOCABULARY = CHECKPOINT_BERT["vocab_size"]
STUDENT = {
    "backbone": "resnet10t",
    "out_indices": [1, 2, 3, 4],
    "text": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 20,
    },
    "fusion_heads": [1, 2, 2, 4],
    "decoder_width": 32,
    "image_size": 64,
}  # fmt: skip


def forward(model):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        return model(image, torch.randint(1, VOCABULARY, (2, 6), generator=generator)).logits


def test_source_name_may_be_undecodable(published, tmp_path):
    source, target = published.rename(tmp_path / os.fsdecode(b"caf\xe9.pth")), tmp_path / "teacher.safetensors"
    assert main(["convert", str(source), str(target)]) == 0
    with safe_open(target, "pt") as file:
        assert file.metadata()["source"] == "caf?.pth"


@pytest.mark.parametrize("layout", ["lavt", "lavt_one"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_converts_both_layouts(layout, wrapped, vision, text, tmp_path, capsys):
    saved = training_checkpoint(vision, text, layout, mha="1-2-2-4")
    if wrapped:  # prefixes of DistributedDataParallel
        for part in {"model", "bert_model"} & saved.keys():
            saved[part] = {f"module.{name}": tensor for name, tensor in saved[part].items()}
    source, target = tmp_path / "refcoco.pth", tmp_path / "teacher.safetensors"
    torch.save(saved, source)
    assert main(["convert", str(source), str(target)]) == 0
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    printed = capsys.readouterr().out
    assert f"layout {layout}, fusion heads 1-2-2-4" in printed
    assert digest in printed
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
        assert all(name.startswith(("backbone.", "classifier.", "text_encoder.")) for name in file.keys())  # noqa: SIM118
    assert metadata["source_sha256"] == digest
    assert metadata["source"] == "refcoco.pth"
    assert metadata["layout"] == layout
    assert metadata["fusion_heads"] == "1-2-2-4"
    assert metadata["fastkd_version"] == fastkd.__version__
    assert json.loads(metadata["config"])["window"] == 3

    expected = LAVT.from_state_dict(vision, (1, 2, 2, 4), bert_state_dict=text)
    for path in (target, str(target), source):
        again = LAVT.from_pretrained(path)
        assert again.config == expected.config
        assert not again.training
        assert torch.equal(forward(again), forward(expected))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["refcoco.pth", "teacher.safetensors"]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("mha", ["1-1-1", "a-b-c-d", "0-1-1-1", 4, [1, 2], [1.5, 1, 1, 1], "1-1-1-3"])
def test_rejects_invalid_fusion_heads(mha, vision, text, tmp_path):
    torch.save(training_checkpoint(vision, text, mha=mha), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"args.mha must be empty or four heads|does not divide the 64 channels"):
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_reads_files_of_torch_before_1_6(vision, text, tmp_path):
    """torch before 1.6 did not write zip archives."""
    torch.save(training_checkpoint(vision, text), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    with pytest.warns(FastKDWarning, match="only the tokenizer's name is stored: .*'vocab.txt' does not exist"):
        facts = convert(
            tmp_path / "old.pth", tmp_path / "t.safetensors", tokenizer="vocab.txt", image_size=384, max_words=15
        )
    config = LAVT.from_pretrained(tmp_path / "t.safetensors").config
    assert (config.tokenizer, config.image_size, config.max_words) == ("vocab.txt", 384, 15)
    assert facts["layout"] == "lavt"


def test_file_contains_the_tokenizer(published, scenes, tmp_path, monkeypatch, capsys):
    """A relative path may later lead to another vocabulary, or nowhere."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(load_tokenizer("shapes").pieces()[5:])]
    monkeypatch.chdir(tmp_path)
    Path("vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    assert main(["convert", str(published), "t.safetensors", "--tokenizer", "vocab.txt", "--image-size", "64"]) == 0
    Path("vocab.txt").unlink()
    teacher = LAVT.from_pretrained("t.safetensors")
    assert tokenizer_of(teacher).pieces() == tokenizer_of(teacher, "t.safetensors").pieces() == pieces
    Path("student.json").write_text(json.dumps(STUDENT))
    distill = ["distill", "--data", str(scenes), "--out", "run", "--teacher", "t.safetensors", "--student"]
    settings = ["--terms", "logit=0.2", "--steps", "1", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
    assert main([*distill, "student.json", *UNTRAINED, *settings]) == 0, capsys.readouterr().err
    assert tokenizer_of(RISModel.from_pretrained("run/best")).pieces() == pieces  # the student uses it too
    config, state, _ = read_converted(Path("t.safetensors"))
    for damaged in ("[]", "{", '{"../x": ""}'):
        metadata = {"model": "lavt", "config": json.dumps(config.to_dict()), "tokenizer_files": damaged}
        save_file(state, "damaged.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match="the tokenizer in its metadata can't be read"):
            LAVT.from_pretrained("damaged.safetensors")


def test_rejects_weights_that_are_not_finite(vision, text, tmp_path):
    name = "classifier.conv1_1.bias"
    torch.save(training_checkpoint(vision | {name: torch.tensor([0.0, torch.nan])}, text), tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=rf"nan.pth holds NaN or Inf in 1 tensors \({name}\)"):
        convert(tmp_path / "nan.pth", tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_rejects_bad_destinations(published, tmp_path):
    with pytest.raises(ValueError, match=r"must be named \*\.safetensors"):
        convert(published, tmp_path / "teacher.pth")
    with pytest.raises(FileNotFoundError, match="no folder"):
        convert(published, tmp_path / "nowhere" / "t.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; pass the name of a file"):
        convert(published, tmp_path / "folder.safetensors", overwrite=True)
    target = tmp_path / "t.safetensors"
    with pytest.raises(
        ValueError, match="max_words must be at most 20, the text encoder's position embeddings, got 21"
    ):
        convert(published, target, max_words=21)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        convert(published, target, image_size=0)
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        convert(published, target)
    assert target.read_text() == "mine"
    convert(published, target, overwrite=True)
    assert forward(LAVT.from_pretrained(target)).shape == (2, 2, 64, 64)


def test_failed_write_keeps_the_existing_file(published, tmp_path, monkeypatch):
    target = tmp_path / "t.safetensors"
    convert(published, target)
    before = target.read_bytes()

    for kind in (OSError, SafetensorError):  # safetensors raises either

        def fails(state, path, metadata, kind=kind):
            Path(path).write_bytes(b"half")
            raise kind("disk full")

        monkeypatch.setattr("safetensors.torch.save_file", fails)
        with pytest.raises(OSError, match=r"t\.safetensors can't be written \(disk full\)"):
            convert(published, target, overwrite=True)

    def refuses(state, path, metadata):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("safetensors.torch.save_file", refuses)
    with pytest.raises(OSError, match=r"t\.safetensors can't be written \(Permission denied\)"):
        convert(published, target, overwrite=True)
    assert target.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lavt.pth", "t.safetensors"]


def test_rejects_modified_converted_files(published, tmp_path):
    target = tmp_path / "t.safetensors"
    facts = convert(published, target)
    state = load_file(target)
    save_file(state, target, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was not written by 'fastkd convert'"):
        LAVT.from_pretrained(target)
    save_file({k: v for k, v in state.items() if k != "backbone.norm0.bias"}, target, metadata=facts)
    with pytest.raises(ValueError, match=r"1 missing \(backbone.norm0.bias\)"):
        LAVT.from_pretrained(target)
    for config in (
        "{",
        "[]",
        "{}",
        facts["config"].replace('"window"', '"windows"'),
        facts["config"].replace("160", '"x"'),
    ):
        save_file(state, target, metadata=facts | {"config": config})
        with pytest.raises(ValueError, match="does not describe a LAVT"):
            LAVT.from_pretrained(target)
    target.write_bytes(target.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        LAVT.from_pretrained(target)
    target.unlink()
    with pytest.raises(FileNotFoundError, match="no weights file"):
        LAVT.from_pretrained(target)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    make_shapes(root, images=40, image_size=64)
    return root


def test_distill_and_evaluate(published, scenes, tmp_path, capsys):
    teacher, student, out = tmp_path / "t.safetensors", tmp_path / "student.json", tmp_path / "run"
    assert main(["convert", str(published), str(teacher), "--tokenizer", "shapes", "--image-size", "64"]) == 0
    student.write_text(json.dumps(STUDENT))
    distill = [
        "distill", "--data", str(scenes), "--out", str(out), "--teacher", str(teacher), "--student", str(student),
        "--terms", "first_order=0.5", "logit=0.2", "channel_distribution=0.1", "--steps", "2", "--batch-size", "4",
        "--threads", "1", *UNTRAINED,
    ]  # fmt: skip
    assert main(distill) == 0, capsys.readouterr().err
    assert json.loads((out / "best" / "config.json").read_text())["tokenizer"] == "shapes"  # the teacher's
    assert "weights: first_order" in capsys.readouterr().out
    for model in (teacher, out / "best"):
        assert main(["evaluate", "--data", str(scenes), "--model", str(model), "--split", "val"]) == 0
    assert "mIoU" in capsys.readouterr().out


def test_rejects_another_vocabulary(published, vision, text, scenes, tmp_path, capsys):
    longer = dict(text)
    name = "embeddings.word_embeddings.weight"
    longer[name] = torch.cat([text[name], text[name]])
    torch.save(training_checkpoint(vision, longer), tmp_path / "other.pth")
    common = ["distill", "--data", str(scenes), "--out", str(tmp_path / "run")]
    assert main([*common, "--teacher", str(tmp_path / "other.pth"), "--student", "shapes-student"]) == 2
    assert "the student's vocabulary has 160 words, the teacher's 320" in capsys.readouterr().err
    assert main(["evaluate", "--data", str(scenes), "--model", str(published)]) == 2
    assert "names no tokenizer" in capsys.readouterr().err
    assert main(["evaluate", "--data", str(scenes), "--model", str(published), "--tokenizer", "/no/vocab.txt"]) == 2
    assert "/no/vocab.txt" in capsys.readouterr().err
    assert main([*common, "--teacher", str(tmp_path / "none.safetensors")]) == 2
    assert "no weights file at" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_command_line_errors_are_one_line(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "t.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("fastkd: error: no checkpoint at")
