"""``fastkd convert``: both published layouts, origin recorded, and every file that must be refused."""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from lavt_oracle import lavt_names, lavt_weights

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import fastkd
from fastkd.cli import main
from fastkd.data import load_tokenizer
from fastkd.data import shapes as shapes_module
from fastkd.errors import FastKDWarning
from fastkd.evaluate import tokenizer_of
from fastkd.models import LAVT, RISModel
from fastkd.models.lavt import convert, read_checkpoint
from fastkd.models.lavt.io import read as read_converted

WIDTH, VOCABULARY = 64, 160  # the vocabulary of the shapes presets


@pytest.fixture(scope="module")
def vision() -> dict[str, torch.Tensor]:
    names = lavt_names(8, (1, 2, 1, 1), (1, 2, 4, 8), 3, WIDTH)
    return {name: torch.from_numpy(np.asarray(array)) for name, array in lavt_weights(names).items()}


@pytest.fixture(scope="module")
def text() -> dict[str, torch.Tensor]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32,
        max_position_embeddings=20,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).state_dict()


def checkpoint(vision, text, layout="lavt", **args) -> dict:
    """What a training run saves: weights, optimiser, scheduler and settings."""
    inside = {f"text_encoder.{name}": tensor for name, tensor in text.items()}
    weights = {"model": vision, "bert_model": text} if layout == "lavt" else {"model": vision | inside}
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return weights | {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 39,
        "args": argparse.Namespace(lr=5e-5, model=layout, swin_type="base", **args),
    }


@pytest.fixture
def released(vision, text, tmp_path) -> Path:
    torch.save(checkpoint(vision, text, mha="1-2-2-4"), tmp_path / "lavt.pth")
    return tmp_path / "lavt.pth"


def forward(model):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        return model(image, torch.randint(1, VOCABULARY, (2, 6), generator=generator)).logits


def test_a_checkpoint_whose_name_is_no_text_in_this_locale(released, tmp_path):
    source, target = released.rename(tmp_path / os.fsdecode(b"caf\xe9.pth")), tmp_path / "teacher.safetensors"
    assert main(["convert", str(source), str(target)]) == 0
    with safe_open(target, "pt") as file:
        assert file.metadata()["source"] == "caf?.pth"


