"""A model's folder and configuration include its normalisation and its tokenizer."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")

import timm

from fastkd import Distiller, Term, losses
from fastkd.cli import main
from fastkd.cli._data import open_split
from fastkd.cli._models import build_model
from fastkd.data import RefCOCO, ReferDataset, Tokenizer, collate, load_tokenizer, make_shapes
from fastkd.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fastkd.distill.forward import normalisation, renormalise
from fastkd.errors import FastKDWarning
from fastkd.evaluate import evaluate, predict, tokenizer_of
from fastkd.models import RISConfig, RISModel, preset
from fastkd.report import Example
from fastkd.train import TrainConfig, segmentation_loss, train

HALF = (0.5, 0.5, 0.5)
OWN = {"image_mean": (0.1, 0.4, 0.7), "image_std": (0.5, 0.25, 0.125)}
TEXT = {
    "vocab_size": 200,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 24,
}
SMALL = {"backbone": "mobilenetv4_conv_small_035", "text": TEXT, "decoder_width": 8, "image_size": 64}


def small(**changes) -> RISModel:
    torch.manual_seed(0)
    return RISModel(RISConfig(**{**SMALL, "text": dict(TEXT), **changes})).eval()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    make_shapes(root, images=16, image_size=64, seed=3)
    return root


@pytest.fixture
def offline_timm(monkeypatch):
    """Replace published weights by random ones; keep timm's configuration of the published ones."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: create(name, **more))


class TestNormalisation:
    def test_timm_weights_define_the_normalisation(self, offline_timm, tmp_path):
        model = small_with("timm")
        assert (model.config.image_mean, model.config.image_std) == (HALF, HALF)
        kept = RISModel.from_pretrained(save(model, tmp_path / "kept"))
        assert (kept.config.image_mean, kept.config.image_std) == (HALF, HALF)
        assert kept.config == model.config
        resnet = small_with("timm", backbone="resnet18", backbone_args={"layers": [1, 1, 1, 1], "channels": [8] * 4})
        assert (resnet.config.image_mean, resnet.config.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert small_with("timm", **OWN).config.image_mean == OWN["image_mean"]  # the configuration overrides timm

    def test_defaults_to_imagenet(self, tmp_path):
        config = RISConfig(**SMALL)
        model = RISModel(config)
        assert config.image_mean is None  # the caller's configuration is unchanged
        assert (model.config.image_mean, model.config.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
        folder = save(model, tmp_path / "older")
        values = json.loads((folder / "config.json").read_text())
        del values["image_mean"], values["image_std"]
        (folder / "config.json").write_text(json.dumps(values))
        assert RISModel.from_pretrained(folder).config.image_mean == IMAGENET_MEAN

    def test_weights_file_uses_its_config_or_timms(self, tmp_path):
        network = timm.create_model(SMALL["backbone"])
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        assert small_with(tmp_path / "weights.pth").config.image_mean == HALF
        for content, mean in (
            ({"pretrained_cfg": {"mean": [0.25, 0.5, 0.75], "std": [1.0, 1.0, 1.0]}}, (0.25, 0.5, 0.75)),
            ({"hidden_size": 3}, HALF),
            ([], HALF),
        ):
            (tmp_path / "config.json").write_text(json.dumps(content))
            assert small_with(tmp_path / "weights.pth").config.image_mean == mean

    def test_data_prediction_and_evaluation_use_the_models_normalisation(self, scenes, tmp_path):
        model = small(**OWN, tokenizer="shapes")
        data = open_split(scenes, "val", model, sentences="all")
        sample = data[0]
        pixels = data.refcoco.image(sample["image_id"])
        by_hand = (pixels / 255.0 - np.array(OWN["image_mean"])) / np.array(OWN["image_std"])
        np.testing.assert_allclose(sample["image"].numpy(), by_hand.transpose(2, 0, 1), atol=1e-5)
        with torch.no_grad():
            batch = collate([sample])
            expected = model(batch["image"], batch["input_ids"], batch["word_mask"]).logits.softmax(1)[0, 1]
        found = predict(model, pixels, sample["sentence"])
        np.testing.assert_allclose(found.probability, expected.numpy(), atol=1e-5)
        example = Example.from_sample(sample, {}, image_mean=data.image_mean, image_std=data.image_std)
        np.testing.assert_allclose(example.image.numpy().transpose(1, 2, 0), pixels / 255.0, atol=1e-5)
        evaluate(model, data)
        other = ReferDataset(data.refcoco, data.tokenizer, image_size=64, sentences="all")
        message = (
            r"by mean \(0\.485, .*the model expects mean \(0\.1, 0\.4, 0\.7\).*image_mean=model\.config\.image_mean"
        )
        for hidden in (other, torch.utils.data.Subset(other, [0]), torch.utils.data.ConcatDataset([data, other])):
            with pytest.raises(ValueError, match=message):
                evaluate(model, hidden)
        with pytest.raises(ValueError, match="the student expects"):
            train(model, other, TrainConfig(steps=1, batch_size=2, device="cpu"), progress=False)

    def test_distiller_converts_the_teachers_image(self, scenes):
        student, teacher = small(**OWN, tokenizer="shapes"), small(tokenizer="shapes").requires_grad_(False)
        theirs = open_split(scenes, "train", teacher, sentences="all")
        ours = open_split(scenes, "train", student, sentences="all")
        batch, teachers_batch = collate([ours[0], ours[1]]), collate([theirs[0], theirs[1]])
        distiller = Distiller(student, teacher, segmentation_loss, [Term(losses.logit_kd, "logits")])
        images = []
        teacher.register_forward_pre_hook(lambda module, args, kwargs: images.append(kwargs["image"]), with_kwargs=True)
        output = distiller(batch)
        torch.testing.assert_close(images[0], teachers_batch["image"], rtol=0, atol=2e-5)
        torch.testing.assert_close(output.student.logits, student(**distiller.model_inputs(batch)).logits)
        distiller.run_teacher({**batch, "teacher_image": teachers_batch["image"] + 1})  # already made for the teacher
        assert torch.equal(images[1], teachers_batch["image"] + 1)
        distiller = Distiller(teacher, small(), segmentation_loss, [Term(losses.logit_kd, "logits")])
        assert distiller._teacher_inputs(teachers_batch)["image"] is teachers_batch["image"]  # no conversion, no copy

    def test_renormalise(self):
        image = torch.rand(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
        one, other = (IMAGENET_MEAN, IMAGENET_STD), (OWN["image_mean"], OWN["image_std"])
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in one)
        mean2, std2 = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in other)
        got = renormalise(image, one, other)
        torch.testing.assert_close(got.double(), (image.double() * std + mean - mean2) / std2, rtol=0, atol=1e-5)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert normalisation(torch.nn.Linear(1, 1)) is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_mean": HALF}, "belong together"),
            ({"image_mean": (0.5, 0.5), "image_std": HALF}, "image_mean must be three numbers"),
            ({"image_mean": (0.5, 0.5, float("nan")), "image_std": HALF}, "image_mean must be three numbers"),
            ({"image_mean": HALF, "image_std": (0.5, 0.0, 0.5)}, "image_std must be three numbers above 0"),
            ({"image_mean": "abc", "image_std": HALF}, "image_mean must be three numbers"),
        ],
    )
    def test_rejects_bad_values(self, changes, message, scenes):
        with pytest.raises(ValueError, match=message):
            RISConfig(**changes)

    def test_dataset_rejects_bad_values(self, scenes):
        for changes in ({"image_mean": (0.5,)}, {"image_std": (0.5, 0.5, 0.0)}):
            with pytest.raises(ValueError, match="image_mean and image_std must be three numbers each"):
                ReferDataset(RefCOCO(scenes), load_tokenizer("shapes"), **changes)


