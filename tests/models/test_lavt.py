"""LAVT: the published numbers, an independent slow implementation in every regime of sizes, and what is refused."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lavt_oracle import Oracle, lavt_names, lavt_weights

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from fastkd import Distiller, Taps, Term, losses
from fastkd.models import LAVT, LAVTConfig
from fastkd.train import segmentation_loss

GOLDEN = Path(__file__).parent / "assets" / "lavt_w7_480.json"
DEPTHS, HEADS = (2, 2, 2, 2), (1, 2, 4, 8)
BERT = {
    "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96,
    "max_position_embeddings": 12, "type_vocab_size": 2,
}  # fmt: skip


def weights(embed=8, depths=DEPTHS, heads=HEADS, window=4, word_width=64, hidden=None) -> dict[str, torch.Tensor]:
    arrays = lavt_weights(lavt_names(embed, depths, heads, window, word_width, hidden))
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def bert_weights() -> dict[str, torch.Tensor]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**BERT), add_pooling_layer=False).state_dict()


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    return weights()


@pytest.fixture(scope="module")
def bert() -> dict[str, torch.Tensor]:
    return bert_weights()


def inputs(size=(64, 64), words=5, width=64, batch=2):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, *size, generator=generator)
    mask = torch.arange(words) < torch.tensor([[words], [max(1, words - 3)]])[:batch]
    return image, torch.randn(batch, words, width, generator=generator), mask


def relative(ours, theirs) -> float:
    ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# The same numbers as others


def test_published_numbers():
    """Values of the published model at a small width, window 7, 480×480; its weights are a function of their names."""
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
        assert relative(ours.flatten()[:: sample["step"]], sample["values"]) < 1e-4, name
        assert abs(float(ours.double().norm()) / sample["norm"] - 1) < 1e-5, name


REGIMES = {
    # 94, 47, 24, 12: whole windows only at the end, odd maps to merge and to resize to
    "window 12 at 376": ((376, 376), 12, 8, (1, 2, 4, 8), (2, 2, 2, 2)),
    # 25×33, 13×17, 7×9, 4×5: every map odd somewhere, the last smaller than a window
    "window 7, oblong": ((100, 132), 7, 8, (2, 1, 8, 4), (2, 2, 3, 2)),
    # 16, 8, 4, 2: three maps smaller than one window, which are padded to it, and shifted all the same
    "small maps": ((64, 64), 12, 8, (1, 1, 1, 1), (2, 2, 2, 2)),
    # sides that are no multiple of the patch
    "ragged image": ((70, 45), 4, 16, (4, 4, 4, 4), (1, 2, 1, 2)),
    "even window of 2": ((96, 40), 2, 8, (1, 2, 2, 8), (3, 1, 1, 2)),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_agrees_with_the_slow_implementation(regime):
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
    sample = 1  # the one with masked words
    oracle = Oracle(arrays, depths, HEADS, window, fusion_heads)
    full, low = oracle.run(image[sample].numpy(), words[sample].numpy(), mask[sample].numpy())
    for i in range(4):
        assert relative(out.stages[i][sample].permute(1, 2, 0), oracle.stages[i]) < 1e-4
        assert relative(out.pixel_word_logits[i][sample], oracle.logits[i]) < 1e-4
    assert relative(out.decoder[sample].permute(1, 2, 0), low) < 1e-4
    assert relative(out.logits[sample].permute(1, 2, 0), full) < 1e-4
    assert out.logits.shape == (2, 2, *size)


def test_one_word_leaves_no_rounding_to_amplify():
    """Every pixel reads the same then: InstanceNorm's result is 0, and only the biases are left of the fused map."""
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
        assert relative(found.permute(1, 2, 0), full) < 1e-5
    for i in range(4):
        assert relative(out.stages[i][1].permute(1, 2, 0), oracle.stages[i]) < 1e-5


