"""RISModel's weights: save and load, backbone and text weights, rejected files."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

import timm
from tiny_models import FAMILIES, TEXT, build, inputs, tiny

from fastkd.models import RISModel


@pytest.fixture
def saved(tmp_path):
    model = build(tiny("swin", fusion_heads=2)).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip(saved):
    model, folder = saved
    loaded = RISModel.from_pretrained(folder)
    assert loaded.config == model.config
    assert not loaded.training
    batch = inputs()
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)
    assert json.loads((folder / "config.json").read_text())["backbone"] == "swin_tiny_patch4_window7_224"
    RISModel.from_pretrained(str(folder)).save_pretrained(folder.parent / "loaded")
    assert (folder / "config.json").read_text() == (folder.parent / "loaded" / "config.json").read_text()


def test_half_precision_weights_load(saved):
    from safetensors.torch import load_file, save_file

    model, folder = saved
    state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    loaded = RISModel.from_pretrained(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    batch = inputs()
    torch.testing.assert_close(loaded(*batch).logits, model(*batch).logits, rtol=0.05, atol=0.02)


def test_load_errors(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = saved
    weights, config = folder / "model.safetensors", folder / "config.json"
    state, text = load_file(weights), config.read_text()
    with pytest.raises(FileNotFoundError, match="no folder"):
        RISModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder"):
        RISModel.from_pretrained("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        RISModel.from_pretrained(tmp_path)

    changed = dict(state)
    changed["decoder.foreign"] = changed.pop("decoder.classifier.bias")
    save_file(changed, weights)
    with pytest.raises(ValueError, match=r"1 missing \(decoder.classifier.bias\); 1 unexpected \(decoder.foreign\)"):
        RISModel.from_pretrained(folder)
    save_file({**state, "decoder.classifier.bias": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match=r"decoder.classifier.bias is \(3,\), not \(2,\)"):
        RISModel.from_pretrained(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        RISModel.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        RISModel.from_pretrained(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        RISModel.from_pretrained(folder)
    config.write_text(text.replace('"decoder_width"', '"decoder_with"'))
    with pytest.raises(ValueError, match="Did you mean 'decoder_width'"):
        RISModel.from_pretrained(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_backbone_weights_from_a_file(tmp_path, suffix):
    from safetensors.torch import save_file

    name, args, _ = FAMILIES["resnet"]
    source = timm.create_model(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(source.state_dict(), path)
    model = RISModel(tiny("resnet"), backbone_weights=path)
    assert torch.equal(model.backbone.blocks["layer3"][0].conv1.weight, source.layer3[0].conv1.weight)

    state = {k: v for k, v in source.state_dict().items() if k != "layer2.0.conv1.weight"}
    save(state, path)
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1\.weight"):
        RISModel(tiny("resnet"), backbone_weights=path)
    save({**source.state_dict(), "blocks.0.attn.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.weight"):
        RISModel(tiny("resnet"), backbone_weights=path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RISModel(tiny("resnet"), backbone_weights=tmp_path / "nowhere.pth")


def test_rejects_backbone_weights_of_another_family(tmp_path):
    name, args, _ = FAMILIES["resnet"]
    source = timm.create_model(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    for family in ("swin", "efficientnet"):
        with pytest.raises(ValueError, match=r"resnet\.pth: "):
            RISModel(tiny(family), backbone_weights=tmp_path / "resnet.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "parts.pth")
    with pytest.raises(ValueError, match=r"parts\.pth: timm cannot convert these keys for a ConvNeXt \(KeyError"):
        RISModel(tiny("convnext"), backbone_weights=tmp_path / "parts.pth")


def test_rejects_backbone_weights_that_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"a": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth holds objects other than .*: builtins\.print") as error:
        RISModel(tiny("resnet"), backbone_weights=tmp_path / "bad.pth")
    assert "weights_only" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_backbone_weights_from_a_training_checkpoint(tmp_path):
    """timm's checkpoints hold an argparse.Namespace, and names with data-parallel and compile prefixes."""
    name, args, _ = FAMILIES["resnet"]
    source = timm.create_model(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    state = {f"module._orig_mod.{key}": value for key, value in source.state_dict().items()}
    settings = argparse.Namespace(model=name, lr=0.1, betas=[0.9, 0.99], output=None)
    torch.save({"epoch": 3, "state_dict": state, "args": settings, "metric": 71.2}, tmp_path / "best.pth.tar")
    model = RISModel(tiny("resnet"), backbone_weights=tmp_path / "best.pth.tar")
    assert torch.equal(model.backbone.blocks["layer3"][0].conv1.weight, source.layer3[0].conv1.weight)


def test_saves_a_partly_compiled_model_under_plain_names(tmp_path):
    model = build(tiny())
    model.backbone = torch.compile(model.backbone, backend="eager")
    torch.compile(model, backend="eager").save_pretrained(tmp_path)
    loaded = RISModel.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(build(tiny()).state_dict())
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "_orig_mod" in dict(model.backbone.named_children())  # still compiled


def test_text_weights_from_a_folder(tmp_path):
    source = build(tiny())
    source.text_encoder.model.save_pretrained(tmp_path / "bert")
    torch.manual_seed(9)
    model = RISModel(tiny(), text_weights=tmp_path / "bert")
    for a, b in zip(model.text_encoder.parameters(), source.text_encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="text weights"):
        RISModel(tiny(text={**TEXT, "num_hidden_layers": 2}), text_weights=tmp_path / "bert")
    with pytest.raises(ValueError, match="text weights"):
        RISModel(tiny(text={**TEXT, "hidden_size": 32}), text_weights=tmp_path / "bert")


@pytest.mark.parametrize(("text_model", "limit"), [("bert", 12), ("roberta", 10), ("mpnet", 10)])
def test_position_embeddings_limit_the_sentence_length(text_model, limit):
    """RoBERTa and MPNet number positions from the padding id (1) upwards."""
    model = build(tiny(text_model=text_model)).eval()
    image, ids, _ = inputs(1, words=limit)
    ids = ids.clamp(min=2)
    assert model.text_encoder.max_words == limit
    assert model(image, ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"the text encoder takes at most {limit}: truncate it"):
        model(image, torch.cat([ids, ids[:, :1]], dim=1))
