"""Models: every output field, masks, gradients, backbones of several families, saving, and what is refused."""

from __future__ import annotations

import argparse
import copy
import json

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

from fastkd.models import RISConfig, RISModel, list_presets, preset  # noqa: E402
from fastkd.models.backbone import StagedBackbone  # noqa: E402
from fastkd.models.fusion import Fusion, instance_norm  # noqa: E402

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
FAMILIES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "img_size": 64,
            "strict_img_size": False,
        },
        (0, 1, 2, 3),
    ),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}, (0, 1, 2, 3)),
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24], "stem_width": 8}, (1, 2, 3, 4)),
    "mobilenetv4": ("mobilenetv4_conv_small_035", {}, (1, 2, 3, 4)),
    "efficientnet": ("efficientnet_lite0", {}, (0, 1, 2, 3, 4)),
    "byob": (
        "gernet_s",
        {
            "blocks": [{"type": "basic", "d": 1, "c": c, "s": s, "gs": 0} for c, s in ((8, 1), (16, 2), (24, 2))],
            "stem_chs": 8,
            "stem_type": "3x3",
            "num_features": 0,
        },
        (0, 1, 2),
    ),
}


def tiny(family: str = "byob", **changes) -> RISConfig:
    name, args, out_indices = FAMILIES[family]
    values = {"backbone": name, "backbone_args": args, "out_indices": out_indices, "text": TEXT, "decoder_width": 12}
    return RISConfig(**{**values, **changes})


def build(config: RISConfig) -> RISModel:
    torch.manual_seed(0)
    return RISModel(config)