def test_float64_agrees_closer_still():
    """1e-4 is float32's; in float64 nothing but the order of sums is left."""
    state = weights(8, DEPTHS, HEADS, 7)
    model = LAVT.from_state_dict(state, (1, 2, 2, 4)).double()
    image, words, mask = (t.double() if t.is_floating_point() else t for t in inputs((60, 84)))
    with torch.no_grad():
        out = model(image, words=words, word_mask=mask)
    oracle = Oracle({name: tensor.numpy() for name, tensor in state.items()}, DEPTHS, HEADS, 7, (1, 2, 2, 4))
    full, _ = oracle.run(image[0].numpy(), words[0].numpy(), mask[0].numpy())
    assert relative(out.logits[0].permute(1, 2, 0), full) < 1e-9


def test_samples_and_masked_words_do_not_mix(small):
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


def test_published_sizes():
    """Swin-B at window 12 with fusion and decoder has 118.85 M parameters, BERT-base without pooler 108.89 M."""
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


def test_names_are_the_published_ones(small):
    own = LAVT.from_state_dict(small).state_dict()
    assert set(own) == {name for name in small if not name.endswith("relative_position_index")}


# The text encoder


def test_text_weights_inside_or_apart(small, bert):
    apart = LAVT.from_state_dict(small, bert_state_dict=bert)
    inside = LAVT.from_state_dict(small | {f"text_encoder.{name}": tensor for name, tensor in bert.items()})
    assert apart.config == inside.config
    assert apart.config.text == BERT
    assert not apart.training
    image, _, mask = inputs()
    ids = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(2)) * mask
    with torch.no_grad():
        a, b = apart(image, ids, mask), inside(image, input_ids=ids)  # the mask of ids that are not 0 is the same
        words = apart.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        c = apart(image, words=words, word_mask=mask)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.word_mask, b.word_mask)
    assert torch.equal(a.logits, c.logits)
    assert a.words.shape == (2, 5, 64)


def test_text_encoder_is_transformers_bert(small, bert):
    from transformers import BertConfig, BertModel

    reference = BertModel(BertConfig(**BERT), add_pooling_layer=False).eval()
    reference.load_state_dict(bert)
    model = LAVT.from_state_dict(small, bert_state_dict=bert)
    ids, mask = torch.tensor([[2, 5, 9, 3, 0]]), torch.tensor([[True, True, True, True, False]])
    with torch.no_grad():
        ours = model(torch.zeros(1, 3, 64, 64), ids).words
        theirs = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert torch.equal(ours, theirs)


# Loading


def test_wrappers_and_computed_buffers_are_no_obstacle(small, bert):
    plain = LAVT.from_state_dict(small, bert_state_dict=bert)
    extra = {
        "text_encoder.embeddings.position_ids": torch.arange(12)[None],
        "text_encoder.pooler.dense.weight": torch.zeros(64, 64),
        "text_encoder.pooler.dense.bias": torch.zeros(64),
    }
    whole = small | {f"text_encoder.{name}": tensor for name, tensor in bert.items()} | extra
    wrapped = LAVT.from_state_dict({f"module.{name}": tensor for name, tensor in whole.items()})
    bare = {name: t for name, t in whole.items() if not name.endswith(("_index", "num_batches_tracked", "_ids"))}
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in bare.items()}
    image, words, mask = inputs()
    with torch.no_grad():
        expected = plain(image, words=words, word_mask=mask).logits
        for state in (bare, {f"module.module.{name}": tensor for name, tensor in bare.items()}):
            assert torch.equal(LAVT.from_state_dict(state)(image, words=words, word_mask=mask).logits, expected)
        assert torch.equal(wrapped(image, words=words, word_mask=mask).logits, expected)
        low = LAVT.from_state_dict(halves)(image, words=words, word_mask=mask).logits
    assert low.dtype == torch.float32
    assert relative(low, expected) < 0.02