@pytest.mark.parametrize("layout", ["lavt", "lavt_one"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_both_layouts(layout, wrapped, vision, text, tmp_path, capsys):
    saved = checkpoint(vision, text, layout, mha="1-2-2-4")
    if wrapped:  # by DistributedDataParallel
        for part in {"model", "bert_model"} & saved.keys():
            saved[part] = {f"module.{name}": tensor for name, tensor in saved[part].items()}
    source, target = tmp_path / "refcoco.pth", tmp_path / "teacher.safetensors"
    torch.save(saved, source)
    assert main(["convert", str(source), str(target)]) == 0
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    said = capsys.readouterr().out
    assert f"layout {layout}, fusion heads 1-2-2-4" in said
    assert digest in said
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


@pytest.mark.parametrize(
    ("mha", "heads"),
    [
        ("", (1, 1, 1, 1)), (None, (1, 1, 1, 1)), ("1-1-1-1", (1, 1, 1, 1)), ("8-8-8-8", (8, 8, 8, 8)),
        ("1, 2, 4, 8", (1, 2, 4, 8)), ([1, 2, 4, 8], (1, 2, 4, 8)), ((2, 2, 2, 2), (2, 2, 2, 2)),
    ],
)  # fmt: skip
def test_heads_of_the_settings(mha, heads, vision, text, tmp_path):
    torch.save(checkpoint(vision, text, mha=mha), tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").fusion_heads == heads
    assert LAVT.from_pretrained(tmp_path / "a.pth").config.fusion_heads == heads


def test_heads_where_settings_say_nothing(vision, text, tmp_path):
    torch.save(checkpoint(vision, text), tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").fusion_heads == (1, 1, 1, 1)


@pytest.mark.parametrize("mha", ["1-1-1", "a-b-c-d", "0-1-1-1", 4, [1, 2], [1.5, 1, 1, 1], "1-1-1-3"])
def test_heads_that_make_no_sense(mha, vision, text, tmp_path):
    torch.save(checkpoint(vision, text, mha=mha), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"args.mha must be empty or four heads|does not divide the 64 channels"):
        convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_old_torch_files(vision, text, tmp_path):
    """torch before 1.6 wrote no zip archive."""
    torch.save(checkpoint(vision, text), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    with pytest.warns(FastKDWarning, match="only the tokenizer's name is recorded: .*'vocab.txt' is no file"):
        facts = convert(
            tmp_path / "old.pth", tmp_path / "t.safetensors", tokenizer="vocab.txt", image_size=384, max_words=15
        )
    config = LAVT.from_pretrained(tmp_path / "t.safetensors").config
    assert (config.tokenizer, config.image_size, config.max_words) == ("vocab.txt", 384, 15)
    assert facts["layout"] == "lavt"


def test_the_tokenizer_is_in_the_file(released, scenes, tmp_path, monkeypatch, capsys):
    """Named by a relative path that leads to another vocabulary, or nowhere, later."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(load_tokenizer("shapes").pieces()[5:])]
    monkeypatch.chdir(tmp_path)
    Path("vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    assert main(["convert", str(released), "t.safetensors", "--tokenizer", "vocab.txt", "--image-size", "64"]) == 0
    Path("vocab.txt").unlink()
    teacher = LAVT.from_pretrained("t.safetensors")
    assert tokenizer_of(teacher).pieces() == tokenizer_of(teacher, "t.safetensors").pieces() == pieces
    Path("student.json").write_text(json.dumps(STUDENT))
    distil = ["distill", "--data", str(scenes), "--out", "run", "--teacher", "t.safetensors", "--student"]
    settings = ["--terms", "logit=0.2", "--steps", "1", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
    assert main([*distil, "student.json", *settings]) == 0, capsys.readouterr().err
    assert tokenizer_of(RISModel.from_pretrained("run/best")).pieces() == pieces  # the student has taken it over
    config, state, _ = read_converted(Path("t.safetensors"))
    for damaged in ("[]", "{", '{"../x": ""}'):
        metadata = {"model": "lavt", "config": json.dumps(config.to_dict()), "tokenizer_files": damaged}
        save_file(state, "damaged.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match="the tokenizer in its metadata can't be read"):
            LAVT.from_pretrained("damaged.safetensors")


# What is refused


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


class Calls:
    """Calls something when it is unpickled."""

    def __init__(self, what) -> None:
        self.what = what

    def __reduce__(self):
        return (self.what, ("no such thing",))


@pytest.mark.parametrize("kind", ["zip", "legacy", 0, 2, 4, 5])
def test_code_is_named_and_not_run(kind, vision, text, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "bad.pth"
    bad = checkpoint(vision, text) | {"extra": Runs(marker), "more": [Fraction(1, 3), collections.deque()]}
    if isinstance(kind, int):  # a pickle that torch.save did not write, in that protocol
        path.write_bytes(pickle.dumps({"model": Runs(marker), "args": Fraction(1, 3)}, protocol=kind))
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=kind == "zip")
    for read in (read_checkpoint, LAVT.from_pretrained, lambda p: convert(p, tmp_path / "t.safetensors")):
        with pytest.raises(ValueError, match=r"objects other than .*posix\.system") as error:
            read(path)
        assert "nothing was run" in str(error.value)
        assert "fractions.Fraction" in str(error.value)
        assert ("collections.deque" in str(error.value)) is isinstance(kind, str)
        assert "weights_only" not in str(error.value)
    assert not marker.exists()
    assert not (tmp_path / "t.safetensors").exists()
    pickle.loads(pickle.dumps(Runs(marker)))
    assert marker.exists()  # the payload does work


@pytest.mark.parametrize("kind", ["zip, protocol 4", "legacy, protocol 4", "legacy", 4, 5])
def test_every_foreign_name_is_whole(kind, vision, text, tmp_path):
    """Modules named twice are references in newer pickles; and not all that is torch's is a tensor."""
    path = tmp_path / "bad.pth"
    foreign = [Calls(shutil.move), Calls(shutil.which), "between", Calls(shutil.rmtree), Calls(torch.hub.load)]
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps({"model": foreign}, protocol=kind))
    else:
        form = {"_use_new_zipfile_serialization": "zip" in kind, "pickle_protocol": 4 if "4" in kind else 2}
        torch.save(checkpoint(vision, text) | {"extra": foreign}, path, **form)
    with pytest.raises(ValueError, match="objects other than") as error:
        read_checkpoint(path)
    named = str(error.value).partition("argparse.Namespace: ")[2].partition(". Such")[0].split(", ")
    assert sorted(named) == ["shutil.move", "shutil.rmtree", "shutil.which", "torch.hub.load"]


@pytest.mark.parametrize("zipped", [True, False])
def test_other_pickle_protocols_are_told(zipped, vision, text, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(checkpoint(vision, text), path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"was pickled with protocol 4; .* save it again"):
        read_checkpoint(path)


def test_hidden_code_inside_the_settings(vision, text, tmp_path):
    torch.save(checkpoint(vision, text, hook=Runs(tmp_path / "ran")), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"posix\.system"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_namespace_is_not_allowed_from_then_on(released):
    read_checkpoint(released)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
def test_truncated_files(keep, released, tmp_path):
    whole = released.read_bytes()
    released.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        convert(released, tmp_path / "t.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["lavt.pth"]


def test_foreign_files(vision, text, tmp_path):
    path, target = tmp_path / "a.pth", tmp_path / "t.safetensors"

    def refused(content, message):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            convert(path, target)
        assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]

    refused(vision, "is no LAVT checkpoint.*from_state_dict")
    refused(torch.zeros(3), "got a Tensor")
    refused([vision], "got a list")
    refused({"model": vision, "epoch": 1}, "has no text weights.*it holds model, epoch")
    refused({"model": {"layer1.weight": torch.zeros(3)}, "bert_model": text}, "has no backbone.patch_embed.proj.weight")
    refused({"model": vision, "bert_model": {"a": torch.zeros(3)}}, "it has no text_encoder.embeddings.word_embeddings")
    refused({"model": vision, "bert_model": 3}, "'bert_model' must be a state dict, got int")
    refused(checkpoint(vision, text, "lavt_one") | {"bert_model": text}, "text weights twice")
    refused(checkpoint(vision, text) | {"args": 3}, "'args' must be an argparse.Namespace, got int")
    refused(checkpoint(vision | {"epoch": 3}, text), r"a\.pth: state_dict must hold tensors by name, got int for 'ep")
    refused(checkpoint(vision, {}), r"a\.pth: bert_state_dict is empty")
    whole = vision | {"classifier.conv1_1.bias": torch.zeros(2, dtype=torch.int64)}
    refused(checkpoint(whole, text), r"a\.pth: state_dict: classifier\.conv1_1\.bias is torch\.int64")
    gone = {name: tensor for name, tensor in vision.items() if name != "classifier.conv2_3.weight"}
    refused(checkpoint(gone, text), r"1 missing \(classifier.conv2_3.weight\)")
    refused(checkpoint(vision | {"classifier.extra": torch.zeros(1)}, text), r"1 unexpected \(classifier.extra\)")
    for content, why in (
        (b"<html>404</html>", "it is not a pickle of tensors"),
        (b"hello\n", "it is not a pickle of tensors"),
        (b"", "it is empty"),
        (b"PK\x03\x04 no archive", ""),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"can't be read as a checkpoint \({why}") as error:
            read_checkpoint(path)
        assert "weights_only" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="is a folder, no checkpoint"):
        read_checkpoint(tmp_path)


def test_weights_that_are_not_finite(vision, text, tmp_path):
    name = "classifier.conv1_1.bias"
    torch.save(checkpoint(vision | {name: torch.tensor([0.0, torch.nan])}, text), tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=rf"nan.pth holds NaN or Inf in 1 of its tensors \({name}\)"):
        convert(tmp_path / "nan.pth", tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_destinations(released, tmp_path):
    with pytest.raises(ValueError, match=r"must be named \*\.safetensors"):
        convert(released, tmp_path / "teacher.pth")
    with pytest.raises(FileNotFoundError, match="no folder"):
        convert(released, tmp_path / "nowhere" / "t.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; name the file"):
        convert(released, tmp_path / "folder.safetensors", overwrite=True)
    target = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match="max_words must be at most 20, the places of the text encoder, got 21"):
        convert(released, target, max_words=21)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        convert(released, target, image_size=0)
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        convert(released, target)
    assert target.read_text() == "mine"
    convert(released, target, overwrite=True)
    assert forward(LAVT.from_pretrained(target)).shape == (2, 2, 64, 64)


def test_a_failed_write_leaves_what_was_there(released, tmp_path, monkeypatch):
    target = tmp_path / "t.safetensors"
    convert(released, target)
    before = target.read_bytes()

    for kind in (OSError, SafetensorError):  # the library raises either

        def fails(state, path, metadata, kind=kind):
            Path(path).write_bytes(b"half")
            raise kind("disk full")

        monkeypatch.setattr("safetensors.torch.save_file", fails)
        with pytest.raises(OSError, match=r"t\.safetensors can't be written \(disk full\)"):
            convert(released, target, overwrite=True)

    def refuses(**where):
        raise PermissionError(13, "Permission denied", "/some/.t.safetensors-abc")

    monkeypatch.setattr("tempfile.mkstemp", refuses)
    with pytest.raises(OSError, match=r"t\.safetensors can't be written \(Permission denied\)"):
        convert(released, target, overwrite=True)
    assert target.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lavt.pth", "t.safetensors"]


def test_converted_files_that_were_tampered_with(released, tmp_path):
    from safetensors.torch import load_file, save_file

    target = tmp_path / "t.safetensors"
    facts = convert(released, target)
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


# In the other commands


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    shapes_module.make_shapes(root, images=40, image_size=64)
    return root


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


def test_distil_and_evaluate(released, scenes, tmp_path, capsys):
    teacher, student, out = tmp_path / "t.safetensors", tmp_path / "student.json", tmp_path / "run"
    assert main(["convert", str(released), str(teacher), "--tokenizer", "shapes", "--image-size", "64"]) == 0
    student.write_text(json.dumps(STUDENT))
    distil = [
        "distill", "--data", str(scenes), "--out", str(out), "--teacher", str(teacher), "--student", str(student),
        "--terms", "first_order=0.5", "logit=0.2", "channel_distribution=0.1", "--steps", "2", "--batch-size", "4",
        "--threads", "1",
    ]  # fmt: skip
    assert main(distil) == 0, capsys.readouterr().err
    assert json.loads((out / "best" / "config.json").read_text())["tokenizer"] == "shapes"  # the teacher's
    assert "weights: first_order" in capsys.readouterr().out
    for model in (teacher, out / "best"):
        assert main(["evaluate", "--data", str(scenes), "--model", str(model), "--split", "val"]) == 0
    assert "mIoU" in capsys.readouterr().out


def test_word_ids_of_another_vocabulary(released, vision, text, scenes, tmp_path, capsys):
    longer = dict(text)
    name = "embeddings.word_embeddings.weight"
    longer[name] = torch.cat([text[name], text[name]])
    torch.save(checkpoint(vision, longer), tmp_path / "other.pth")
    common = ["distill", "--data", str(scenes), "--out", str(tmp_path / "run")]
    assert main([*common, "--teacher", str(tmp_path / "other.pth"), "--student", "shapes-student"]) == 2
    assert "the student's vocabulary has 160 words, the teacher's 320" in capsys.readouterr().err
    assert main(["evaluate", "--data", str(scenes), "--model", str(released)]) == 2
    assert "names no tokenizer" in capsys.readouterr().err
    assert main(["evaluate", "--data", str(scenes), "--model", str(released), "--tokenizer", "/no/vocab.txt"]) == 2
    assert "/no/vocab.txt" in capsys.readouterr().err
    assert main([*common, "--teacher", str(tmp_path / "none.safetensors")]) == 2
    assert "no weights file at" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line_on_the_command_line(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "t.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("fastkd: error: no checkpoint at")