def inputs(batch: int = 2, words: int = 7, size: int = 64):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, size, size, generator=generator)
    ids = torch.randint(1, 40, (batch, words), generator=generator)
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[-1, words - 3 :] = False
    return image, ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_output_fields(family):
    config = tiny(family, decoder_hidden=10)
    model = build(config).eval()
    image, ids, mask = inputs()
    out = model(image, ids, mask)
    strides, channels = model.backbone.strides, model.backbone.channels
    sides = [64 // s for s in strides]
    assert out.logits.shape == (2, 2, 64, 64)
    assert out.decoder.shape == (2, 2, sides[0], sides[0])
    assert out.decoder_features.shape == (2, 12, sides[0], sides[0])
    assert [tuple(s.shape) for s in out.stages] == [(2, c, n, n) for c, n in zip(channels, sides, strict=True)]
    assert out.words.shape == (2, 7, 16)
    assert [tuple(m.shape) for m in out.pixel_word_logits] == [(2, 1, n * n, 7) for n in sides]
    assert torch.equal(out.word_mask, mask)
    assert all(t.isfinite().all() for t in (out.logits, *out.stages, *out.pixel_word_logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_walk_equals_timm(family):
    """With a hook that changes nothing, the stage maps are those of timm's own features_only network."""
    name, args, out_indices = FAMILIES[family]
    ours = StagedBackbone(name, args, out_indices).eval()
    if "blocks" in args:
        from timm.models.byobnet import ByoBlockCfg

        args = {**args, "blocks": [ByoBlockCfg(**b) for b in args["blocks"]]}
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    theirs = timm.create_model(name, features_only=True, out_indices=out_indices, **args).eval()
    values = ours.state_dict().values()  # both hold the same modules in the same order under different names
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    image, _, _ = inputs()
    expected = theirs(image)
    got = ours(image, lambda i, x: (x, x))
    if str(getattr(theirs, "output_fmt", "NCHW")).endswith("NHWC"):
        expected = [x.permute(0, 3, 1, 2) for x in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["swin", "byob"])
def test_fused_map_feeds_the_next_stage(family):
    """A change made to stage i by the hook reaches stage i + 1 and not stage i - 1."""
    name, args, out_indices = FAMILIES[family]
    backbone = StagedBackbone(name, args, out_indices).eval()
    image, _, _ = inputs()
    plain = backbone(image, lambda i, x: (x, x))
    changed = backbone(image, lambda i, x: (x, x + (i == 1)))
    assert torch.equal(plain[0], changed[0])
    assert torch.equal(plain[1], changed[1])
    assert not torch.allclose(plain[2], changed[2])


@pytest.mark.parametrize("heads", [1, 2, (1, 2, 4)])
def test_padding_words_change_nothing(heads):
    model = build(tiny(fusion_heads=heads)).eval()
    image, ids, mask = inputs()
    out = model(image, ids, mask)
    other = torch.where(mask, ids, torch.full_like(ids, 33))
    other = torch.cat([other, torch.full((2, 4), 7)], dim=1)
    longer = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    again = model(image, other, longer)
    torch.testing.assert_close(again.logits, out.logits, rtol=1e-5, atol=1e-5)
    for a, b in zip(again.pixel_word_logits, out.pixel_word_logits, strict=True):
        valid = mask[:, None, None].expand_as(b)
        torch.testing.assert_close(a[..., :7][valid], b[valid], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(image, ids.roll(1, 0), mask).logits, out.logits)  # words do matter


def test_mask_defaults_to_the_padding_id():
    model = build(tiny()).eval()
    image, ids, mask = inputs()
    ids = ids * mask
    assert torch.equal(model(image, ids).word_mask, mask)
    torch.testing.assert_close(model(image, ids).logits, model(image, ids, mask).logits)


def test_word_vectors_in_place_of_ids():
    model = build(tiny()).eval()
    image, ids, mask = inputs()
    out = model(image, ids, mask)
    torch.testing.assert_close(model(image, words=out.words, word_mask=mask).logits, out.logits)


def test_samples_do_not_mix_in_eval():
    model = build(tiny()).eval()
    image, ids, mask = inputs(3)
    together = model(image, ids, mask)
    alone = model(image[2:], ids[2:], mask[2:])
    torch.testing.assert_close(together.logits[2:], alone.logits, rtol=1e-4, atol=1e-5)


def test_pixel_word_logits_are_those_of_the_softmax():
    """Rebuilding a stage's fusion from the returned logits gives the fusion's own output."""
    torch.manual_seed(0)
    fusion = Fusion(8, 6, heads=2).eval()
    x, words = torch.randn(2, 8, 5, 3), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    seen = []
    fusion.attention.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    _, _, logits = fusion(x, words, mask)
    pixels, (read, _) = seen[0]
    attention = fusion.attention
    query = instance_norm(attention.f_query(pixels)).double()
    key = attention.f_key(words).double()
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        literal = torch.einsum("bnc,btc->bnt", query[..., part], key[..., part]) / 8**0.5
        torch.testing.assert_close(logits[:, h].double(), literal, rtol=1e-5, atol=1e-6)
    weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    value = attention.f_value(words).unflatten(-1, (2, 4)).transpose(1, 2)
    again = attention.norm(attention.W((weights @ value).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(again, read, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["swin", "resnet", "byob"])
@pytest.mark.parametrize("coordinates", [True, False])
def test_gradients_reach_every_parameter(family, coordinates):
    model = build(tiny(family, coordinates=coordinates))
    image, ids, mask = inputs(4)
    out = model(image, ids, mask)
    (out.logits * torch.randn_like(out.logits)).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
    # A fresh residual block of timm starts with a last norm of weight 0, which blocks the first gradient before it.
    zero = [n for n, p in model.named_parameters() if p.grad.abs().max() == 0 and not n.startswith("backbone.")]
    assert not zero


@pytest.mark.parametrize("name", ["shapes-teacher", "shapes-student"])
def test_shapes_presets_send_gradients_everywhere(name):
    model = build(preset(name))
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    image, ids, mask = inputs(2)
    out = model(image, ids, mask)
    (out.logits * torch.randn_like(out.logits)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_shapes_presets_match_each_other():
    teacher, student = RISModel(preset("shapes-teacher")), RISModel(preset("shapes-student"))
    assert teacher.parameter_count()["total"] <= 2_900_000
    assert student.parameter_count()["total"] <= 400_000
    assert teacher.backbone.strides == student.backbone.strides == [2, 4, 8, 16]
    image, ids, mask = inputs()
    t, s = teacher.eval()(image, ids, mask), student.eval()(image, ids, mask)
    assert t.decoder_features.shape == s.decoder_features.shape == (2, 64, 32, 32)
    from fastkd.data import load_tokenizer

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


def test_eval_is_deterministic_and_train_is_not_needed_for_it():
    model = build(tiny("swin", text={**TEXT, "hidden_dropout_prob": 0.5})).eval()
    batch = inputs()
    assert torch.equal(model(*batch).logits, model(*batch).logits)
    model.train()
    assert not torch.equal(model(*batch).logits, model(*batch).logits)


@pytest.mark.parametrize(("height", "width"), [(40, 56), (33, 47)])
def test_any_image_size(height, width):
    for family in ("byob", "resnet", "efficientnet", "swin"):
        model = build(tiny(family)).eval()
        _, ids, mask = inputs()
        out = model(torch.randn(2, 3, height, width), ids, mask)
        assert out.logits.shape == (2, 2, height, width)
        assert out.logits.isfinite().all()


def test_a_size_the_backbone_refuses():
    _, ids, mask = inputs()
    strict = tiny("swin", backbone_args={**FAMILIES["swin"][1], "strict_img_size": True})
    with pytest.raises(ValueError, match=r"\(33, 64\).*Input height \(33\) doesn't match model \(64\)"):
        build(strict)(torch.randn(2, 3, 33, 64), ids, mask)


def test_one_pixel_stages_give_no_nan():
    """32 px at stride 32 leaves one pixel, which has no spread to normalise by."""
    model = build(tiny("convnext"))
    image, ids, mask = inputs(size=32)
    out = model(image, ids, mask)
    assert out.stages[-1].shape[-2:] == (1, 1)
    out.logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert instance_norm(torch.full((1, 4, 3), 2.0)).eq(0).all()


def test_channels_last_and_bf16_agree_with_plain():
    model = build(tiny()).eval()
    image, ids, mask = inputs()
    plain = model(image, ids, mask).logits
    last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        last(image.contiguous(memory_format=torch.channels_last), ids, mask).logits, plain, rtol=1e-4, atol=1e-4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(image, ids, mask).logits
    assert (low.float() - plain).abs().max() < 0.1 * plain.abs().max() + 0.05


def test_deepcopy_is_independent():
    model = build(tiny()).eval()
    twin = copy.deepcopy(model)
    batch = inputs()
    assert torch.equal(twin(*batch).logits, model(*batch).logits)
    with torch.no_grad():
        next(twin.decoder.parameters()).add_(1)
    assert not torch.equal(twin(*batch).logits, model(*batch).logits)


# Saving and loading


@pytest.fixture
def saved(tmp_path):
    model = build(tiny("swin", fusion_heads=2)).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip(saved):
    model, folder = saved
    again = RISModel.from_pretrained(folder)
    assert again.config == model.config
    assert not again.training
    batch = inputs()
    assert torch.equal(again(*batch).logits, model(*batch).logits)
    assert json.loads((folder / "config.json").read_text())["backbone"] == "swin_tiny_patch4_window7_224"
    RISModel.from_pretrained(str(folder)).save_pretrained(folder.parent / "again")
    assert (folder / "config.json").read_text() == (folder.parent / "again" / "config.json").read_text()


def test_half_precision_weights_load(saved):
    from safetensors.torch import load_file, save_file

    model, folder = saved
    state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    again = RISModel.from_pretrained(folder)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    batch = inputs()
    torch.testing.assert_close(again(*batch).logits, model(*batch).logits, rtol=0.05, atol=0.02)


def test_load_errors_name_what_is_wrong(saved, tmp_path):
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
    with pytest.raises(ValueError, match="did you mean decoder_width"):
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


def test_backbone_weights_of_another_family_are_refused(tmp_path):
    name, args, _ = FAMILIES["resnet"]
    source = timm.create_model(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    for family in ("swin", "efficientnet"):
        with pytest.raises(ValueError, match=r"resnet\.pth: "):
            RISModel(tiny(family), backbone_weights=tmp_path / "resnet.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "parts.pth")
    with pytest.raises(ValueError, match=r"parts\.pth: timm cannot translate these keys for a ConvNeXt \(KeyError"):
        RISModel(tiny("convnext"), backbone_weights=tmp_path / "parts.pth")


def test_backbone_weights_with_code_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"a": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth holds objects other than .*: builtins\.print") as error:
        RISModel(tiny("resnet"), backbone_weights=tmp_path / "bad.pth")
    assert "weights_only" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_backbone_weights_of_a_training_run(tmp_path):
    """timm's checkpoints hold their settings as an argparse.Namespace; data-parallel and compiled names."""
    name, args, _ = FAMILIES["resnet"]
    source = timm.create_model(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    state = {f"module._orig_mod.{key}": value for key, value in source.state_dict().items()}
    settings = argparse.Namespace(model=name, lr=0.1, betas=[0.9, 0.99], output=None)
    torch.save({"epoch": 3, "state_dict": state, "args": settings, "metric": 71.2}, tmp_path / "best.pth.tar")
    model = RISModel(tiny("resnet"), backbone_weights=tmp_path / "best.pth.tar")
    assert torch.equal(model.backbone.blocks["layer3"][0].conv1.weight, source.layer3[0].conv1.weight)


def test_a_model_compiled_in_part_is_saved_under_its_own_names(tmp_path):
    model = build(tiny())
    model.backbone = torch.compile(model.backbone, backend="eager")
    torch.compile(model, backend="eager").save_pretrained(tmp_path)
    again = RISModel.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(build(tiny()).state_dict())
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
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
def test_the_longest_sentence_is_what_the_table_of_positions_holds(text_model, limit):
    """RoBERTa's and MPNet's positions begin after the padding id, 1."""
    model = build(tiny(text_model=text_model)).eval()
    image, ids, _ = inputs(1, words=limit)
    ids = ids.clamp(min=2)
    assert model.text_encoder.max_words == limit
    assert model(image, ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"the text encoder takes {limit}: cut it"):
        model(image, torch.cat([ids, ids[:, :1]], dim=1))


# What is refused


def test_bad_configurations():
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
    with pytest.raises(ValueError, match="decoder_width must be a whole number of at least 1, got '64'"):
        tiny(decoder_width="64")
    with pytest.raises(ValueError, match="out_indices must be whole numbers"):
        tiny(out_indices=3)
    for field, wrong, says in (
        ("backbone", 5, "a string"),
        ("text_model", None, "a string"),
        ("tokenizer", 5, "a string or None"),
        ("backbone_args", [1], "a dict of arguments"),
        ("text", None, "a dict of arguments"),
        ("coordinates", "no", "true or false"),
        ("fusion_heads", True, "whole numbers"),
        ("out_indices", [True, 2, 3], "whole numbers"),
    ):
        with pytest.raises(ValueError, match=f"{field} must be {says}"):
            tiny(**{field: wrong})
    with pytest.raises(ValueError, match="'bert' has no argument 'hiden_size'; did you mean hidden_size"):
        RISModel(tiny(text={"hiden_size": 16}))
    with pytest.raises(FileNotFoundError, match="no folder of text weights at /nowhere"):
        RISModel(tiny(), text_weights="/nowhere")
    with pytest.raises(ValueError, match="has no encoder 'distillbert'; close matches: distilbert") as unknown:
        RISModel(tiny(text_model="distillbert"))
    assert len(str(unknown.value)) < 200  # transformers' own message lists its models, several hundred
    with pytest.raises(TypeError, match="JSON"):
        tiny(backbone_args={"act_layer": torch.nn.ReLU})
    with pytest.raises(TypeError, match="RISConfig"):
        RISModel({"backbone": "resnet18"})
    with pytest.raises(ValueError, match="did you mean shapes-student"):
        preset("shape-student")


def test_bad_inputs():
    model = build(tiny()).eval()
    image, ids, mask = inputs()
    cases = [
        (ValueError, "image must be", (image[0], ids, mask)),
        (ValueError, "image must be", (image[:0], ids[:0], mask[:0])),
        (TypeError, "image must be floating", (image.to(torch.uint8), ids, mask)),
        (ValueError, "neither", (image,)),
        (ValueError, "both", (image, ids, mask, torch.zeros(2, 7, 16))),
        (ValueError, "input_ids must be", (image, ids[:1], mask[:1])),
        (TypeError, "input_ids must be int", (image, ids.float(), mask)),
        (ValueError, "takes 12", (image, ids.repeat(1, 2), mask.repeat(1, 2))),
        (ValueError, "vocabulary has 40", (image, ids + 40, mask)),
        (TypeError, "word_mask must be bool", (image, ids, mask.long())),
        (ValueError, "word_mask must be", (image, ids, mask[:, :3])),
        (ValueError, "sample 1", (image, ids, mask * torch.tensor([[True], [False]]))),
        (ValueError, "sample 0", (image, ids * 0)),
        (ValueError, "D=16", (image, None, mask, torch.zeros(2, 7, 5))),
        (TypeError, "words must be floating point", (image, None, mask, torch.zeros(2, 7, 16, dtype=torch.int64))),
        (ValueError, "image must be", (image[..., :0], ids, mask)),
        (ValueError, "image is on meta, the model on cpu", (image.to("meta"), ids, mask)),
        (ValueError, "word_mask is on meta", (image, ids, mask.to("meta"))),
        (TypeError, "input_ids must be a tensor, got list", (image, ids.tolist(), mask)),
    ]
    for kind, message, args in cases:
        with pytest.raises(kind, match=message):
            model(*args)