def test_state_dict_is_not_changed_and_not_shared(small):
    before = {name: tensor.clone() for name, tensor in small.items()}
    state = dict(small)
    model = LAVT.from_state_dict(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_missing_unexpected_and_misshapen_names_are_told(small, bert):
    gone = "backbone.layers.3.res_gate.2.weight"
    foreign = {"backbone.layers.0.downsample.bias": torch.zeros(3), "classifier.bn3_1.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"1 missing \(backbone.layers.3.res_gate.2.weight\); 2 unexpected") as error:
        LAVT.from_state_dict({name: t for name, t in (small | foreign).items() if name != gone})
    assert all(name in str(error.value) for name in foreign)
    with pytest.raises(ValueError, match=r"norm2.bias is \(9,\), not \(32,\)"):
        LAVT.from_state_dict(small | {"backbone.norm2.bias": torch.zeros(9)})
    for name in ("backbone.patch_embed.proj.weight", "classifier.conv1_1.weight"):
        with pytest.raises(ValueError, match=f"no state dict of a LAVT: it has no {name}"):
            LAVT.from_state_dict({key: t for key, t in small.items() if key != name})
    with pytest.raises(ValueError, match="it holds nothing"):
        LAVT.from_state_dict({})
    last = "encoder.layer.1.output.dense.bias"
    with pytest.raises(ValueError, match=f"1 missing .text_encoder.{last}"):
        LAVT.from_state_dict(small, bert_state_dict={name: t for name, t in bert.items() if name != last})


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.0.blocks.9.attn.relative_position_index",
        "head.attn.relative_position_index",
        "image_encoder.embeddings.position_ids",
        "text_encoder.pooler.extra.weight",
    ],
)
def test_what_is_computed_or_unused_counts_only_in_its_place(small, bert, name):
    whole = small | {f"text_encoder.{key}": tensor for key, tensor in bert.items()}
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        LAVT.from_state_dict(whole | {name: torch.zeros(16, 16, dtype=torch.int64)})


def test_an_index_of_another_window_is_told(small):
    name = "backbone.layers.1.blocks.0.attn.relative_position_index"
    with pytest.raises(ValueError, match=rf"{name} is \(144, 144\), not \(16, 16\) as the 49 rows"):
        LAVT.from_state_dict(small | {name: torch.zeros(144, 144, dtype=torch.int64)})


def test_foreign_text_names_are_shown(small, bert):
    with pytest.raises(ValueError, match=r"it holds text_encoder\.bert\.embeddings"):
        LAVT.from_state_dict(small, bert_state_dict={f"bert.{key}": tensor for key, tensor in bert.items()})


def test_a_missing_block_is_told_by_name(small):
    with pytest.raises(ValueError, match=r"missing .*layers\.2\.blocks\.0|no backbone\.layers\.2\.blocks\.0"):
        LAVT.from_state_dict({name: t for name, t in small.items() if "layers.2.blocks.0." not in name})
    one = {name.replace("layers.2.blocks.1.", "layers.2.blocks.7."): t for name, t in small.items()}
    with pytest.raises(ValueError, match=r"missing \(backbone\.layers\.2\.blocks\.1\..*unexpected \(.*blocks\.7"):
        LAVT.from_state_dict(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion_heads": (1, 1, 1)}, "fusion_heads must be four"),
        ({"fusion_heads": 2}, "fusion_heads must be four"),
        ({"fusion_heads": "1-1-1-1"}, "fusion_heads must be whole numbers"),
        ({"fusion_heads": (1, 1, 1.0, 1)}, "fusion_heads must be whole numbers"),
        ({"fusion_heads": (1, 0, 1, 1)}, "fusion_heads must be at least 1"),
        ({"fusion_heads": (1, 1, 5, 1)}, "5 does not divide the 32 channels of stage 2"),
        ({"text_heads": 3}, "3 heads do not divide 64"),
        ({"image_size": 0}, "image_size must be at least 1"),
    ],
)
def test_wrong_settings(small, bert, change, message):
    with pytest.raises(ValueError, match=message):
        LAVT.from_state_dict(small, bert_state_dict=bert, **change)


def test_numpy_heads_are_whole_numbers(small):
    assert LAVT.from_state_dict(small, tuple(np.array([1, 2, 4, 8]))).config.fusion_heads == (1, 2, 4, 8)


