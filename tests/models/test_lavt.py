"""LAVT's forward against the published model's outputs and a slow independent implementation; gradients; bad inputs."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from lavt_oracle import Oracle
from tiny_lavt import BERT, DEPTHS, HEADS, bert_weights, inputs, relative_error, weights

from fastkd import Distiller, Taps, Term, losses
from fastkd.models import LAVT, LAVTConfig
from fastkd.train import segmentation_loss

GOLDEN = Path(__file__).parent / "assets" / "lavt_w7_480.json"


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    return weights()


@pytest.fixture(scope="module")
def bert() -> dict[str, torch.Tensor]:
    return bert_weights(**BERT)


def test_matches_the_published_model():
    """Compare with outputs of the published code: narrow, window 7, 480×480, weights as a function of their names."""
    golden = json.loads(GOLDEN.read_text())
    state = weights(golden["embed"], golden["depths"], golden["heads"], golden["window"], 768)
    model = LAVT.from_state_dict(state, fusion_heads=golden["mha"])
    generator = np.random.default_rng(zlib.crc32(b"input:w7_480"))
    image = generator.standard_normal((2, 3, golden["size"], golden["size"])).astype(np.float32)
    words = generator.standard_normal((2, 768, golden["words"])).astype(np.float32)
    mask = torch.arange(golden["words"]) < torch.tensor(golden["valid_words"])[:, None]
    with torch.no_grad():
        out = model(torch.from_numpy(image), words=torch.from_numpy(words).transpose(1, 2), word_mask=mask)
    found = {"logits_low": out.decoder[:, :, ::5, ::5], "logits_full_sample": out.logits[:, :, ::40, ::40]}
    for i, stage in enumerate(out.stages):
        steps = [max(1, side // 8) for side in stage.shape[1:]]
        found[f"stage{i}"] = stage[:, :: steps[0], :: steps[1], :: steps[2]]
        found[f"stage{i}_mean"] = stage.mean((2, 3))
    assert found.keys() == golden["samples"].keys()
    for name, sample in golden["samples"].items():
        ours = found[name].contiguous()
        assert list(ours.shape) == sample["shape"]
        assert relative_error(ours.flatten()[:: sample["step"]], sample["values"]) < 1e-4, name
        assert abs(float(ours.double().norm()) / sample["norm"] - 1) < 1e-5, name


REGIMES = {
    # Maps of 94, 47, 24, 12: only the last is one whole window; odd maps are merged and resized.
    "window 12 at 376": ((376, 376), 12, 8, (1, 2, 4, 8), (2, 2, 2, 2)),
    # Maps of 25×33, 13×17, 7×9, 4×5: each has an odd side, the last is smaller than a window.
    "window 7, oblong": ((100, 132), 7, 8, (2, 1, 8, 4), (2, 2, 3, 2)),
    # Maps of 16, 8, 4, 2: three are smaller than one window; they are padded to it and still shifted.
    "small maps": ((64, 64), 12, 8, (1, 1, 1, 1), (2, 2, 2, 2)),
    # Sides that are not multiples of the patch.
    "ragged image": ((70, 45), 4, 16, (4, 4, 4, 4), (1, 2, 1, 2)),
    "even window of 2": ((96, 40), 2, 8, (1, 2, 2, 8), (3, 1, 1, 2)),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_matches_the_oracle(regime):
    size, window, embed, fusion_heads, depths = REGIMES[regime]
    state = weights(embed, depths, HEADS, window)
    model = LAVT.from_state_dict(state, fusion_heads)
    assert model.config.depths == depths
    assert (model.config.window, model.config.heads, model.config.embed) == (window, HEADS, embed)
    image, words, mask = inputs(size)
    with torch.no_grad():
        out = model(image, words=words, word_mask=mask)
    assert [tuple(m.shape) for m in out.pixel_word_logits] == [
        (2, heads, s.shape[2] * s.shape[3], 5) for heads, s in zip(fusion_heads, out.stages, strict=True)
    ]
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    sample = 1  # has masked words
    oracle = Oracle(arrays, depths, HEADS, window, fusion_heads)
    full, low = oracle.run(image[sample].numpy(), words[sample].numpy(), mask[sample].numpy())
    for i in range(4):
        assert relative_error(out.stages[i][sample].permute(1, 2, 0), oracle.stages[i]) < 1e-4
        assert relative_error(out.pixel_word_logits[i][sample], oracle.logits[i]) < 1e-4
    assert relative_error(out.decoder[sample].permute(1, 2, 0), low) < 1e-4
    assert relative_error(out.logits[sample].permute(1, 2, 0), full) < 1e-4
    assert out.logits.shape == (2, 2, *size)


def test_single_word_does_not_amplify_rounding():
    """All pixels attend alike, so InstanceNorm returns 0 and the fused map depends only on biases."""
    state = weights(8, DEPTHS, HEADS, 7)
    model = LAVT.from_state_dict(state, (1, 2, 2, 4))
    image, words, _ = inputs((160, 160))
    mask = torch.tensor([[True, False, False, False, False], [False, False, True, False, False]])
    with torch.no_grad():
        out = model(image, words=words, word_mask=mask)
        alone = model(image[1:], words=words[1:, 2:3])
    oracle = Oracle({name: tensor.numpy() for name, tensor in state.items()}, DEPTHS, HEADS, 7, (1, 2, 2, 4))
    full, _ = oracle.run(image[1].numpy(), words[1].numpy(), mask[1].numpy())
    for found in (out.logits[1], alone.logits[0]):
        assert relative_error(found.permute(1, 2, 0), full) < 1e-5
    for i in range(4):
        assert relative_error(out.stages[i][1].permute(1, 2, 0), oracle.stages[i]) < 1e-5


def test_float64_matches_the_oracle_more_closely():
    """The float32 tolerance is 1e-4; in float64 only the order of summation differs."""
    state = weights(8, DEPTHS, HEADS, 7)
    model = LAVT.from_state_dict(state, (1, 2, 2, 4)).double()
    image, words, mask = (t.double() if t.is_floating_point() else t for t in inputs((60, 84)))
    with torch.no_grad():
        out = model(image, words=words, word_mask=mask)
    oracle = Oracle({name: tensor.numpy() for name, tensor in state.items()}, DEPTHS, HEADS, 7, (1, 2, 2, 4))
    full, _ = oracle.run(image[0].numpy(), words[0].numpy(), mask[0].numpy())
    assert relative_error(out.logits[0].permute(1, 2, 0), full) < 1e-9


def test_samples_and_masked_words_are_independent(small):
    model = LAVT.from_state_dict(small, (1, 2, 2, 4))
    image, words, mask = inputs()
    with torch.no_grad():
        both = model(image, words=words, word_mask=mask)
        alone = model(image[1:], words=words[1:], word_mask=mask[1:])
        garbage = model(image, words=torch.where(mask[..., None], words, 100.0), word_mask=mask)
        short = model(image[1:], words=words[1:, :2], word_mask=mask[1:, :2])
    torch.testing.assert_close(both.logits[1:], alone.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(both.logits, garbage.logits)
    torch.testing.assert_close(short.logits, alone.logits, rtol=1e-4, atol=1e-5)


def test_parameter_counts_match_the_published_model():
    """Swin-B, window 12, with fusion and decoder: 118.85 M parameters; BERT-base without pooler: 108.89 M."""
    text = {
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2,
    }  # fmt: skip
    config = LAVTConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), 12, text=text)
    with torch.device("meta"):
        count = LAVT(config).parameter_count()
    assert count["text_encoder"] == 108_891_648
    assert count["backbone"] + count["classifier"] == count["total"] - count["text_encoder"] == 118_847_866
    assert LAVTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_text_encoder_matches_transformers_bert(small, bert):
    from transformers import BertConfig, BertModel

    reference = BertModel(BertConfig(**BERT), add_pooling_layer=False).eval()
    reference.load_state_dict(bert)
    model = LAVT.from_state_dict(small, bert_state_dict=bert)
    ids, mask = torch.tensor([[2, 5, 9, 3, 0]]), torch.tensor([[True, True, True, True, False]])
    with torch.no_grad():
        ours = model(torch.zeros(1, 3, 64, 64), ids).words
        theirs = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert torch.equal(ours, theirs)


def test_rejects_bad_inputs(small, bert):
    model, plain = LAVT.from_state_dict(small, bert_state_dict=bert), LAVT.from_state_dict(small)
    image, words, mask = inputs()
    ids = mask.long()
    cases = [
        (model, ValueError, "words must be .B, T, D. with B=2, D=64, got .2, 5, 7.", {"words": words[..., :7]}),
        (model, ValueError, "words must be", {"words": words.transpose(1, 2)}),
        (model, ValueError, "words must be", {"words": words[:1]}),
        (model, TypeError, "words must be floating point", {"words": words.long()}),
        (model, ValueError, "word_mask must be .2, 5. like the words, got .2, 3.", {"word_mask": mask[:, :3]}),
        (model, ValueError, "word_mask must be .2, 5.", {"word_mask": mask[..., None]}),
        (model, TypeError, "word_mask must be bool", {"word_mask": mask.float()}),
        (model, ValueError, "no valid word in sample 1", {"word_mask": mask & torch.tensor([[True], [False]])}),
        (model, ValueError, "got both", {"input_ids": ids}),
        (model, ValueError, "got neither", {"words": None}),
        (model, ValueError, "vocabulary has 40 words", {"words": None, "input_ids": ids * 40}),
        (model, ValueError, "the text encoder takes at most 12", {"words": None, "input_ids": ids.repeat(1, 3)}),
        (plain, ValueError, "no text encoder", {"words": None, "input_ids": ids}),
        (model, ValueError, "image must be", {"image": image[:, :1]}),
        (model, ValueError, "one pixel in the last stage", {"image": image[..., :32, :32]}),
        (model, TypeError, "image must be floating", {"image": image.byte()}),
        (model, ValueError, "image is on meta, the model on cpu", {"image": image.to("meta")}),
    ]
    for called, kind, message, change in cases:
        with pytest.raises(kind, match=message):
            called(**({"image": image, "words": words, "word_mask": mask} | change))


def test_classifier_may_have_no_weight_attribute(small):
    """As in quantised or wrapped layers."""
    model = LAVT.from_state_dict(small)
    image, words, mask = inputs()
    with torch.no_grad():
        expected = model(image, words=words, word_mask=mask).logits
        model.classifier.conv1_1 = torch.nn.Sequential(model.classifier.conv1_1)
        assert torch.equal(model(image, words=words, word_mask=mask).logits, expected)


def test_gradients_and_bf16(small, bert):
    model = LAVT.from_state_dict(small, (1, 2, 2, 4), bert_state_dict=bert)
    image, _, mask = inputs()
    ids = torch.full((2, 5), 7) * mask
    out = model(image, ids)
    out.logits.square().mean().backward()
    without_gradient = {name for name, p in model.named_parameters() if p.grad is None}
    assert without_gradient == {"backbone.layers.3.res_gate.0.weight", "backbone.layers.3.res_gate.2.weight"}  # unused
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        low = copy.deepcopy(model)(image, ids)
    assert relative_error(low.logits.float(), out.logits.detach()) < 0.1


def test_taps_and_terms_of_a_teacher(small, bert):
    teacher = LAVT.from_state_dict(small, bert_state_dict=bert).requires_grad_(False)
    student = LAVT.from_state_dict(weights(8, (1, 1, 1, 1)), bert_state_dict=bert)
    image, _, mask = inputs()
    batch = {"image": image, "input_ids": torch.full((2, 5), 7) * mask, "word_mask": mask, "mask": image[:, 0] > 0}
    with Taps(teacher, {"fused": ("backbone.layers.3.fusion", 0)}) as taps:
        out = teacher(image, batch["input_ids"])
        normalised = teacher.backbone.norm3(taps["fused"])
    torch.testing.assert_close(normalised, out.stages[3].flatten(2).transpose(1, 2))
    terms = [
        Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", kwargs={"word_mask": "batch.word_mask"}),
        Term(losses.channel_distribution_kd, "decoder_features"),
        Term(losses.channel_kd, "stages.3"),
        Term(losses.logit_kd, "decoder"),
    ]
    distiller = Distiller(student, teacher, segmentation_loss, terms)
    report = distiller.check(batch)
    assert all(norm > 0 for norm in report.norms.values())
