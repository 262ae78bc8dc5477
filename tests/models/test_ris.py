"""RISModel's forward: output fields, masks, gradients, backbones of several families, bad inputs."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

import timm
from tiny_models import FAMILIES, TEXT, build, inputs, tiny

from fastkd.models.backbone import StagedBackbone
from fastkd.models.fusion import Fusion, instance_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_output_shapes(family):
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
def test_staged_backbone_matches_timm_features_only(family):
    """An identity hook leaves the stage maps bitwise equal to timm's features_only."""
    name, args, out_indices = FAMILIES[family]
    ours = StagedBackbone(name, args, out_indices).eval()
    if "blocks" in args:
        from timm.models.byobnet import ByoBlockCfg

        args = {**args, "blocks": [ByoBlockCfg(**b) for b in args["blocks"]]}
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    theirs = timm.create_model(name, features_only=True, out_indices=out_indices, **args).eval()
    values = ours.state_dict().values()  # same modules in the same order, under other names
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
    """A change of stage i by the hook affects stage i + 1 but not earlier stages."""
    name, args, out_indices = FAMILIES[family]
    backbone = StagedBackbone(name, args, out_indices).eval()
    image, _, _ = inputs()
    plain = backbone(image, lambda i, x: (x, x))
    changed = backbone(image, lambda i, x: (x, x + (i == 1)))
    assert torch.equal(plain[0], changed[0])
    assert torch.equal(plain[1], changed[1])
    assert not torch.allclose(plain[2], changed[2])


@pytest.mark.parametrize("heads", [1, 2, (1, 2, 4)])
def test_ignores_padding_words(heads):
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
    assert not torch.allclose(model(image, ids.roll(1, 0), mask).logits, out.logits)  # the words have an effect


def test_word_mask_defaults_to_the_padding_id():
    model = build(tiny()).eval()
    image, ids, mask = inputs()
    ids = ids * mask
    assert torch.equal(model(image, ids).word_mask, mask)
    torch.testing.assert_close(model(image, ids).logits, model(image, ids, mask).logits)


def test_accepts_word_vectors():
    model = build(tiny()).eval()
    image, ids, mask = inputs()
    out = model(image, ids, mask)
    torch.testing.assert_close(model(image, words=out.words, word_mask=mask).logits, out.logits)


def test_samples_are_independent_in_eval_mode():
    model = build(tiny()).eval()
    image, ids, mask = inputs(3)
    together = model(image, ids, mask)
    alone = model(image[2:], ids[2:], mask[2:])
    torch.testing.assert_close(together.logits[2:], alone.logits, rtol=1e-4, atol=1e-5)


def test_returned_logits_reproduce_the_fusion():
    """Recompute a stage's attention output from the returned logits."""
    torch.manual_seed(0)
    fusion = Fusion(8, 6, heads=2).eval()
    x, words = torch.randn(2, 8, 5, 3), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    calls = []
    fusion.attention.register_forward_hook(lambda m, args, out: calls.append((args[0], out)))
    _, _, logits = fusion(x, words, mask)
    pixels, (expected, _) = calls[0]
    attention = fusion.attention
    query = instance_norm(attention.f_query(pixels)).double()
    key = attention.f_key(words).double()
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        naive = torch.einsum("bnc,btc->bnt", query[..., part], key[..., part]) / 8**0.5
        torch.testing.assert_close(logits[:, h].double(), naive, rtol=1e-5, atol=1e-6)
    weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    value = attention.f_value(words).unflatten(-1, (2, 4)).transpose(1, 2)
    output = attention.norm(attention.W((weights @ value).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["swin", "resnet", "byob"])
@pytest.mark.parametrize("coordinates", [True, False])
def test_gradients_reach_every_parameter(family, coordinates):
    model = build(tiny(family, coordinates=coordinates))
    image, ids, mask = inputs(4)
    out = model(image, ids, mask)
    (out.logits * torch.randn_like(out.logits)).sum().backward()
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without_gradient
    # timm initialises the last norm of a residual block to 0, which blocks the first gradient before it.
    zero = [n for n, p in model.named_parameters() if p.grad.abs().max() == 0 and not n.startswith("backbone.")]
    assert not zero


def test_eval_mode_is_deterministic_and_train_mode_is_not():
    model = build(tiny("swin", text={**TEXT, "hidden_dropout_prob": 0.5})).eval()
    batch = inputs()
    assert torch.equal(model(*batch).logits, model(*batch).logits)
    model.train()
    assert not torch.equal(model(*batch).logits, model(*batch).logits)


@pytest.mark.parametrize(("height", "width"), [(40, 56), (33, 47)])
def test_supports_odd_image_sizes(height, width):
    for family in ("byob", "resnet", "efficientnet", "swin"):
        model = build(tiny(family)).eval()
        _, ids, mask = inputs()
        out = model(torch.randn(2, 3, height, width), ids, mask)
        assert out.logits.shape == (2, 2, height, width)
        assert out.logits.isfinite().all()


def test_rejects_a_size_that_the_backbone_does_not_support():
    _, ids, mask = inputs()
    strict = tiny("swin", backbone_args={**FAMILIES["swin"][1], "strict_img_size": True})
    with pytest.raises(ValueError, match=r"\(33, 64\).*Input height \(33\) doesn't match model \(64\)"):
        build(strict)(torch.randn(2, 3, 33, 64), ids, mask)


def test_one_pixel_stages_have_finite_gradients():
    """32 px at stride 32 leaves one pixel, whose variance over pixels is zero."""
    model = build(tiny("convnext"))
    image, ids, mask = inputs(size=32)
    out = model(image, ids, mask)
    assert out.stages[-1].shape[-2:] == (1, 1)
    out.logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert instance_norm(torch.full((1, 4, 3), 2.0)).eq(0).all()


def test_channels_last_and_bf16_match_the_default():
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
    copied = copy.deepcopy(model)
    batch = inputs()
    assert torch.equal(copied(*batch).logits, model(*batch).logits)
    with torch.no_grad():
        next(copied.decoder.parameters()).add_(1)
    assert not torch.equal(copied(*batch).logits, model(*batch).logits)


def test_classifier_may_have_no_weight_attribute():
    """As in quantised or wrapped layers."""
    model = build(tiny()).eval()
    batch = inputs()
    expected = model(*batch).logits
    model.decoder.classifier = torch.nn.Sequential(model.decoder.classifier)
    assert not hasattr(model.decoder.classifier, "weight")
    assert torch.equal(model(*batch).logits, expected)


def test_rejects_bad_inputs():
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
        (ValueError, "takes at most 12", (image, ids.repeat(1, 2), mask.repeat(1, 2))),
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
