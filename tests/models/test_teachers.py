"""Teachers from transformers: their outputs match those of the wrapped networks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

import tiny_teachers as tiny
from tiny_teachers import imagenet, picture, tokens

from fastkd import Taps
from fastkd.models import SAM3Teacher, TextPromptedTeacher


class TestOutputs:
    """Compare the adapter on a student's image with the network on an image preprocessed by its files."""

    def test_mask(self, teacher) -> None:
        kind = teacher.config.model_type
        ids, mask = tokens(teacher)
        size = (tiny.SIZES[kind],) * 2
        small = F.interpolate(picture(), size=size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.MEAN[kind], tiny.STD[kind]))
        out = teacher(imagenet(picture()), ids, mask)
        with torch.no_grad():
            own = teacher.network(input_ids=ids, pixel_values=(small - mean) / std, attention_mask=mask.long())
        if kind == "clipseg":
            expected = own.logits[:, None]
        else:
            best = own.pred_logits.argmax(1)
            expected = torch.stack([own.pred_masks[i, q] for i, q in enumerate(best)])[:, None]
        assert expected.std() > 1e-3
        torch.testing.assert_close(out.decoder[:, 1:], expected, rtol=1e-4, atol=1e-4)
        assert not out.decoder[:, 0].any()
        full = F.interpolate(expected, size=(96, 80), mode="bilinear", align_corners=False)
        torch.testing.assert_close(out.logits.softmax(1)[:, 1:], full.sigmoid(), rtol=1e-4, atol=1e-4)
        assert out.logits.shape == (2, 2, 96, 80)
        assert torch.equal(out.word_mask, mask)

    def test_does_not_resize_an_image_of_the_right_size(self, teacher) -> None:
        kind = teacher.config.model_type
        pixels = picture((tiny.SIZES[kind],) * 2)
        mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.MEAN[kind], tiny.STD[kind]))
        torch.testing.assert_close(teacher.pixels(imagenet(pixels)), (pixels - mean) / std)

    def test_clipseg_maps_and_words(self, teachers) -> None:
        teacher = teachers["clipseg"]
        ids, mask = tokens(teacher)
        out = teacher(imagenet(picture()), ids, mask)
        head = teacher.network.decoder.transposed_convolution
        torch.testing.assert_close(head(out.decoder_features), out.decoder[:, 1:])
        assert [tuple(s.shape) for s in out.stages] == [(2, 8, 6, 6)] * 3
        assert torch.equal(out.stages[-1], out.decoder_features)
        assert not torch.equal(out.stages[0], out.stages[1])
        text = teacher.network.clip.text_model(input_ids=ids, attention_mask=mask.long())
        torch.testing.assert_close(out.words, text.last_hidden_state)
        assert out.pixel_word_logits == []

    def test_sam3_maps_and_words(self, teachers) -> None:
        teacher = teachers["sam3"]
        ids, mask = tokens(teacher)
        out = teacher(imagenet(picture()), ids, mask)
        assert [tuple(s.shape) for s in out.stages] == [(2, 16, 16, 16), (2, 16, 8, 8), (2, 16, 4, 4)]
        own = teacher.network.vision_encoder(teacher.pixels(imagenet(picture()))).fpn_hidden_states
        torch.testing.assert_close(out.stages[:2], list(own[:2]))
        assert not torch.allclose(out.stages[2], own[2], atol=1e-2)  # fused with the words
        text = teacher.network.get_text_features(input_ids=ids, attention_mask=mask.long())
        torch.testing.assert_close(out.words, text.pooler_output)

    def test_sam3_pixel_word_logits_match_its_attention(self, tiny_folders) -> None:
        teacher = SAM3Teacher.from_pretrained(tiny_folders["sam3"])
        teacher.network.set_attn_implementation("eager")  # returns the attention
        ids, mask = tokens(teacher)
        layers = teacher.network.detr_encoder.layers
        paths = {f"a{i}": (f"network.detr_encoder.layers.{i}.cross_attn", 1) for i in range(len(layers))}
        with torch.no_grad(), Taps(teacher, paths) as taps:
            out = teacher(imagenet(picture()), ids, mask)
            assert len(out.pixel_word_logits) == len(layers) == 2
            for i, logits in enumerate(out.pixel_word_logits):
                assert logits.shape == (2, 2, 16, ids.shape[1])
                attention = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
                torch.testing.assert_close(attention, taps[f"a{i}"], rtol=1e-4, atol=1e-5)

    def test_sam3_mask_selection(self, tiny_folders, teachers) -> None:
        semantic = TextPromptedTeacher.from_pretrained(tiny_folders["sam3"], masks="semantic")
        ids, mask = tokens(semantic)
        out = semantic(imagenet(picture()), ids, mask)
        head = semantic.network.mask_decoder.semantic_projection
        torch.testing.assert_close(out.decoder[:, 1:], head(out.decoder_features))
        best = teachers["sam3"](imagenet(picture()), ids, mask)
        torch.testing.assert_close(best.decoder_features, out.decoder_features)
        assert not torch.allclose(best.decoder, out.decoder, atol=1e-2)


