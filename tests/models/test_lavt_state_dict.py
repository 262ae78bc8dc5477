"""LAVT from state dicts: names, shapes, separate text weights, rejected dicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

from tiny_lavt import BERT, bert_weights, inputs, relative_error, weights

from fastkd.models import LAVT


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    return weights()


@pytest.fixture(scope="module")
def bert() -> dict[str, torch.Tensor]:
    return bert_weights(**BERT)


def test_parameter_names_match_the_published_ones(small):
    own = LAVT.from_state_dict(small).state_dict()
    assert set(own) == {name for name in small if not name.endswith("relative_position_index")}


def test_text_weights_may_be_inside_or_separate(small, bert):
    separate = LAVT.from_state_dict(small, bert_state_dict=bert)
    inside = LAVT.from_state_dict(small | {f"text_encoder.{name}": tensor for name, tensor in bert.items()})
    assert separate.config == inside.config
    assert separate.config.text == BERT
    assert not separate.training
    image, _, mask = inputs()
    ids = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(2)) * mask
    with torch.no_grad():
        a, b = separate(image, ids, mask), inside(image, input_ids=ids)  # without a mask: ids other than 0
        words = separate.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        c = separate(image, words=words, word_mask=mask)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.word_mask, b.word_mask)
    assert torch.equal(a.logits, c.logits)
    assert a.words.shape == (2, 5, 64)


def test_accepts_wrapper_prefixes_and_computed_buffers(small, bert):
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
    assert relative_error(low, expected) < 0.02


def test_state_dict_is_neither_modified_nor_shared(small):
    before = {name: tensor.clone() for name, tensor in small.items()}
    state = dict(small)
    model = LAVT.from_state_dict(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_lists_missing_unexpected_and_misshapen_names(small, bert):
    missing = "backbone.layers.3.res_gate.2.weight"
    unexpected = {"backbone.layers.0.downsample.bias": torch.zeros(3), "classifier.bn3_1.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"1 missing \(backbone.layers.3.res_gate.2.weight\); 2 unexpected") as error:
        LAVT.from_state_dict({name: t for name, t in (small | unexpected).items() if name != missing})
    assert all(name in str(error.value) for name in unexpected)
    with pytest.raises(ValueError, match=r"norm2.bias is \(9,\), not \(32,\)"):
        LAVT.from_state_dict(small | {"backbone.norm2.bias": torch.zeros(9)})
    for name in ("backbone.patch_embed.proj.weight", "classifier.conv1_1.weight"):
        with pytest.raises(ValueError, match=f"not the state dict of a LAVT: it has no {name}"):
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
def test_rejects_buffers_under_unexpected_names(small, bert, name):
    whole = small | {f"text_encoder.{key}": tensor for key, tensor in bert.items()}
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        LAVT.from_state_dict(whole | {name: torch.zeros(16, 16, dtype=torch.int64)})


def test_rejects_a_position_index_of_another_window(small):
    name = "backbone.layers.1.blocks.0.attn.relative_position_index"
    with pytest.raises(ValueError, match=rf"{name} is \(144, 144\), expected \(16, 16\) for the 49 rows"):
        LAVT.from_state_dict(small | {name: torch.zeros(144, 144, dtype=torch.int64)})


def test_lists_unknown_text_names(small, bert):
    with pytest.raises(ValueError, match=r"it holds text_encoder\.bert\.embeddings"):
        LAVT.from_state_dict(small, bert_state_dict={f"bert.{key}": tensor for key, tensor in bert.items()})


def test_names_a_missing_block(small):
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
        ({"fusion_heads": "1-1-1-1"}, "fusion_heads must be integers"),
        ({"fusion_heads": (1, 1, 1.0, 1)}, "fusion_heads must be integers"),
        ({"fusion_heads": (1, 0, 1, 1)}, "fusion_heads must be at least 1"),
        ({"fusion_heads": (1, 1, 5, 1)}, "5 does not divide the 32 channels of stage 2"),
        ({"text_heads": 3}, "3 heads do not divide 64"),
        ({"image_size": 0}, "image_size must be at least 1"),
    ],
)
def test_rejects_bad_settings(small, bert, change, message):
    with pytest.raises(ValueError, match=message):
        LAVT.from_state_dict(small, bert_state_dict=bert, **change)


def test_accepts_numpy_heads(small):
    assert LAVT.from_state_dict(small, tuple(np.array([1, 2, 4, 8]))).config.fusion_heads == (1, 2, 4, 8)


def test_rejects_bad_state_dicts(small, bert):
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        LAVT.from_state_dict([1, 2])
    with pytest.raises(TypeError, match=r"for a whole checkpoint, pass its \[\"model\"\]"):
        LAVT.from_state_dict({"model": small})
    with pytest.raises(TypeError, match="must hold tensors by name, got int for 'epoch'"):
        LAVT.from_state_dict(small | {"epoch": 3})
    with pytest.raises(ValueError, match=r"two tensors for classifier\.conv1_1\.bias"):
        LAVT.from_state_dict(small | {"module.classifier.conv1_1.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match="already has text weights, such as text_encoder"):
        LAVT.from_state_dict(small | {f"text_encoder.{k}": t for k, t in bert.items()}, bert_state_dict=bert)
    with pytest.raises(ValueError, match="bert_state_dict is empty"):
        LAVT.from_state_dict(small, bert_state_dict={})
    with pytest.raises(ValueError, match=r"classifier.conv1_1.bias is torch.int64, weights must be floating"):
        LAVT.from_state_dict(small | {"classifier.conv1_1.bias": torch.zeros(2, dtype=torch.int64)})
    name = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match=r"48 rows, which is .* for no window"):
        LAVT.from_state_dict(small | {name: torch.zeros(48, 1)})
    wide = {name: t.repeat(1, 2, 1) if "f_key" in name and t.dim() == 3 else t for name, t in small.items()}
    with pytest.raises(ValueError, match="word vectors are 64 wide, the fusion takes 128"):
        LAVT.from_state_dict(wide, bert_state_dict=bert)
    narrow = {name: t[..., :32] if name.endswith("word_embeddings.weight") else t for name, t in bert.items()}
    with pytest.raises(ValueError, match="pass text_heads="):
        LAVT.from_state_dict(small, bert_state_dict=narrow)
    with pytest.raises(TypeError, match="config must be a LAVTConfig, got dict"):
        LAVT({"embed": 8})
