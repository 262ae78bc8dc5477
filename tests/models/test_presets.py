"""Presets and configurations."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from tiny_models import build, inputs, tiny

from fastkd.data import load_tokenizer
from fastkd.models import RISConfig, RISModel, list_presets, preset


@pytest.mark.parametrize("name", ["shapes-teacher", "shapes-student"])
def test_gradients_reach_every_parameter_of_the_shapes_presets(name):
    model = build(preset(name))
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    image, ids, mask = inputs(2)
    out = model(image, ids, mask)
    (out.logits * torch.randn_like(out.logits)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_shapes_presets_are_compatible():
    teacher, student = RISModel(preset("shapes-teacher")), RISModel(preset("shapes-student"))
    assert teacher.parameter_count()["total"] <= 2_900_000
    assert student.parameter_count()["total"] <= 400_000
    assert teacher.backbone.strides == student.backbone.strides == [2, 4, 8, 16]
    image, ids, mask = inputs()
    t, s = teacher.eval()(image, ids, mask), student.eval()(image, ids, mask)
    assert t.decoder_features.shape == s.decoder_features.shape == (2, 64, 32, 32)
    assert load_tokenizer("shapes").vocab_size <= student.text_encoder.vocab_size == teacher.text_encoder.vocab_size
    assert [m.shape for m in t.pixel_word_logits] == [m.shape for m in s.pixel_word_logits]


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_builds(name):
    config = preset(name)
    assert RISConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        model = RISModel(config)
    assert model.parameter_count()["total"] == sum(p.numel() for p in model.parameters())
    assert len(model.backbone.channels) == len(config.out_indices)


def test_rejects_bad_configurations():
    with pytest.raises(ValueError, match="resnet18"):
        RISModel(tiny(backbone="resnet_18"))
    with pytest.raises(ValueError, match="timm cannot build"):
        RISModel(tiny(backbone_args={"no_such_argument": 1}))
    with pytest.raises(ValueError, match="stages 0 to 2"):
        RISModel(tiny(out_indices=(0, 1, 7)))
    with pytest.raises(ValueError, match="does not divide"):
        RISModel(tiny(fusion_heads=3))
    with pytest.raises(ValueError, match="increasing"):
        tiny(out_indices=(2, 1))
    with pytest.raises(ValueError, match="2 numbers for 3 stages"):
        tiny(fusion_heads=(1, 1))
    with pytest.raises(ValueError, match="decoder_width"):
        tiny(decoder_width=0)
    with pytest.raises(ValueError, match="decoder_width must be an integer of at least 1, got '64'"):
        tiny(decoder_width="64")
    with pytest.raises(ValueError, match="out_indices must be integers"):
        tiny(out_indices=3)
    for field, wrong, expected in (
        ("backbone", 5, "a string"),
        ("text_model", None, "a string"),
        ("tokenizer", 5, "a string or None"),
        ("backbone_args", [1], "a dict of arguments"),
        ("text", None, "a dict of arguments"),
        ("coordinates", "no", "true or false"),
        ("fusion_heads", True, "integers"),
        ("out_indices", [True, 2, 3], "integers"),
    ):
        with pytest.raises(ValueError, match=f"{field} must be {expected}"):
            tiny(**{field: wrong})
    with pytest.raises(ValueError, match=r"'bert' has no argument 'hiden_size'\. Did you mean 'hidden_size'"):
        RISModel(tiny(text={"hiden_size": 16}))
    with pytest.raises(FileNotFoundError, match="no folder of text weights at /nowhere"):
        RISModel(tiny(), text_weights="/nowhere")
    with pytest.raises(ValueError, match=r"has no encoder 'distillbert'\. Did you mean 'distilbert'") as unknown:
        RISModel(tiny(text_model="distillbert"))
    assert len(str(unknown.value)) < 200  # transformers' own message lists several hundred models
    with pytest.raises(TypeError, match="JSON"):
        tiny(backbone_args={"act_layer": torch.nn.ReLU})
    with pytest.raises(TypeError, match="RISConfig"):
        RISModel({"backbone": "resnet18"})
    with pytest.raises(ValueError, match="Did you mean 'shapes-student'"):
        preset("shape-student")
