"""Models with half- or double-precision weights, given the float32 images of a dataset."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs the [ris] extra")

from fastkd import Distiller, Term, losses
from fastkd.cli._data import open_split
from fastkd.data import collate, make_shapes
from fastkd.evaluate import evaluate, predict
from fastkd.models import LAVT, LAVTConfig, RISModel, preset
from fastkd.train import TrainConfig, segmentation_loss, train

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


class Plain(nn.Module):
    """A network that does not convert its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)

    def forward(self, image, input_ids, word_mask):
        return SimpleNamespace(logits=self.last(self.norm(self.first(image)).relu()))


@pytest.fixture(scope="module")
def student() -> RISModel:
    torch.manual_seed(0)
    return RISModel(preset("shapes-student")).eval()


@pytest.fixture(scope="module")
def data(student, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(root, images=16, image_size=64, seed=4)
    return open_split(root, "val", student, sentences="all")


@pytest.fixture(scope="module")
def batch(data):
    return collate([data[0], data[1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain", [False, True])
def test_evaluation_matches_the_same_weights_in_fp32(student, data, kind, plain):
    torch.manual_seed(1)
    model = (Plain().eval() if plain else copy.deepcopy(student)).to(kind)
    result = evaluate(model, data)
    assert result.precision == KINDS[kind]
    assert evaluate(model, data, precision="bf16").metrics == result.metrics  # no additional autocast
    widened = evaluate(copy.deepcopy(model).float(), data)
    assert widened.precision == "fp32"
    assert float((widened.sample_iou - result.sample_iou).abs().max()) < 0.1  # pixels with nearly equal logits
    assert {p.dtype for p in model.parameters()} == {kind}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_teacher_outputs_match_its_weights(student, batch, kind, autocast, plain):
    torch.manual_seed(2)
    teacher = (Plain() if plain else RISModel(preset("shapes-student"))).eval().requires_grad_(False).to(kind)
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    distiller = Distiller(student, teacher, segmentation_loss, [Term(losses.logit_kd, "logits")])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = distiller.check(batch).values["logit_kd"]
    assert {logits.dtype for logits in seen} == {kind}
    exact = Distiller(student, copy.deepcopy(teacher).float(), segmentation_loss, [Term(losses.logit_kd, "logits")])
    assert value == pytest.approx(exact.check(batch).values["logit_kd"], rel=0.03)


def test_autocast_is_unchanged_for_float32_weights(student, batch):
    teacher = Plain().eval().requires_grad_(False)
    distiller = Distiller(student, teacher, segmentation_loss, [Term(losses.logit_kd, "logits")])
    with torch.autocast("cpu", torch.bfloat16):
        assert distiller.run_teacher(batch).logits.dtype == torch.bfloat16
    assert distiller.run_teacher(batch).logits.dtype == torch.float32


def test_mixed_weight_dtypes_are_unchanged(student, batch):
    teacher = Plain().eval().requires_grad_(False)
    teacher.last.bfloat16()
    teacher.last.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    distiller = Distiller(student, teacher, segmentation_loss, [Term(losses.logit_kd, "logits")])
    assert distiller.run_teacher(batch).logits.dtype == torch.bfloat16  # from the model's own conversions


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_predict_accept_float32_images(student, data, batch, kind):
    model = copy.deepcopy(student).to(kind)
    with torch.no_grad():
        expected = student(batch["image"], batch["input_ids"], batch["word_mask"])
        got = model(batch["image"], batch["input_ids"], batch["word_mask"])
        by_words = model(batch["image"], words=expected.words, word_mask=batch["word_mask"])
    scale = float(expected.logits.abs().max())
    for output in (got, by_words):
        assert output.logits.dtype == kind
        torch.testing.assert_close(output.logits.float(), expected.logits, rtol=0, atol=0.02 * scale)
    found = predict(model, data.refcoco.image(batch["image_id"][0]), batch["sentence"][0])
    assert float(abs(found.probability - got.logits[0].float().softmax(0)[1].numpy()).max()) < 0.01


def test_lavt_accepts_float32_images_and_words():
    torch.manual_seed(4)
    config = LAVTConfig(8, (1, 1, 1, 1), (1, 1, 1, 1), window=4, word_width=16, hidden=16)
    teacher = LAVT(config).eval().half()
    image, words = torch.rand(1, 3, 64, 64), torch.rand(1, 4, teacher.config.word_width)
    with torch.no_grad():
        got, expected = (model(image, words=words).logits for model in (teacher, copy.deepcopy(teacher).float()))
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_training_with_a_half_precision_teacher(student, data):
    torch.manual_seed(3)
    teacher = RISModel(preset("shapes-student")).eval().requires_grad_(False).half()
    distiller = Distiller(copy.deepcopy(student), teacher, segmentation_loss, [Term(losses.logit_kd, "logits")])
    for precision in ("fp32", "bf16"):
        options = {"precision": precision, "log_every": 1, "allow_untrained_teacher": True}
        config = TrainConfig(steps=1, batch_size=2, device="cpu", **options)
        assert train(distiller, data, config, progress=False).history[0]["terms"]["logit_kd"] > 0
