"""Failed downloads and unreadable weights: one short error for each of the libraries' exceptions."""

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
    """Exception of the HTTP client, which depends on huggingface_hub's version."""

    __module__ = "httpx2"


def caused(cause: BaseException) -> Exception:
    """Return a long error, as other libraries raise, with a cause."""
    error = OSError("Something went wrong.\nSee http://hub.example for a page of advice.\n" + "more\n" * 40)
    error.__cause__ = cause
    return error


REASONS = [
    (errors.RepositoryNotFoundError("404\nlong", response=RESPONSE), "the hub has no such name"),
    (errors.GatedRepoError("403\nlong", response=RESPONSE), "its licence must be accepted"),
    (errors.RevisionNotFoundError("404", response=RESPONSE), "it has no such revision"),
    (errors.RemoteEntryNotFoundError("404", response=RESPONSE), "it lacks a required file"),
    (errors.LocalEntryNotFoundError("not on disk"), "the hub is unreachable"),
    (urllib.error.URLError("no route"), "the hub is unreachable"),
    (ConnectTimeout("late"), "the hub is unreachable"),
    (ConnectionResetError(), "the hub is unreachable"),
]


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def raises(error):
    def function(*args, **options):
        raise error

    return function


def assert_short(info) -> str:
    text = str(info.value)
    assert "\n" not in text
    assert len(text) < 320
    assert "hub.example" not in text
    return text


@pytest.mark.parametrize("wrap", [lambda error: error, caused])
@pytest.mark.parametrize(("error", "reason"), REASONS)
def test_reports_failed_downloads(error, reason, wrap, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raises(wrap(error)))
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", raises(wrap(error)))
    monkeypatch.setattr(transformers.BertModel, "from_pretrained", raises(caused(error)))
    with pytest.raises(ValueError, match=f"^'owner/name' is not a local folder .*{reason}") as info:
        RISModel.from_pretrained("owner/name")
    assert_short(info)
    with pytest.raises(ValueError, match=f"^'owner/name' is not a local folder .*{reason}") as info:
        TextEncoder("bert", TEXT, "owner/name")
    assert_short(info)
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **more: raises(wrap(error))() if pretrained else create(name, **more),
    )
    with pytest.raises(ValueError, match=rf"timm's weights of 'resnet18' .*{reason}.*backbone_weights") as info:
        RISModel(RISConfig(text=TEXT), backbone_weights="timm")
    assert_short(info)


def test_reports_offline_mode(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no downloads below
    for fetch in (RISModel.from_pretrained, lambda name: TextEncoder("bert", TEXT, name)):
        with pytest.raises(
            ValueError, match=r"'nobody/nothing' is not a local folder .*HF_HUB_OFFLINE is set.*unset it"
        ):
            fetch("nobody/nothing")


def test_keeps_errors_that_are_not_about_downloads(monkeypatch):
    assert hub.fetch_failure(ValueError("a configuration")) is None
    broken = ValueError("its weights do not match")
    missing = errors.RemoteEntryNotFoundError("no config.json", response=RESPONSE)
    monkeypatch.setattr(RISModel, "_from_pretrained", raises(broken))
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", raises(missing))
    with pytest.raises(ValueError, match=r"^its weights do not match$"):
        RISModel.from_pretrained("owner/name")


def test_reports_unpublished_timm_weights():
    unpublished = next(name for name in timm.list_models("*resnet*") if not timm.list_models(name, pretrained=True))
    with pytest.raises(ValueError, match=rf"timm publishes no weights of '{unpublished}'"):
        RISModel(RISConfig(backbone=unpublished, text=TEXT), backbone_weights="timm")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "bert"
    TextEncoder("bert", TEXT).model.save_pretrained(folder)
    return folder


def test_rejects_text_weights_of_another_shape(bert):
    with pytest.raises(ValueError, match=r"word_embeddings\.weight is \(40, 16\), not \(50, 16\); nothing was loaded"):
        TextEncoder("bert", {**TEXT, "vocab_size": 50}, bert)
    with pytest.raises(ValueError, match=r"have no value for encoder\.layer\.1"):
        TextEncoder("bert", {**TEXT, "num_hidden_layers": 2}, bert)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_rejects_unreadable_text_weights(bert, tmp_path, name):
    """The error omits torch's suggestion to run the code in the file."""
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    contents = [b"truncated"]
    if name.endswith("bin"):
        torch.save({"settings": argparse.Namespace(lr=0.1)}, tmp_path / "code.pth")
        contents.append((tmp_path / "code.pth").read_bytes())
    for content in contents:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"text weights .* cannot be (read: their pickle|loaded)") as info:
            TextEncoder("bert", TEXT, tmp_path)
        text = assert_short(info)
        assert "weights_only" not in text
        assert "\x1b" not in text
