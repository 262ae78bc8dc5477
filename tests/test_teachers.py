"""Teachers from transformers: the network's own numbers, the student's call, and sentences in words of their own."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

import tiny_teachers as tiny

import fastkd
from fastkd import Distiller, Taps, Term, losses
from fastkd.data import RefCOCO, ReferDataset, collate, load_tokenizer, make_shapes
from fastkd.data.dataset import IMAGENET_MEAN, IMAGENET_STD
from fastkd.models import CLIPSegTeacher, RISConfig, RISModel, SAM3Teacher, TextPromptedTeacher
from fastkd.train import segmentation_loss
from fastkd.train.recipes import recipe

KINDS = ("clipseg", "sam3")
STUDENT = {
    "backbone": "resnet10t",
    "out_indices": [3, 4],
    "text": {
        "vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 20,
    },
    "fusion_heads": [1, 2],
    "decoder_width": 16,
    "image_size": 64,
    "tokenizer": "shapes",
}  # fmt: skip
SENTENCES = ["the red square", "the plain thing behind the striped cyan circle"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {kind: tiny.write(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def teachers(folders) -> dict[str, Any]:
    loaded = {kind: TextPromptedTeacher.from_pretrained(folder) for kind, folder in folders.items()}
    return {kind: teacher.requires_grad_(False) for kind, teacher in loaded.items()}


@pytest.fixture(params=KINDS)
def teacher(request, teachers) -> Any:
    return teachers[request.param]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    make_shapes(root, images=40, image_size=64)
    return root


def tokens(teacher: Any, max_words: int | None = None) -> tuple[Tensor, Tensor]:
    tokenizer = load_tokenizer(teacher.config.tokenizer, keep_end=True)
    return tokenizer(SENTENCES, max_words or teacher.config.max_words)


def picture(size: tuple[int, int] = (96, 80), seed: int = 0) -> Tensor:
    """Images in [0, 1]."""
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def imagenet(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


class TestNetworksOwnNumbers:
    """The adapter on a student's image against transformers' network on the image prepared as its files say."""

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

    def test_an_image_of_its_own_size_is_only_renormalised(self, teacher) -> None:
        kind = teacher.config.model_type
        pixels = picture((tiny.SIZES[kind],) * 2)
        mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.MEAN[kind], tiny.STD[kind]))
        torch.testing.assert_close(teacher.pixels(imagenet(pixels)), (pixels - mean) / std)

    def test_clipsegs_maps_and_words(self, teachers) -> None:
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

    def test_sam3s_maps_and_words(self, teachers) -> None:
        teacher = teachers["sam3"]
        ids, mask = tokens(teacher)
        out = teacher(imagenet(picture()), ids, mask)
        assert [tuple(s.shape) for s in out.stages] == [(2, 16, 16, 16), (2, 16, 8, 8), (2, 16, 4, 4)]
        own = teacher.network.vision_encoder(teacher.pixels(imagenet(picture()))).fpn_hidden_states
        torch.testing.assert_close(out.stages[:2], list(own[:2]))
        assert not torch.allclose(out.stages[2], own[2], atol=1e-2)  # the words went in
        text = teacher.network.get_text_features(input_ids=ids, attention_mask=mask.long())
        torch.testing.assert_close(out.words, text.pooler_output)

    def test_sam3s_pixel_word_logits_are_its_attention(self, folders) -> None:
        teacher = SAM3Teacher.from_pretrained(folders["sam3"])
        teacher.network.set_attn_implementation("eager")  # which returns its attention
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

    def test_sam3s_masks(self, folders, teachers) -> None:
        semantic = TextPromptedTeacher.from_pretrained(folders["sam3"], masks="semantic")
        ids, mask = tokens(semantic)
        out = semantic(imagenet(picture()), ids, mask)
        head = semantic.network.mask_decoder.semantic_projection
        torch.testing.assert_close(out.decoder[:, 1:], head(out.decoder_features))
        best = teachers["sam3"](imagenet(picture()), ids, mask)
        torch.testing.assert_close(best.decoder_features, out.decoder_features)
        assert not torch.allclose(best.decoder, out.decoder, atol=1e-2)


class TestCall:
    def test_padding_changes_nothing_and_words_count(self, teacher) -> None:
        image = imagenet(picture())
        short, long = (teacher(image, *tokens(teacher, words)) for words in (20, 30))
        torch.testing.assert_close(short.logits, long.logits, rtol=1e-4, atol=1e-4)
        ids, mask = tokens(teacher)
        other = teacher(image, ids.flip(0), mask.flip(0))
        assert not torch.allclose(other.logits, long.logits, atol=1e-3)

    def test_without_a_mask_the_sentence_goes_up_to_its_end_mark(self, teacher) -> None:
        ids, mask = tokens(teacher)
        assert torch.equal(teacher(imagenet(picture()), ids).word_mask, mask)
        teacher = copy.deepcopy(teacher)
        teacher.text_config.eos_token_id = 2  # as in CLIP's first configurations
        assert torch.equal(teacher(imagenet(picture()), ids).word_mask, mask)
        teacher.text_config.eos_token_id = 10**6
        with torch.no_grad():
            assert teacher(imagenet(picture()), ids).word_mask.all()

    def test_one_image(self, teacher) -> None:
        ids, mask = tokens(teacher)
        both = teacher(imagenet(picture()), ids, mask)
        one = teacher(imagenet(picture())[:1], ids[:1], mask[:1])
        torch.testing.assert_close(one.logits, both.logits[:1], rtol=1e-4, atol=1e-4)

    def test_under_autocast_and_for_smaller_images(self, teacher) -> None:
        ids, mask = tokens(teacher)
        for size in ((96, 80), (20, 24)):
            expected = teacher(imagenet(picture(size)), ids, mask).logits
            with torch.autocast("cpu", torch.bfloat16):
                out = teacher(imagenet(picture(size)), ids, mask).logits
            assert out.shape == (2, 2, *size)
            assert out.dtype == torch.float32
            assert (out - expected).norm() < 0.05 * expected.norm()

    def test_copies_are_independent_and_nothing_is_kept(self, teacher, folders) -> None:
        ids, mask = tokens(teacher)
        image = imagenet(picture())
        expected = teacher(image, ids, mask)
        fresh = TextPromptedTeacher.from_pretrained(folders[teacher.config.model_type])
        for again in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(fresh))):
            out = again(image, ids, mask)
            torch.testing.assert_close(out.stages, expected.stages)
            assert again._seen is not teacher._seen
        assert teacher._seen == {}
        with pytest.raises(ValueError):
            teacher(image[:1], ids, mask)
        assert teacher._seen == {}

    def test_taps_see_the_network(self, teachers) -> None:
        ids, mask = tokens(teachers["clipseg"])
        with Taps(teachers["clipseg"], {"clip": "network.clip.vision_model.encoder.layers.1"}) as taps:
            teachers["clipseg"](imagenet(picture()), ids, mask)
            assert taps["clip"].shape == (2, 1 + 36, 24)
        with pytest.raises(ValueError, match=r"Did you mean 'network\.detr_encoder\.layers\.0\.cross_attn"):
            Taps(teachers["sam3"], {"x": "network.detr_encoder.layers.0.crossattn"})

    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            ({"input_ids": torch.full((2, 41), 3)}, ValueError, "has 41 words, the text encoder takes 40"),
            ({"input_ids": torch.full((2, 5), 10**4)}, ValueError, "is the tokenizer this model's own"),
            ({"input_ids": torch.ones(2, 5)}, TypeError, "input_ids must be int64"),
            ({"word_mask": torch.zeros(2, 32, dtype=torch.bool)}, ValueError, "no valid word in sample 0"),
            ({"image": torch.rand(2, 1, 8, 8)}, ValueError, r"image must be \(B, 3, H, W\)"),
        ],
    )
    def test_bad_input(self, teacher, change, kind, message) -> None:
        ids, mask = tokens(teacher)
        arguments = {"image": imagenet(picture()), "input_ids": ids, "word_mask": mask} | change
        if "input_ids" in change:
            arguments["word_mask"] = None
        with pytest.raises(kind, match=message):
            teacher(**arguments)

    def test_clipseg_needs_the_end_mark(self, teachers) -> None:
        end = teachers["clipseg"].vocab_size - 1
        with pytest.raises(ValueError, match=r"sentence 1 has no end mark .* keep_end=True"):
            teachers["clipseg"](imagenet(picture()), torch.tensor([[1, 2, end], [1, 2, 3]]))


class TestLoading:
    def test_the_configuration_picks_the_class(self, folders, teachers) -> None:
        assert type(teachers["clipseg"]) is CLIPSegTeacher
        assert type(teachers["sam3"]) is SAM3Teacher
        for kind, teacher in teachers.items():
            assert not any(module.training for module in teacher.modules())
            config = teacher.config
            assert (config.model_type, config.image_size, config.max_words) == (kind, tiny.SIZES[kind], 32)
            assert config.image_mean == tuple(tiny.MEAN[kind])
            assert config.tokenizer == str(folders[kind])
            assert teacher.parameter_count()["total"] == sum(p.numel() for p in teacher.network.parameters())

    def test_without_a_preprocessor_the_class_knows(self, folders, tmp_path) -> None:
        for kind, (size, mean) in {"clipseg": (32, IMAGENET_MEAN), "sam3": (56, (0.5, 0.5, 0.5))}.items():
            folder = shutil.copytree(folders[kind], tmp_path / kind)
            (folder / "preprocessor_config.json").unlink()
            (folder / "tokenizer.json").unlink()
            config = TextPromptedTeacher.from_pretrained(folder).config
            assert (config.image_size, config.image_mean, config.tokenizer) == (size, mean, None)
        values = {
            "image_processor": {"image_mean": [0.1] * 3, "image_std": [1] * 3, "size": {"height": 40, "width": 40}}
        }
        (tmp_path / "clipseg" / "processor_config.json").write_text(json.dumps(values))
        config = TextPromptedTeacher.from_pretrained(tmp_path / "clipseg").config
        assert (config.image_size, config.image_mean) == (40, (0.1, 0.1, 0.1))
        options = {"image_size": 64, "image_std": (1.0, 1.0, 1.0), "max_words": 20, "tokenizer": "elsewhere"}
        config = TextPromptedTeacher.from_pretrained(tmp_path / "clipseg", **options).config
        assert {key: getattr(config, key) for key in options} == options

    def test_half_precision_files_load_as_float32(self, folders, teachers, tmp_path) -> None:
        copy.deepcopy(teachers["sam3"].network).half().save_pretrained(tmp_path)
        teacher = TextPromptedTeacher.from_pretrained(tmp_path)
        assert {p.dtype for p in teacher.parameters()} == {torch.float32}

    def test_sam3_video_gives_its_detector(self, folders, teachers, tmp_path) -> None:
        from safetensors.torch import load_file, save_file

        state = {f"detector_model.{k}": v for k, v in load_file(folders["sam3"] / "model.safetensors").items()}
        state["tracker_model.something"] = torch.zeros(3)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        detector = json.loads((folders["sam3"] / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam3_video", "detector_config": detector}))
        teacher = TextPromptedTeacher.from_pretrained(tmp_path)
        ids, mask = tokens(teachers["sam3"])
        out, expected = (t(imagenet(picture()), ids, mask) for t in (teacher, teachers["sam3"]))
        torch.testing.assert_close(out.logits, expected.logits)

    def test_by_name(self, folders, monkeypatch) -> None:
        import huggingface_hub

        asked = {}

        def fetch(name: str, **options: Any) -> str:
            asked.update(options, name=name)
            return str(folders["clipseg"])

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        assert type(TextPromptedTeacher.from_pretrained("owner/clipseg")) is CLIPSegTeacher
        assert asked["name"] == "owner/clipseg"
        assert not any("bin" in pattern or "*.p" in pattern for pattern in asked["allow_patterns"])

        def refuse(name: str, **options: Any) -> str:
            raise OSError("401: gated\nlong story")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(
            ValueError, match=r"'owner/sam' is no folder here, and could not be .*OSError: 401: gated\)"
        ):
            TextPromptedTeacher.from_pretrained("owner/sam")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "clipsegg"}, r"'clipsegg', for which there is no adapter; .* Did you mean a 'clipseg'"),
            ({"model_type": "sam3_tracker"}, "there are 'clipseg', 'sam3', 'sam3_video'"),
            ({"model_type": "mask2former"}, r"no adapter.*Any other nn\.Module can teach through fastkd\.Taps"),
            ({"backbone": "resnet10t"}, r"names no model_type.*RISModel\.from_pretrained"),
            ([1], "must hold a JSON object"),
        ],
    )
    def test_another_architecture(self, tmp_path, config, message) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            TextPromptedTeacher.from_pretrained(tmp_path)

    def test_wrong_class_or_place(self, folders, tmp_path) -> None:
        with pytest.raises(ValueError, match="has model_type 'sam3', CLIPSegTeacher takes 'clipseg'"):
            CLIPSegTeacher.from_pretrained(folders["sam3"])
        with pytest.raises(FileNotFoundError, match="no folder"):
            TextPromptedTeacher.from_pretrained(tmp_path / "none")
        shutil.copy(folders["sam3"] / "config.json", tmp_path)
        with pytest.raises(FileNotFoundError, match=r"no weights in .*: expected safetensors"):
            TextPromptedTeacher.from_pretrained(tmp_path)

    def test_weights_that_do_not_fill_it(self, folders, tmp_path) -> None:
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(folders["clipseg"], tmp_path / "c")
        file = folder / "model.safetensors"
        state = load_file(file)
        save_file({k: v for k, v in state.items() if k != "decoder.film_mul.bias"}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 missing or misshapen \(decoder\.film_mul\.bias\)"):
            TextPromptedTeacher.from_pretrained(folder)
        save_file(state | {"decoder.film_mul.bias": torch.zeros(9)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"film_mul|can't be loaded"):
            TextPromptedTeacher.from_pretrained(folder)
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"can't be loaded by transformers"):
            TextPromptedTeacher.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("sam3", {"image_size": 70}, r"image_size must be 56, got 70: SAM 3's rotary"),
            ("sam3", {"masks": "all"}, "masks must be one of 'best', 'semantic', got 'all'"),
            ("clipseg", {"image_size": 4}, "at least one patch of 8 pixels"),
            ("clipseg", {"image_size": 0}, "image_size must be a whole number"),
            ("clipseg", {"image_std": (1, 0, 1)}, "image_std must be three numbers above 0"),
            ("clipseg", {"image_mean": (1, 0)}, "image_mean must be three numbers"),
            ("clipseg", {"max_words": 77}, "max_words must be from 3 to 40"),
        ],
    )
    def test_bad_options(self, folders, kind, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            TextPromptedTeacher.from_pretrained(folders[kind], **options)

    def test_a_transformers_without_it(self, folders, monkeypatch) -> None:
        import transformers

        monkeypatch.setattr("fastkd.models.teachers.files._NETWORKS", {SAM3Teacher: "Sam4Model"})
        with pytest.raises(ImportError, match=rf"Sam4Model, which transformers {transformers.__version__} does not"):
            TextPromptedTeacher.from_pretrained(folders["sam3"])


def test_clips_tokenizer_keeps_the_end_mark(folders, tmp_path) -> None:
    end = len(tiny.tokenizer()) - 1
    with pytest.raises(ValueError, match=f"has pad id {end}"):
        load_tokenizer(folders["clipseg"])
    tokenizer = load_tokenizer(folders["clipseg"], keep_end=True)
    with pytest.warns(fastkd.FastKDWarning, match="was cut to max_words=6"):
        ids, mask = tokenizer(SENTENCES, 6)
    assert ids[0].tolist()[0] == end - 1
    assert ids[0].tolist()[4:] == [end, end]  # the end, and padding by the same id
    assert mask[0].tolist() == [True] * 5 + [False]
    assert ids[1, 5] == end
    assert mask[1].all()


# Different tokenizers


@pytest.fixture(scope="module")
def student() -> RISModel:
    torch.manual_seed(0)
    return RISModel(RISConfig.from_dict(STUDENT))


@pytest.fixture(scope="module")
def batches(scenes, folders) -> dict[str, Any]:
    """A batch with the student's words alone, and one with the teacher's too."""

    def batch(**teacher: Any) -> dict[str, Any]:
        refs = RefCOCO(scenes, split="train", name="refcoco", split_by="unc")
        data = ReferDataset(refs, load_tokenizer("shapes"), image_size=64, max_words=20, **teacher)
        return collate([data[i] for i in range(4)])

    theirs = load_tokenizer(folders["sam3"], keep_end=True)
    return {
        "alone": batch(),
        "both": batch(teacher_tokenizer=theirs, teacher_max_words=32),
        "equal": batch(teacher_tokenizer=theirs, teacher_max_words=20),  # T_S = T_T, and still other words
    }


MASKS = {"word_mask": ("student.word_mask", "teacher.word_mask")}
ONE_HEAD = ("pixel_word_logits.0", lambda out: out.pixel_word_logits[1][:, :1])  # 16 pixels, one head on both sides


class TestDifferentTokenizers:
    def test_dataset_gives_both(self, batches, folders) -> None:
        batch, alone = batches["both"], batches["alone"]
        assert batch["teacher_input_ids"].shape == batch["teacher_word_mask"].shape == (4, 32)
        ids, mask = load_tokenizer(folders["sam3"], keep_end=True)(batch["sentence"], 32)
        assert torch.equal(batch["teacher_input_ids"], ids)
        assert torch.equal(batch["teacher_word_mask"], mask)
        for key in alone:
            same = torch.equal(batch[key], alone[key]) if isinstance(alone[key], Tensor) else batch[key] == alone[key]
            assert same, key

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"teacher_tokenizer": "shapes"}, TypeError, "teacher_tokenizer must come from load_tokenizer, got str"),
            ({"teacher_tokenizer": len, "teacher_max_words": 2}, ValueError, "teacher_max_words must be an integer"),
        ],
    )
    def test_dataset_refuses(self, scenes, arguments, kind, message) -> None:
        refs = RefCOCO(scenes, split="train", name="refcoco", split_by="unc")
        with pytest.raises(kind, match=message):
            ReferDataset(refs, load_tokenizer("shapes"), image_size=64, max_words=20, **arguments)

    def test_each_gets_its_own_words(self, student, teachers, batches) -> None:
        batch = batches["both"]
        distiller = Distiller(student, teachers["sam3"], segmentation_loss, [Term(losses.logit_kd, "logits")])
        out = distiller(batch)
        assert torch.equal(out.student.word_mask, batch["word_mask"])
        assert torch.equal(out.teacher.word_mask, batch["teacher_word_mask"])
        expected = teachers["sam3"](batch["image"], batch["teacher_input_ids"], batch["teacher_word_mask"])
        torch.testing.assert_close(out.teacher.logits, expected.logits)
        without = {key: value for key, value in batch.items() if key != "teacher_word_mask"}
        assert torch.equal(distiller.run_teacher(without).word_mask, batch["teacher_word_mask"])  # not the student's

    def test_pixel_pixel_is_defined(self, student, teachers, batches) -> None:
        batch = batches["both"]

        kwargs = {"terms": {"pixel_pixel": 1.0}, **MASKS}
        term = Term(losses.cross_modal_kd_from_logits, *ONE_HEAD, name="pixels", kwargs=kwargs)
        distiller = Distiller(student, teachers["sam3"], segmentation_loss, [term])
        assert distiller.check(batch).norms["pixels"] > 0
        out = distiller.eval()(batch)
        logits = out.student.pixel_word_logits[0], ONE_HEAD[1](out.teacher)
        a_s, a_t = (
            m[:, 0].double().masked_fill(~o.word_mask[:, None], -torch.inf).softmax(-1)
            for m, o in zip(logits, (out.student, out.teacher), strict=True)
        )
        assert a_s.shape[-1] != a_t.shape[-1]
        expected = ((a_s @ a_s.mT - a_t @ a_t.mT) ** 2).mean((1, 2)).mean()
        torch.testing.assert_close(out.terms["pixels"].double(), expected, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("batch", ["both", "equal"])
    @pytest.mark.parametrize(
        ("loss", "kwargs"),
        [
            (losses.cross_modal_kd_from_logits, {"terms": {"pixel_to_word": 1.0, "pixel_pixel": 1.0}}),
            (losses.cross_modal_kd_from_logits, {}),  # the default terms
            (functools.partial(losses.cross_modal_kd_from_logits, terms={"pixel_to_word": 1.0}), {}),
            (losses.cross_modal_kd, {"terms": {"pixel_to_word": 1.0}}),
            (losses.CrossModalKD(terms={"pixel_to_word": 1.0}), {}),
        ],
    )
    def test_word_by_word_terms_are_refused(self, student, teachers, batches, batch, loss, kwargs) -> None:
        term = Term(loss, *ONE_HEAD, name="words", kwargs=kwargs)
        distiller = Distiller(student, teachers["sam3"], segmentation_loss, [term])
        message = (
            r"term 'words': teacher and student are tokenised differently .*'pixel_to_word'.* would compare them: only "
            r"'pixel_pixel' is defined then\. Pass terms="
        )
        for run in (distiller.check, distiller):
            with pytest.raises(ValueError, match=message):
                run(batches[batch])

    def test_one_mask_for_two_sentences_is_refused(self, student, teachers, batches) -> None:
        kwargs = {"terms": {"pixel_pixel": 1.0}, "word_mask": "batch.word_mask"}
        term = Term(losses.cross_modal_kd_from_logits, *ONE_HEAD, name="words", kwargs=kwargs)
        distiller = Distiller(student, teachers["sam3"], segmentation_loss, [term])
        with pytest.raises(ValueError, match=r"one word_mask \('batch\.word_mask'\) does not fit both: pass a pair"):
            distiller.check(batches["equal"])

    def test_the_students_ids_are_not_the_teachers(self, student, teacher, batches) -> None:
        distiller = Distiller(student, teacher, segmentation_loss, recipe(["mask"]))
        message = r"reads token ids of its own tokenizer, but the batch has no 'teacher_input_ids'"
        with pytest.raises(ValueError, match=message):
            distiller.check(batches["alone"])
        report = distiller.check(batches["both"])
        assert report.norms["mask"] > 0
        shared = copy.deepcopy(teacher)
        shared.own_words = False
        ids = batches["both"]["teacher_input_ids"][:, :20]
        same = {
            **batches["alone"],
            "input_ids": ids.clamp(max=159),
            "word_mask": torch.ones_like(ids, dtype=torch.bool),
        }
        shared.text_config.eos_token_id = 10**6  # the student's ids are cut, and hold no end mark
        assert Distiller(student, shared, segmentation_loss, recipe(["mask"])).run_teacher(same).logits.shape[0] == 4

    def test_a_network_without_pixel_word_logits(self, student, teachers, batches) -> None:
        kwargs = {"terms": {"pixel_pixel": 1.0}, **MASKS}
        term = Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", name="words", kwargs=kwargs)
        distiller = Distiller(student, teachers["clipseg"], segmentation_loss, [term])
        with pytest.raises(ValueError, match=r"got \[2, 0\]; an empty list is what a network computes none of"):
            distiller.check(batches["both"])

    def test_the_recipes_fit_any_sizes(self, student, teachers, batches) -> None:
        distiller = Distiller(student, teachers["sam3"], segmentation_loss, recipe(["mask", "pixel_pixel"]))
        weights = distiller.balance(batches["both"], {"mask": 0.3, "pixel_pixel": 0.1})
        assert all(weight > 0 for weight in weights.values())
        ours = torch.randn(2, 3, 9, 5, requires_grad=True)
        masks = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
        term = recipe(["pixel_pixel"])[0]
        term.loss(ours, torch.randn(2, 2, 36, 7), word_mask=masks).backward()
        assert ours.grad is not None
        with pytest.raises(ValueError, match="pixel_pixel needs square maps to resize, got 20 pixels"):
            term.loss(ours, torch.randn(2, 2, 20, 7), word_mask=masks)


class TestCommands:
    SHORT = ("--steps", "2", "--batch-size", "4", "--threads", "1")

    def run(self, *arguments: Any) -> int:
        from fastkd.cli import main

        return main([str(one) for one in arguments])

    def test_distil_and_evaluate(self, folders, scenes, tmp_path, capsys) -> None:
        (tmp_path / "student.json").write_text(json.dumps(STUDENT))
        common = ["distill", "--data", scenes, "--student", tmp_path / "student.json", *self.SHORT]
        for kind, terms in {"clipseg": ["mask=0.3"], "sam3": ["mask=0.3", "pixel_pixel=0.1"]}.items():
            out = tmp_path / kind
            code = self.run(*common, "--teacher", folders[kind], "--out", out, "--terms", *terms)
            assert code == 0, capsys.readouterr().err
            assert json.loads((out / "best" / "config.json").read_text())["tokenizer"] == "shapes"  # the student's own
            assert self.run("evaluate", "--data", scenes, "--model", folders[kind], "--split", "val") == 0
            assert "mIoU" in capsys.readouterr().out

    def test_clear_refusals(self, folders, scenes, tmp_path, capsys) -> None:
        (tmp_path / "student.json").write_text(json.dumps(STUDENT))
        common = [
            "distill",
            "--data",
            scenes,
            "--student",
            tmp_path / "student.json",
            "--out",
            tmp_path / "o",
            *self.SHORT,
        ]
        assert self.run(*common, "--teacher", folders["sam3"]) == 2  # the default term compares words
        assert "tokenised differently" in capsys.readouterr().err
        bare = shutil.copytree(folders["clipseg"], tmp_path / "bare")
        (bare / "tokenizer.json").unlink()
        assert self.run(*common, "--teacher", bare, "--terms", "mask=0.3") == 2
        assert "pass --teacher-tokenizer" in capsys.readouterr().err
        given = ["--teacher-tokenizer", folders["clipseg"], "--terms", "mask=0.3"]
        assert self.run(*common, "--teacher", bare, *given) == 0, capsys.readouterr().err

    def test_a_teacher_of_fastkd_with_another_vocabulary(self, scenes, tmp_path, capsys) -> None:
        other = copy.deepcopy(STUDENT)
        other["text"]["vocab_size"] = 200
        (tmp_path / "student.json").write_text(json.dumps(other))
        common = [
            "distill",
            "--data",
            scenes,
            "--student",
            tmp_path / "student.json",
            "--out",
            tmp_path / "o",
            *self.SHORT,
        ]
        assert self.run(*common) == 2
        assert "the student's vocabulary has 200 words, the teacher's 160" in capsys.readouterr().err
        assert self.run(*common, "--teacher-tokenizer", "shapes") == 2
        assert "tokenised differently" in capsys.readouterr().err
        terms = ["--terms", "mask=0.3", "pixel_pixel=0.1"]
        assert self.run(*common, "--teacher-tokenizer", "shapes", *terms) == 0, capsys.readouterr().err