class TestCall:
    def test_ignores_padding_and_uses_words(self, teacher) -> None:
        image = imagenet(picture())
        short, long = (teacher(image, *tokens(teacher, words)) for words in (20, 30))
        torch.testing.assert_close(short.logits, long.logits, rtol=1e-4, atol=1e-4)
        ids, mask = tokens(teacher)
        other = teacher(image, ids.flip(0), mask.flip(0))
        assert not torch.allclose(other.logits, long.logits, atol=1e-3)

    def test_mask_defaults_to_the_end_token(self, teacher) -> None:
        ids, mask = tokens(teacher)
        assert torch.equal(teacher(imagenet(picture()), ids).word_mask, mask)
        teacher = copy.deepcopy(teacher)
        teacher.text_config.eos_token_id = 2  # as in CLIP's first configurations
        assert torch.equal(teacher(imagenet(picture()), ids).word_mask, mask)
        teacher.text_config.eos_token_id = 10**6
        with torch.no_grad():
            assert teacher(imagenet(picture()), ids).word_mask.all()

    def test_batch_of_one(self, teacher) -> None:
        ids, mask = tokens(teacher)
        both = teacher(imagenet(picture()), ids, mask)
        one = teacher(imagenet(picture())[:1], ids[:1], mask[:1])
        torch.testing.assert_close(one.logits, both.logits[:1], rtol=1e-4, atol=1e-4)

    def test_autocast_and_small_images(self, teacher) -> None:
        ids, mask = tokens(teacher)
        for size in ((96, 80), (20, 24)):
            expected = teacher(imagenet(picture(size)), ids, mask).logits
            with torch.autocast("cpu", torch.bfloat16):
                out = teacher(imagenet(picture(size)), ids, mask).logits
            assert out.shape == (2, 2, *size)
            assert out.dtype == torch.float32
            assert (out - expected).norm() < 0.05 * expected.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, teacher, dtype) -> None:
        ids, mask = tokens(teacher)
        expected = teacher(imagenet(picture()), ids, mask).logits
        half = copy.deepcopy(teacher).to(dtype)
        out = half(imagenet(picture()), ids, mask)
        assert out.words.dtype == dtype
        assert out.logits.dtype == torch.float32
        assert (out.logits - expected).norm() < 0.05 * expected.norm()

    def test_copies_are_independent_and_release_activations(self, teacher, tiny_folders) -> None:
        ids, mask = tokens(teacher)
        image = imagenet(picture())
        expected = teacher(image, ids, mask)
        fresh = TextPromptedTeacher.from_pretrained(tiny_folders[teacher.config.model_type])
        for again in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(fresh))):
            out = again(image, ids, mask)
            torch.testing.assert_close(out.stages, expected.stages)
            assert again._recorded is not teacher._recorded
        assert teacher._recorded == {}
        with pytest.raises(ValueError):
            teacher(image[:1], ids, mask)
        assert teacher._recorded == {}
        teacher.network(input_ids=ids, pixel_values=teacher.pixels(image), attention_mask=mask.long())
        assert teacher._recorded == {}

    def test_taps_reach_the_network(self, teachers) -> None:
        ids, mask = tokens(teachers["clipseg"])
        with Taps(teachers["clipseg"], {"clip": "network.clip.vision_model.encoder.layers.1"}) as taps:
            teachers["clipseg"](imagenet(picture()), ids, mask)
            assert taps["clip"].shape == (2, 1 + 36, 24)
        with pytest.raises(ValueError, match=r"Did you mean 'network\.detr_encoder\.layers\.0\.cross_attn"):
            Taps(teachers["sam3"], {"x": "network.detr_encoder.layers.0.crossattn"})

    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            ({"input_ids": torch.full((2, 41), 3)}, ValueError, "has 41 words, the text encoder takes at most 40"),
            ({"input_ids": torch.full((2, 5), 10**4)}, ValueError, "check that the tokenizer is this model's own"),
            ({"input_ids": torch.ones(2, 5)}, TypeError, "input_ids must be int64"),
            ({"word_mask": torch.zeros(2, 32, dtype=torch.bool)}, ValueError, "no valid word in sample 0"),
            ({"image": torch.rand(2, 1, 8, 8)}, ValueError, r"image must be \(B, 3, H, W\)"),
        ],
    )
    def test_rejects_bad_inputs(self, teacher, change, kind, message) -> None:
        ids, mask = tokens(teacher)
        arguments = {"image": imagenet(picture()), "input_ids": ids, "word_mask": mask} | change
        if "input_ids" in change:
            arguments["word_mask"] = None
        with pytest.raises(kind, match=message):
            teacher(**arguments)

    def test_rejects_ids_without_an_end_token(self, teacher) -> None:
        end = teacher.vocab_size - 1
        with pytest.raises(ValueError, match=r"sentence 1 has no end token .* keep_end=True"):
            teacher(imagenet(picture()), torch.tensor([[1, 2, end], [1, 2, 3]]))