def test_wrong_dicts(small, bert):
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        LAVT.from_state_dict([1, 2])
    with pytest.raises(TypeError, match=r"is it a whole checkpoint\? Then give its \[\"model\"\]"):
        LAVT.from_state_dict({"model": small})
    with pytest.raises(TypeError, match="must hold tensors by name, got int for 'epoch'"):
        LAVT.from_state_dict(small | {"epoch": 3})
    with pytest.raises(ValueError, match=r"two tensors for classifier\.conv1_1\.bias"):
        LAVT.from_state_dict(small | {"module.classifier.conv1_1.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match="has text weights of its own, such as text_encoder"):
        LAVT.from_state_dict(small | {f"text_encoder.{k}": t for k, t in bert.items()}, bert_state_dict=bert)
    with pytest.raises(ValueError, match="bert_state_dict is empty"):
        LAVT.from_state_dict(small, bert_state_dict={})
    with pytest.raises(ValueError, match=r"classifier.conv1_1.bias is torch.int64, weights must be floating"):
        LAVT.from_state_dict(small | {"classifier.conv1_1.bias": torch.zeros(2, dtype=torch.int64)})
    name = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match=r"48 rows, which is .* for no window"):
        LAVT.from_state_dict(small | {name: torch.zeros(48, 1)})
    wide = {name: t.repeat(1, 2, 1) if "f_key" in name and t.dim() == 3 else t for name, t in small.items()}
    with pytest.raises(ValueError, match="words are 64 wide, the fusion takes 128"):
        LAVT.from_state_dict(wide, bert_state_dict=bert)
    narrow = {name: t[..., :32] if name.endswith("word_embeddings.weight") else t for name, t in bert.items()}
    with pytest.raises(ValueError, match="give text_heads="):
        LAVT.from_state_dict(small, bert_state_dict=narrow)
    with pytest.raises(TypeError, match="config must be a LAVTConfig, got dict"):
        LAVT({"embed": 8})


# Calling


def test_bad_inputs(small, bert):
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
        (model, ValueError, "the text encoder takes 12", {"words": None, "input_ids": ids.repeat(1, 3)}),
        (plain, ValueError, "no text encoder", {"words": None, "input_ids": ids}),
        (model, ValueError, "image must be", {"image": image[:, :1]}),
        (model, ValueError, "one pixel in the last stage", {"image": image[..., :32, :32]}),
        (model, TypeError, "image must be floating", {"image": image.byte()}),
        (model, ValueError, "image is on meta, the model on cpu", {"image": image.to("meta")}),
    ]
    for asked, kind, message, change in cases:
        with pytest.raises(kind, match=message):
            asked(**({"image": image, "words": words, "word_mask": mask} | change))


def test_gradients_bf16_and_deepcopy(small, bert):
    import copy

    model = LAVT.from_state_dict(small, (1, 2, 2, 4), bert_state_dict=bert)
    image, _, mask = inputs()
    ids = torch.full((2, 5), 7) * mask
    out = model(image, ids)
    out.logits.square().mean().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    assert silent == {"backbone.layers.3.res_gate.0.weight", "backbone.layers.3.res_gate.2.weight"}  # read by nothing
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        low = copy.deepcopy(model)(image, ids)
    assert relative(low.logits.float(), out.logits.detach()) < 0.1


# As a teacher


def test_taps_and_terms(small, bert):
    teacher = LAVT.from_state_dict(small, bert_state_dict=bert).requires_grad_(False)
    student = LAVT.from_state_dict(weights(8, (1, 1, 1, 1)), bert_state_dict=bert)
    image, _, mask = inputs()
    batch = {"image": image, "input_ids": torch.full((2, 5), 7) * mask, "word_mask": mask, "mask": image[:, 0] > 0}
    with Taps(teacher, {"fused": ("backbone.layers.3.fusion", 0)}) as taps:
        out = teacher(image, batch["input_ids"])
        again = teacher.backbone.norm3(taps["fused"])
    torch.testing.assert_close(again, out.stages[3].flatten(2).transpose(1, 2))
    terms = [
        Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", kwargs={"word_mask": "batch.word_mask"}),
        Term(losses.channel_distribution_kd, "decoder_features"),
        Term(losses.channel_kd, "stages.3"),
        Term(losses.logit_kd, "decoder"),
    ]
    distiller = Distiller(student, teacher, segmentation_loss, terms)
    report = distiller.check(batch)
    assert all(norm > 0 for norm in report.norms.values())
