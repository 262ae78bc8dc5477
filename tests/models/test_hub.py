"""Names that cannot be fetched, and weights that cannot be read: one error, whatever the libraries raise."""

from __future__ import annotations

import argparse
import urllib.error
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")

import huggingface_hub
import timm
import transformers
from huggingface_hub import errors

from fastkd.models import RISConfig, RISModel, hub
from fastkd.models.text import TextEncoder

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
RESPONSE = SimpleNamespace(headers={}, request=None)


class ConnectTimeout(Exception):
    """As of the client that huggingface_hub asks with; which one depends on its version."""

    __module__ = "httpx2"


def caused(cause: BaseException) -> Exception:
    """An error of another library, pages long, with its cause."""
    error = OSError("Something went wrong.\nSee http://hub.example for a page of advice.\n" + "more\n" * 40)
    error.__cause__ = cause
    return error


REASONS = [
    (errors.RepositoryNotFoundError("404\nlong", response=RESPONSE), "the hub has no such name"),
    (errors.GatedRepoError("403\nlong", response=RESPONSE), "its licence must be accepted"),
    (errors.RevisionNotFoundError("404", response=RESPONSE), "it has no such revision"),
    (errors.RemoteEntryNotFoundError("404", response=RESPONSE), "it lacks a file"),
    (errors.LocalEntryNotFoundError("not on disk"), "the network does not reach the hub"),
    (urllib.error.URLError("no route"), "the network does not reach the hub"),
    (ConnectTimeout("late"), "the network does not reach the hub"),
    (ConnectionResetError(), "the network does not reach the hub"),
]


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def raises(error):
    def instead(*args, **options):
        raise error

    return instead


def one_line(info) -> str:
    text = str(info.value)
    assert "\n" not in text
    assert len(text) < 320
    assert "hub.example" not in text
    return text


@pytest.mark.parametrize("wrap", [lambda error: error, caused])
@pytest.mark.parametrize(("error", "why"), REASONS)
def test_every_way_to_fetch(error, why, wrap, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raises(wrap(error)))
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", raises(wrap(error)))
    monkeypatch.setattr(transformers.BertModel, "from_pretrained", raises(caused(error)))
    with pytest.raises(ValueError, match=f"^'owner/name' is not a folder here, .*{why}") as info:
        RISModel.from_pretrained("owner/name")
    one_line(info)
    with pytest.raises(ValueError, match=f"^'owner/name' is not a folder here, .*{why}") as info:
        TextEncoder("bert", TEXT, "owner/name")
    one_line(info)
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **more: raises(wrap(error))() if pretrained else create(name, **more),
    )
    with pytest.raises(ValueError, match=rf"timm's weights of 'resnet18' .*{why}.*backbone_weights") as info:
        RISModel(RISConfig(text=TEXT), backbone_weights="timm")
    one_line(info)


def test_offline_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # nothing below reaches a network
    for fetch in (RISModel.from_pretrained, lambda name: TextEncoder("bert", TEXT, name)):
        with pytest.raises(
            ValueError, match=r"'nobody/nothing' is not a folder here, .*HF_HUB_OFFLINE is set.*unset it"
        ):
            fetch("nobody/nothing")


def test_errors_that_are_not_about_fetching_stay(monkeypatch):
    assert hub.reason(ValueError("a configuration")) is None
    broken = ValueError("its weights do not fit")
    missing = errors.RemoteEntryNotFoundError("no config.json", response=RESPONSE)
    monkeypatch.setattr(RISModel, "_from_pretrained", raises(broken))
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", raises(missing))
    with pytest.raises(ValueError, match=r"^its weights do not fit$"):
        RISModel.from_pretrained("owner/name")


def test_timm_without_weights_and_a_bad_argument():
    unpublished = next(name for name in timm.list_models("*resnet*") if not timm.list_models(name, pretrained=True))
    with pytest.raises(ValueError, match=rf"timm publishes no weights of '{unpublished}'"):
        RISModel(RISConfig(backbone=unpublished, text=TEXT), backbone_weights="timm")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "bert"
    TextEncoder("bert", TEXT).model.save_pretrained(folder)
    return folder


def test_text_weights_that_do_not_fit_are_named(bert):
    with pytest.raises(ValueError, match=r"word_embeddings\.weight is \(40, 16\), not \(50, 16\); nothing was loaded"):
        TextEncoder("bert", {**TEXT, "vocab_size": 50}, bert)
    with pytest.raises(ValueError, match=r"have no value for encoder\.layer\.1"):
        TextEncoder("bert", {**TEXT, "num_hidden_layers": 2}, bert)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_text_weights_that_cannot_be_read(bert, tmp_path, name):
    """Without torch's advice to run what is in the file."""
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    contents = [b"cut off"]
    if name.endswith("bin"):
        torch.save({"settings": argparse.Namespace(lr=0.1)}, tmp_path / "code.pth")
        contents.append((tmp_path / "code.pth").read_bytes())
    for content in contents:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"text weights .* cannot be (read: their pickle|loaded)") as info:
            TextEncoder("bert", TEXT, tmp_path)
        text = one_line(info)
        assert "weights_only" not in text
        assert "\x1b" not in text
