"""Teachers from transformers: load from folders and the hub, reject other files."""

from __future__ import annotations

import copy
import json
import shutil
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")

import tiny_teachers as tiny
from tiny_teachers import SENTENCES, imagenet, picture, tokens

import fastkd
from fastkd.data import load_tokenizer
from fastkd.data.imagenet import IMAGENET_MEAN
from fastkd.models import CLIPSegTeacher, SAM3Teacher, TextPromptedTeacher


class TestLoading:
    def test_model_type_selects_the_class(self, tiny_folders, teachers) -> None:
        assert type(teachers["clipseg"]) is CLIPSegTeacher
        assert type(teachers["sam3"]) is SAM3Teacher
        for kind, teacher in teachers.items():
            assert not any(module.training for module in teacher.modules())
            config = teacher.config
            assert (config.model_type, config.image_size, config.max_words) == (kind, tiny.SIZES[kind], 32)
            assert config.image_mean == tuple(tiny.MEAN[kind])
            assert config.tokenizer == str(tiny_folders[kind])
            assert teacher.parameter_count()["total"] == sum(p.numel() for p in teacher.network.parameters())

    def test_defaults_without_a_preprocessor(self, tiny_folders, tmp_path) -> None:
        for kind, (size, mean) in {"clipseg": (32, IMAGENET_MEAN), "sam3": (56, (0.5, 0.5, 0.5))}.items():
            folder = shutil.copytree(tiny_folders[kind], tmp_path / kind)
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

    def test_half_precision_files_load_as_float32(self, tiny_folders, teachers, tmp_path) -> None:
        copy.deepcopy(teachers["sam3"].network).half().save_pretrained(tmp_path)
        teacher = TextPromptedTeacher.from_pretrained(tmp_path)
        assert {p.dtype for p in teacher.parameters()} == {torch.float32}

    def test_sam3_video_loads_its_detector(self, tiny_folders, teachers, tmp_path) -> None:
        from safetensors.torch import load_file, save_file

        state = {f"detector_model.{k}": v for k, v in load_file(tiny_folders["sam3"] / "model.safetensors").items()}
        state["tracker_model.something"] = torch.zeros(3)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        detector = json.loads((tiny_folders["sam3"] / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam3_video", "detector_config": detector}))
        teacher = TextPromptedTeacher.from_pretrained(tmp_path)
        ids, mask = tokens(teachers["sam3"])
        out, expected = (t(imagenet(picture()), ids, mask) for t in (teacher, teachers["sam3"]))
        torch.testing.assert_close(out.logits, expected.logits)

    def test_loads_by_hub_name(self, tiny_folders, monkeypatch) -> None:
        import huggingface_hub

        requested = {}

        def fetch(name: str, **options: Any) -> str:
            requested.update(options, name=name)
            return str(tiny_folders["clipseg"])

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        assert type(TextPromptedTeacher.from_pretrained("owner/clipseg")) is CLIPSegTeacher
        assert requested["name"] == "owner/clipseg"
        assert not any("bin" in pattern or "*.p" in pattern for pattern in requested["allow_patterns"])

        def refuse(name: str, **options: Any) -> str:
            raise OSError("401: gated\nmore text")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(
            ValueError, match=r"'owner/sam' is not a local folder and could not be .*OSError: 401: gated\)"
        ):
            TextPromptedTeacher.from_pretrained("owner/sam")

    def test_commands_report_failed_downloads(self, monkeypatch) -> None:
        import huggingface_hub

        def refuse(name: str, *rest: str, **options: Any) -> str:
            raise OSError("no network")

        from fastkd.cli._models import load_model

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
        with pytest.raises(
            ValueError, match=r"'owner/sam' is not a local folder and could not be .*OSError: no network\)"
        ):
            load_model("owner/sam")

    def test_matches_transformers_processors(self, tiny_folders, tmp_path) -> None:
        from transformers import AutoProcessor, CLIPSegProcessor, Sam3ImageProcessor, Sam3Processor, ViTImageProcessor

        kinds = {"clipseg": (CLIPSegProcessor, ViTImageProcessor), "sam3": (Sam3Processor, Sam3ImageProcessor)}
        for kind, (processor, image_processor) in kinds.items():
            folder = shutil.copytree(tiny_folders[kind], tmp_path / kind)
            for name in ("preprocessor_config.json", "tokenizer.json"):
                (folder / name).unlink()
            side, mean, std = tiny.SIZES[kind], tiny.MEAN[kind], tiny.STD[kind]
            images = image_processor(size={"height": side, "width": side}, image_mean=mean, image_std=std)
            processor(images, tiny.tokenizer()).save_pretrained(folder)
            teacher = TextPromptedTeacher.from_pretrained(folder)
            pixels = (picture((side, side)) * 255).round()
            padding = {"padding": True} if kind == "clipseg" else {}  # SAM 3's always pads and has no such argument
            theirs = AutoProcessor.from_pretrained(folder)(
                images=list(pixels.byte()), text=SENTENCES, return_tensors="pt", **padding
            )
            torch.testing.assert_close(teacher.pixels(imagenet(pixels / 255)), theirs["pixel_values"])
            ids, mask = tokens(teacher)
            words = theirs["input_ids"].shape[1]
            assert torch.equal(ids[:, :words], theirs["input_ids"])
            assert torch.equal(mask[:, :words], theirs["attention_mask"].bool())
            assert not mask[:, words:].any()

    def test_preprocessor_values(self, tiny_folders, tmp_path) -> None:
        folder = shutil.copytree(tiny_folders["clipseg"], tmp_path / "c")

        def config(**values: Any) -> Any:
            (folder / "preprocessor_config.json").write_text(json.dumps({"size": 48, **values}))
            return TextPromptedTeacher.from_pretrained(folder).config

        assert config(image_mean=0.5, image_std=0.25).image_mean == (0.5, 0.5, 0.5)
        raw = config(image_mean=[0.5] * 3, do_normalize=False)
        assert (raw.image_mean, raw.image_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        for value in (None, "0.5", ["a", "b", "c"]):
            with pytest.raises(ValueError, match="image_mean must be three numbers, got"):
                config(image_mean=value)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "clipsegg"}, r"'clipsegg', which has no adapter; .* Did you mean 'clipseg'"),
            ({"model_type": "sam3_tracker"}, "supported: 'clipseg', 'sam3', 'sam3_video'"),
            ({"model_type": "mask2former"}, r"no adapter.*Any other nn\.Module can teach through fastkd\.Taps"),
            ({"backbone": "resnet10t"}, r"has no model_type.*RISModel\.from_pretrained"),
            ([1], "must hold a JSON object"),
        ],
    )
    def test_rejects_other_architectures(self, tmp_path, config, message) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            TextPromptedTeacher.from_pretrained(tmp_path)

    def test_rejects_the_wrong_class_or_folder(self, tiny_folders, tmp_path) -> None:
        with pytest.raises(ValueError, match="has model_type 'sam3', CLIPSegTeacher takes 'clipseg'"):
            CLIPSegTeacher.from_pretrained(tiny_folders["sam3"])
        with pytest.raises(FileNotFoundError, match="no folder"):
            TextPromptedTeacher.from_pretrained(tmp_path / "none")
        shutil.copy(tiny_folders["sam3"] / "config.json", tmp_path)
        with pytest.raises(FileNotFoundError, match=r"no weights in .*: expected safetensors"):
            TextPromptedTeacher.from_pretrained(tmp_path)

    def test_ignores_position_ids_of_older_files(self, tiny_folders, teachers, tmp_path) -> None:
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(tiny_folders["clipseg"], tmp_path / "c")
        positions = {"clip.text_model.embeddings.position_ids": torch.arange(40)[None]}
        state = load_file(folder / "model.safetensors") | positions
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        teacher = TextPromptedTeacher.from_pretrained(folder)
        torch.testing.assert_close(teacher.state_dict(), teachers["clipseg"].state_dict())

    def test_rejects_weights_that_do_not_match(self, tiny_folders, tmp_path) -> None:
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(tiny_folders["clipseg"], tmp_path / "c")
        file = folder / "model.safetensors"
        state = load_file(file)
        save_file({k: v for k, v in state.items() if k != "decoder.film_mul.bias"}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 missing or of another shape \(decoder\.film_mul\.bias\)"):
            TextPromptedTeacher.from_pretrained(folder)
        save_file(state | {"decoder.film_mul.bias": torch.zeros(9)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"film_mul|can't be loaded"):
            TextPromptedTeacher.from_pretrained(folder)
        save_file(state, file, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 1  # the file has two
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"do not match .* 16 unexpected \(clip\.text_model\.encoder\.lay"):
            TextPromptedTeacher.from_pretrained(folder)
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"can't be loaded by transformers"):
            TextPromptedTeacher.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("sam3", {"image_size": 70}, r"image_size must be 56, got 70: SAM 3's rotary"),
            ("sam3", {"masks": "all"}, "masks must be one of 'best', 'semantic', got 'all'"),
            ("clipseg", {"image_size": 4}, "a multiple of the patch of 8 pixels, got 4"),
            ("clipseg", {"image_size": 51}, "a multiple of the patch of 8 pixels, got 51"),
            ("clipseg", {"image_size": 0}, "image_size must be an integer"),
            ("clipseg", {"image_size": True}, "image_size must be an integer"),
            ("clipseg", {"image_std": (1, 0, 1)}, "image_std must be three numbers above 0"),
            ("clipseg", {"image_mean": (1, 0)}, "image_mean must be three numbers"),
            ("clipseg", {"max_words": 77}, "max_words must be from 3 to 40"),
        ],
    )
    def test_rejects_bad_options(self, tiny_folders, kind, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            TextPromptedTeacher.from_pretrained(tiny_folders[kind], **options)

    def test_reports_a_transformers_version_without_the_class(self, tiny_folders, monkeypatch) -> None:
        import transformers

        monkeypatch.setattr(SAM3Teacher, "network_class", "Sam4Model")
        with pytest.raises(ImportError, match=rf"Sam4Model, which transformers {transformers.__version__} does not"):
            TextPromptedTeacher.from_pretrained(tiny_folders["sam3"])


def test_clip_tokenizer_keeps_the_end_token(tiny_folders, tmp_path) -> None:
    end = len(tiny.tokenizer()) - 1
    tokenizer = load_tokenizer(tiny_folders["clipseg"], keep_end=True)
    with pytest.warns(fastkd.FastKDWarning, match="was truncated to max_words=6"):
        ids, mask = tokenizer(SENTENCES, 6)
    assert ids[0].tolist()[0] == end - 1
    assert ids[0].tolist()[4:] == [end, end]  # the end token, and padding with the same id
    assert mask[0].tolist() == [True] * 5 + [False]
    assert ids[1, 5] == end
    assert mask[1].all()
