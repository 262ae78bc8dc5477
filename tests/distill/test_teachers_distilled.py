"""Teachers from transformers, with their own tokenizer, in a Distiller and on the command line."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm", reason="needs the [ris] extra")
pytest.importorskip("transformers", reason="needs the [ris] extra")


from fastkd import Distiller, Term, losses
from fastkd.data import RefCOCO, ReferDataset, collate, load_tokenizer, make_shapes
from fastkd.distill.recipes import recipe
from fastkd.models import RISConfig, RISModel
from fastkd.train import segmentation_loss

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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    make_shapes(root, images=40, image_size=64)
    return root


@pytest.fixture(scope="module")
def student() -> RISModel:
    torch.manual_seed(0)
    return RISModel(RISConfig.from_dict(STUDENT))


@pytest.fixture(scope="module")
def batches(scenes, tiny_folders) -> dict[str, Any]:
    """Return batches with only the student's words, and with the teacher's as well."""

    def batch(**teacher: Any) -> dict[str, Any]:
        refs = RefCOCO(scenes, split="train", name="refcoco", split_by="unc")
        data = ReferDataset(refs, load_tokenizer("shapes"), image_size=64, max_words=20, **teacher)
        return collate([data[i] for i in range(4)])

    theirs = load_tokenizer(tiny_folders["sam3"], keep_end=True)
    return {
        "alone": batch(),
        "both": batch(teacher_tokenizer=theirs, teacher_max_words=32),
        "equal": batch(teacher_tokenizer=theirs, teacher_max_words=20),  # the same number of tokens, but different ones
    }


MASKS = {"word_mask": ("student.word_mask", "teacher.word_mask")}
ONE_HEAD = ("pixel_word_logits.0", lambda out: out.pixel_word_logits[1][:, :1])  # 16 pixels, one head on both sides


class TestDifferentTokenizers:
    def test_dataset_tokenises_for_both(self, batches, tiny_folders) -> None:
        batch, alone = batches["both"], batches["alone"]
        assert batch["teacher_input_ids"].shape == batch["teacher_word_mask"].shape == (4, 32)
        ids, mask = load_tokenizer(tiny_folders["sam3"], keep_end=True)(batch["sentence"], 32)
        assert torch.equal(batch["teacher_input_ids"], ids)
        assert torch.equal(batch["teacher_word_mask"], mask)
        for key in alone:
            same = torch.equal(batch[key], alone[key]) if isinstance(alone[key], Tensor) else batch[key] == alone[key]
            assert same, key

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"teacher_tokenizer": "shapes"}, TypeError, "teacher_tokenizer must come from load_tokenizer, got str"),
            ({"teacher_tokenizer": len, "teacher_max_words": 2}, ValueError, "teacher_max_words must be an integer"),
        ],
    )
    def test_dataset_rejects_bad_tokenizer_arguments(self, scenes, arguments, error, message) -> None:
        refs = RefCOCO(scenes, split="train", name="refcoco", split_by="unc")
        with pytest.raises(error, match=message):
            ReferDataset(refs, load_tokenizer("shapes"), image_size=64, max_words=20, **arguments)

    def test_student_and_teacher_get_their_own_words(self, student, teachers, batches) -> None:
        batch = batches["both"]
        distiller = Distiller(student, teachers["sam3"], segmentation_loss, [Term(losses.logit_kd, "logits")])
        out = distiller(batch)
        assert torch.equal(out.student.word_mask, batch["word_mask"])
        assert torch.equal(out.teacher.word_mask, batch["teacher_word_mask"])
        expected = teachers["sam3"](batch["image"], batch["teacher_input_ids"], batch["teacher_word_mask"])
        torch.testing.assert_close(out.teacher.logits, expected.logits)
        without = {key: value for key, value in batch.items() if key != "teacher_word_mask"}
        assert torch.equal(distiller.run_teacher(without).word_mask, batch["teacher_word_mask"])  # not the student's

    def test_pixel_pixel_equals_its_formula(self, student, teachers, batches) -> None:
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
    def test_rejects_word_by_word_terms(self, student, teachers, batches, batch, loss, kwargs) -> None:
        term = Term(loss, *ONE_HEAD, name="words", kwargs=kwargs)
        distiller = Distiller(student, teachers["sam3"], segmentation_loss, [term])
        message = (
            r"term 'words': teacher and student are tokenised differently .*'pixel_to_word'.* would compare them: only "
            r"'pixel_pixel' is defined then\. Pass terms="
        )
        for run in (distiller.check, distiller):
            with pytest.raises(ValueError, match=message):
                run(batches[batch])

    def test_rejects_one_mask_for_two_sentences(self, student, teachers, batches) -> None:
        kwargs = {"terms": {"pixel_pixel": 1.0}, "word_mask": "batch.word_mask"}
        term = Term(losses.cross_modal_kd_from_logits, *ONE_HEAD, name="words", kwargs=kwargs)
        distiller = Distiller(student, teachers["sam3"], segmentation_loss, [term])
        with pytest.raises(ValueError, match=r"one word_mask \('batch\.word_mask'\) does not fit both: pass a pair"):
            distiller.check(batches["equal"])

    def test_rejects_the_students_ids_for_the_teacher(self, student, teacher, batches) -> None:
        distiller = Distiller(student, teacher, segmentation_loss, recipe(["mask"]))
        message = r"reads token ids of its own tokenizer, but the batch has no 'teacher_input_ids'"
        with pytest.raises(ValueError, match=message):
            distiller.check(batches["alone"])
        report = distiller.check(batches["both"])
        assert report.norms["mask"] > 0
        shared = copy.deepcopy(teacher)
        shared.has_own_tokenizer = False
        ids = batches["both"]["teacher_input_ids"][:, :20]
        same = {
            **batches["alone"],
            "input_ids": ids.clamp(max=159),
            "word_mask": torch.ones_like(ids, dtype=torch.bool),
        }
        shared.text_config.eos_token_id = 10**6  # the truncated ids of the student hold no end token
        assert Distiller(student, shared, segmentation_loss, recipe(["mask"])).run_teacher(same).logits.shape[0] == 4

    def test_network_without_pixel_word_logits(self, student, teachers, batches) -> None:
        kwargs = {"terms": {"pixel_pixel": 1.0}, **MASKS}
        term = Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", name="words", kwargs=kwargs)
        distiller = Distiller(student, teachers["clipseg"], segmentation_loss, [term])
        with pytest.raises(ValueError, match=r"got \[2, 0\]; an empty list means that the network does not compute it"):
            distiller.check(batches["both"])

    def test_recipes_accept_any_sizes(self, student, teachers, batches) -> None:
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

    def test_half_precision_teacher(self, student, teachers, batches) -> None:
        names = ["mask", "pixel_pixel"]
        full, half = (
            Distiller(student, network, segmentation_loss, recipe(names)).check(batches["both"]).values
            for network in (teachers["sam3"], copy.deepcopy(teachers["sam3"]).bfloat16())
        )
        for name in names:
            assert half[name] == pytest.approx(full[name], rel=0.05)

    def test_image_only_network_of_timm(self, student, batches) -> None:
        import timm

        class ImageOnly(torch.nn.Module):
            def __init__(self, network: torch.nn.Module) -> None:
                super().__init__()
                self.network = network

            def forward(self, image: Tensor, **words: Tensor) -> Any:
                return self.network(image)

        torch.manual_seed(0)
        teacher = ImageOnly(timm.create_model("resnet18", pretrained=False)).eval().requires_grad_(False)
        term = Term(losses.pixel_relation_kd, "stages.0", "map")
        student = copy.deepcopy(student).eval()
        distiller = Distiller(student, teacher, segmentation_loss, [term], teacher_taps={"map": "network.layer3"})
        distiller.check(batches["alone"])
        out = distiller(batches["alone"])
        theirs = teacher.network.forward_intermediates(batches["alone"]["image"], [3], intermediates_only=True)[0]
        expected = losses.pixel_relation_kd(out.student.stages[0], theirs, backend="reference")
        torch.testing.assert_close(out.terms["pixel_relation_kd"], expected, rtol=1e-4, atol=1e-6)
        inner = {"map": "network.layer3.1.bn2"}  # timm adds the residual to it in place
        with pytest.raises(RuntimeError, match=r"network\.layer3\.1\.bn2' was changed in place"):
            Distiller(student, teacher, segmentation_loss, [term], teacher_taps=inner).check(batches["alone"])


class TestCommands:
    SHORT = ("--steps", "2", "--batch-size", "4", "--threads", "1")

    def run(self, *arguments: Any) -> int:
        from fastkd.cli import main

        return main([str(one) for one in arguments])

    def distill(self, scenes: Path, folder: Path, student: dict[str, Any]) -> list[Any]:
        (folder / "student.json").write_text(json.dumps(student))
        return ["distill", "--data", scenes, "--student", folder / "student.json", *self.SHORT]

    def test_distil_and_evaluate(self, tiny_folders, scenes, tmp_path, capsys) -> None:
        common = self.distill(scenes, tmp_path, STUDENT)
        for kind, terms in {"clipseg": ["mask=0.3"], "sam3": ["mask=0.3", "pixel_pixel=0.1"]}.items():
            out = tmp_path / kind
            code = self.run(*common, "--teacher", tiny_folders[kind], "--out", out, "--terms", *terms)
            assert code == 0, capsys.readouterr().err
            assert (
                json.loads((out / "best" / "config.json").read_text())["tokenizer"] == "shapes"
            )  # the student's tokenizer
            assert self.run("evaluate", "--data", scenes, "--model", tiny_folders[kind], "--split", "val") == 0
            assert "mIoU" in capsys.readouterr().out

    def test_rejects_terms_and_tokenizers_that_do_not_match(self, tiny_folders, scenes, tmp_path, capsys) -> None:
        common = [*self.distill(scenes, tmp_path, STUDENT), "--out", tmp_path / "o"]
        assert self.run(*common, "--teacher", tiny_folders["sam3"]) == 2  # the default term compares words
        error = capsys.readouterr().err
        assert "tokenised differently" in error
        assert "compare no words, as the recipe 'mask' does" in error  # usable as a value of --terms
        assert self.run(*common, "--teacher", tiny_folders["clipseg"], "--terms", "pixel_pixel=0.1") == 2
        assert "term 'pixel_pixel', teacher: " in (error := capsys.readouterr().err)
        assert "0 items: this network does not compute it" in error
        bare = shutil.copytree(tiny_folders["clipseg"], tmp_path / "bare")
        (bare / "tokenizer.json").unlink()
        assert self.run(*common, "--teacher", bare, "--terms", "mask=0.3") == 2
        assert "pass --teacher-tokenizer" in capsys.readouterr().err
        foreign = ["--teacher-tokenizer", "shapes", "--terms", "mask=0.3"]
        assert self.run(*common, "--teacher", tiny_folders["sam3"], *foreign) == 2
        assert re.search(r"entries, but the teacher's vocabulary \d+: it is another tokenizer", capsys.readouterr().err)
        given = ["--teacher-tokenizer", tiny_folders["clipseg"], "--terms", "mask=0.3"]
        assert self.run(*common, "--teacher", bare, *given) == 0, capsys.readouterr().err

    def test_fastkd_teacher_with_another_vocabulary(self, scenes, tmp_path, capsys) -> None:
        other = copy.deepcopy(STUDENT)
        other["text"]["vocab_size"] = 200
        common = [*self.distill(scenes, tmp_path, other), "--out", tmp_path / "o"]
        assert self.run(*common) == 2
        assert "the student's vocabulary has 200 words, the teacher's 160" in capsys.readouterr().err
        assert self.run(*common, "--teacher-tokenizer", "shapes") == 2
        assert "tokenised differently" in capsys.readouterr().err
        terms = ["--terms", "mask=0.3", "pixel_pixel=0.1"]
        assert self.run(*common, "--teacher-tokenizer", "shapes", *terms) == 0, capsys.readouterr().err
