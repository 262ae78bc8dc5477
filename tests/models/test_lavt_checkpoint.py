"""Published LAVT checkpoints: settings, disallowed pickles, damaged and other files."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from tiny_lavt import training_checkpoint

from fastkd.models import LAVT
from fastkd.models.lavt import convert, read_checkpoint


@pytest.mark.parametrize(
    ("mha", "heads"),
    [
        ("", (1, 1, 1, 1)), (None, (1, 1, 1, 1)), ("1-1-1-1", (1, 1, 1, 1)), ("8-8-8-8", (8, 8, 8, 8)),
        ("1, 2, 4, 8", (1, 2, 4, 8)), ([1, 2, 4, 8], (1, 2, 4, 8)), ((2, 2, 2, 2), (2, 2, 2, 2)),
    ],
)  # fmt: skip
def test_reads_fusion_heads_from_the_settings(mha, heads, vision, text, tmp_path):
    torch.save(training_checkpoint(vision, text, mha=mha), tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").fusion_heads == heads
    assert LAVT.from_pretrained(tmp_path / "a.pth").config.fusion_heads == heads


def test_fusion_heads_default_to_one(vision, text, tmp_path):
    torch.save(training_checkpoint(vision, text), tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").fusion_heads == (1, 1, 1, 1)


class RunsCommand:
    """Run a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


class CallsFunction:
    """Call a function when unpickled."""

    def __init__(self, function) -> None:
        self.function = function

    def __reduce__(self):
        return (self.function, ("no such thing",))


@pytest.mark.parametrize("kind", ["zip", "legacy", 0, 2, 4, 5])
def test_lists_code_without_running_it(kind, vision, text, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "bad.pth"
    bad = training_checkpoint(vision, text) | {
        "extra": RunsCommand(marker),
        "more": [Fraction(1, 3), collections.deque()],
    }
    if isinstance(kind, int):  # a pickle not written by torch.save
        path.write_bytes(pickle.dumps({"model": RunsCommand(marker), "args": Fraction(1, 3)}, protocol=kind))
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
    pickle.loads(pickle.dumps(RunsCommand(marker)))
    assert marker.exists()  # the payload works


@pytest.mark.parametrize("kind", ["zip, protocol 4", "legacy, protocol 4", "legacy", 4, 5])
def test_lists_full_names_of_disallowed_objects(kind, vision, text, tmp_path):
    """Repeated module names are memo references in newer pickles; torch functions are disallowed too."""
    path = tmp_path / "bad.pth"
    disallowed = [
        CallsFunction(shutil.move),
        CallsFunction(shutil.which),
        "between",
        CallsFunction(shutil.rmtree),
        CallsFunction(torch.hub.load),
    ]
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps({"model": disallowed}, protocol=kind))
    else:
        form = {"_use_new_zipfile_serialization": "zip" in kind, "pickle_protocol": 4 if "4" in kind else 2}
        torch.save(training_checkpoint(vision, text) | {"extra": disallowed}, path, **form)
    with pytest.raises(ValueError, match="objects other than") as error:
        read_checkpoint(path)
    named = str(error.value).partition("argparse.Namespace: ")[2].partition(". Such")[0].split(", ")
    assert sorted(named) == ["shutil.move", "shutil.rmtree", "shutil.which", "torch.hub.load"]


@pytest.mark.parametrize("zipped", [True, False])
def test_reports_unsupported_pickle_protocols(zipped, vision, text, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(training_checkpoint(vision, text), path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"was pickled with protocol 4, .* save it again"):
        read_checkpoint(path)


def test_rejects_code_in_the_settings(vision, text, tmp_path):
    torch.save(training_checkpoint(vision, text, hook=RunsCommand(tmp_path / "ran")), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"posix\.system"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_namespace_is_allowed_only_while_reading(published):
    read_checkpoint(published)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
def test_rejects_truncated_files(keep, published, tmp_path):
    content = published.read_bytes()
    published.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        convert(published, tmp_path / "t.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["lavt.pth"]


def test_rejects_other_files(vision, text, tmp_path):
    path, target = tmp_path / "a.pth", tmp_path / "t.safetensors"

    def assert_rejected(content, message):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            convert(path, target)
        assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]

    assert_rejected(vision, "is not a LAVT checkpoint.*from_state_dict")
    assert_rejected(torch.zeros(3), "got a Tensor")
    assert_rejected([vision], "got a list")
    assert_rejected({"model": vision, "epoch": 1}, "has no text weights.*found model, epoch")
    assert_rejected(
        {"model": {"layer1.weight": torch.zeros(3)}, "bert_model": text}, "has no backbone.patch_embed.proj.weight"
    )
    assert_rejected(
        {"model": vision, "bert_model": {"a": torch.zeros(3)}}, "it has no text_encoder.embeddings.word_embeddings"
    )
    assert_rejected({"model": vision, "bert_model": 3}, "'bert_model' must be a state dict, got int")
    assert_rejected(training_checkpoint(vision, text, "lavt_one") | {"bert_model": text}, "text weights twice")
    assert_rejected(training_checkpoint(vision, text) | {"args": 3}, "'args' must be an argparse.Namespace, got int")
    assert_rejected(
        training_checkpoint(vision | {"epoch": 3}, text),
        r"a\.pth: state_dict must hold tensors by name, got int for 'ep",
    )
    assert_rejected(training_checkpoint(vision, {}), r"a\.pth: bert_state_dict is empty")
    content = vision | {"classifier.conv1_1.bias": torch.zeros(2, dtype=torch.int64)}
    assert_rejected(
        training_checkpoint(content, text), r"a\.pth: state_dict: classifier\.conv1_1\.bias is torch\.int64"
    )
    incomplete = {name: tensor for name, tensor in vision.items() if name != "classifier.conv2_3.weight"}
    assert_rejected(training_checkpoint(incomplete, text), r"1 missing \(classifier.conv2_3.weight\)")
    assert_rejected(
        training_checkpoint(vision | {"classifier.extra": torch.zeros(1)}, text), r"1 unexpected \(classifier.extra\)"
    )
    for content, reason in (
        (b"<html>404</html>", "it is not a pickle of tensors"),
        (b"hello\n", "it is not a pickle of tensors"),
        (b"", "it is empty"),
        (b"PK\x03\x04 no archive", ""),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"can't be read as a checkpoint \({reason}") as error:
            read_checkpoint(path)
        assert "weights_only" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="is a folder, not a checkpoint"):
        read_checkpoint(tmp_path)