class TestTokenizer:
    def test_saved_model_keeps_its_vocabulary(self, scenes, tmp_path, monkeypatch):
        """Save a relative tokenizer path; elsewhere the same path is another vocabulary."""
        pieces = load_tokenizer("shapes").pieces()
        here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
        for folder, content in ((here, pieces), (elsewhere, [*pieces[:5], *reversed(pieces[5:])])):
            folder.mkdir()
            (folder / "vocab.txt").write_text("\n".join(content) + "\n", encoding="utf-8")
        monkeypatch.chdir(here)
        args = ["--data", str(scenes), "--out", "run", "--steps", "1", "--batch-size", "2", "--device", "cpu"]
        assert main(["train", *args, "--tokenizer", "vocab.txt", "--threads", "1"]) == 0
        best = here / "run" / "best"
        assert json.loads((best / "config.json").read_text())["tokenizer"] == "."
        shutil.copytree(best, tmp_path / "moved")
        shutil.rmtree(here)
        monkeypatch.chdir(elsewhere)
        for name in ("moved", "again"):
            model = RISModel.from_pretrained(tmp_path / name)
            for loaded in (tokenizer_of(model), tokenizer_of(model, tmp_path / name)):
                assert loaded.pieces() == pieces
            assert open_split(scenes, "val", model, sentences="all").tokenizer.pieces() == pieces
            model.save_pretrained(tmp_path / "again")
        new = build_model(str(tmp_path / "moved" / "config.json"), seed=0)
        assert tokenizer_of(new).pieces() == pieces

    def test_training_saves_the_datasets_tokenizer(self, scenes, tmp_path):
        cased = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", *"abcdefgh"]
        (tmp_path / "vocab.txt").write_text("\n".join(cased) + "\n")
        student = small()  # its configuration names no tokenizer
        for source, name in ((tmp_path / "vocab.txt", "."), ("shapes", "shapes")):
            data = ReferDataset(RefCOCO(scenes), Quiet(load_tokenizer(source)), image_size=64)
            out = tmp_path / f"run-{name}"
            train(student, data, TrainConfig(steps=1, batch_size=2, device="cpu"), out_dir=out, progress=False)
            assert json.loads((out / "last" / "config.json").read_text())["tokenizer"] == name
            loaded = tokenizer_of(RISModel.from_pretrained(out / "last"))
            assert loaded.pieces() == load_tokenizer(source).pieces()
            assert loaded.lower_case is (name == "shapes")

    def test_tokenizer_precedence(self, tmp_path, monkeypatch):
        shapes = load_tokenizer("shapes")
        model = small(tokenizer="words")
        with pytest.warns(FastKDWarning, match="saved without its tokenizer, .*'words' does not exist"):
            folder = save(model, tmp_path / "model")
        assert RISModel.from_pretrained(folder).config.tokenizer == "words"
        shapes.save(folder / "words")
        assert RISModel.from_pretrained(folder).config.tokenizer == str(folder / "words")
        (folder / "vocab.txt").write_text("\n".join(shapes.pieces()) + "\n")
        monkeypatch.chdir(tmp_path)
        loaded = RISModel.from_pretrained("model")
        assert loaded.config.tokenizer == str(folder)  # absolute, so that it survives a change of directory
        assert tokenizer_of(loaded).pieces() == shapes.pieces()

    def test_tokenizer_of_another_model_in_the_folder_is_warned_of(self, tmp_path):
        load_tokenizer("shapes").save(tmp_path)
        with pytest.warns(FastKDWarning, match=r"takes precedence over this model's \(shapes\): remove tokenizer.json"):
            save(small(tokenizer="shapes"), tmp_path)

    def test_folder_of_a_run_is_not_that_of_a_model(self, tmp_path):
        save(small(), tmp_path / "best")
        with pytest.raises(FileNotFoundError, match=r"has no config\.json.* Did you mean .*best\?"):
            RISModel.from_pretrained(tmp_path)

    def test_text_weights_define_the_tokenizer(self, tmp_path):
        small().text_encoder.model.save_pretrained(tmp_path / "bert")
        torch.manual_seed(0)
        assert RISModel(RISConfig(**SMALL), text_weights=tmp_path / "bert").config.tokenizer is None
        load_tokenizer("shapes").save(tmp_path / "bert")
        model = RISModel(RISConfig(**SMALL), text_weights=tmp_path / "bert")
        assert tokenizer_of(model).pieces() == load_tokenizer("shapes").pieces()
        named = RISModel(RISConfig(**SMALL, tokenizer="shapes"), text_weights=tmp_path / "bert")
        assert named.config.tokenizer == "shapes"
        shutil.move(save(model, tmp_path / "student"), tmp_path / "moved")
        shutil.rmtree(tmp_path / "bert")
        assert tokenizer_of(RISModel.from_pretrained(tmp_path / "moved")).lower_case

    def test_padding_ids_must_match(self, scenes, tmp_path):
        pieces = [*"abc", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *load_tokenizer("shapes").pieces()[5:]]
        pieces = list(dict.fromkeys(pieces))
        (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
        tokenizer = load_tokenizer(tmp_path)
        data = ReferDataset(RefCOCO(scenes, split="val"), tokenizer, image_size=64, sentences="all")
        with pytest.raises(
            ValueError, match=r"pads with id 3, the model's .* expects padding id 0: .*\{'pad_token_id': 3\}"
        ):
            evaluate(small(), data)
        model = small(text={**TEXT, "pad_token_id": 3})
        evaluate(model, data)
        batch = collate([data[0]])
        with torch.no_grad():
            implied = model(batch["image"], batch["input_ids"]).logits  # the mask is derived from the padding id
            assert torch.equal(implied, model(batch["image"], batch["input_ids"], batch["word_mask"]).logits)
        with pytest.warns(FastKDWarning, match="pads with id 0, the model's text encoder expects padding id 3"):
            predict(model, np.zeros((64, 64, 3), np.uint8), "a circle", load_tokenizer("shapes"))
        new = build_model("shapes-student", seed=0, tokenizer=str(tmp_path))
        assert new.text_encoder.pad_id == 3
        assert preset("shapes-student").text == build_model("shapes-student", seed=0).config.text

    def test_export_metadata_includes_casing_and_normalisation(self, tmp_path):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        from fastkd.models.export import _facts

        cased = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "The", "the"]
        (tmp_path / "vocab.txt").write_text("\n".join(cased) + "\n")
        model = small(**OWN, text={**TEXT, "pad_token_id": 1}, tokenizer=str(tmp_path))
        facts = _facts(
            model, tmp_path / "vocab.txt", 64, 64, 1, {}, 1e-4, load_tokenizer(tmp_path), tmp_path / "x.tokenizer.json"
        )
        assert (facts["image"]["mean"], facts["image"]["std"]) == ([0.1, 0.4, 0.7], [0.5, 0.25, 0.125])
        assert facts["tokenizer"]["lower_case"] is False
        assert facts["tokenizer"]["pad_id"] == 1
        assert facts["tokenizer"]["name"] == facts["config"]["tokenizer"] == "x.tokenizer.json"  # not a local path


class Quiet(Tokenizer):
    """A tokenizer that does not warn about unknown words."""

    def __init__(self, other: Tokenizer) -> None:
        super().__init__(other._inner, other.name)
        self._warned = {"unknown"}


def small_with(weights, **changes) -> RISModel:
    return RISModel(RISConfig(**{**SMALL, **changes}), backbone_weights=weights)


def save(model: RISModel, folder):
    model.save_pretrained(folder)
    return folder
