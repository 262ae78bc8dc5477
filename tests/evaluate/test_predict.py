"""Prediction for one image and one sentence: mask, score, pictures and errors."""

from __future__ import annotations

import re
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")

from PIL import Image

from fastkd.cli import main
from fastkd.cli._models import shapes_teacher
from fastkd.data import RefCOCO, ReferDataset, collate, load_tokenizer, make_shapes
from fastkd.errors import FastKDWarning
from fastkd.evaluate import predict, tokenizer_of
from fastkd.evaluate.prediction import read_image
from fastkd.models import RISModel
from fastkd.models.inputs import word_limit
from fastkd.report.overlays import as_image


@pytest.fixture(scope="module")
def teacher():
    return RISModel.from_pretrained(shapes_teacher())


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    make_shapes(root, images=20, image_size=64, seed=3)
    return RefCOCO(root, split="train")


@pytest.fixture(scope="module")
def scene(scenes):
    ref = scenes.refs[0]
    return scenes.image_path(ref.image_id), ref.sentences[0].text


def test_mask_equals_the_argmax_of_evaluation(teacher, scenes):
    """On images of the model's own size the mask is the argmax that `evaluate` scores."""
    samples = ReferDataset(scenes, load_tokenizer("shapes"), image_size=64, sentences="all")
    hits = []
    for index in range(24):
        batch = collate([samples[index]])
        with torch.no_grad():
            logits = teacher(batch["image"], batch["input_ids"], batch["word_mask"]).logits[0]
        found = predict(teacher, scenes.image_path(batch["image_id"][0]), batch["sentence"][0])
        assert np.array_equal(found.mask, logits.argmax(0).numpy())
        probability = logits.double().softmax(0)[1].numpy()
        np.testing.assert_allclose(found.probability, probability, atol=1e-5)
        assert found.score == pytest.approx(probability[found.mask].mean(), abs=1e-5)
        assert 0.5 <= found.score <= 1
        assert found.share == pytest.approx(found.mask.mean())
        truth = batch["mask"][0].numpy()
        hits.append((found.mask & truth).sum() / (found.mask | truth).sum())
    assert np.mean(hits) > 0.3  # the teacher reaches 0.55 over thousands of sentences


def test_images_of_other_sizes_and_types(teacher, scene):
    path, sentence = scene
    plain = predict(teacher, path, sentence)
    large = Image.open(path).resize((200, 150))
    found = predict(teacher, large, sentence)
    assert found.mask.shape == found.probability.shape == (150, 200)
    assert found.image.shape == (150, 200, 3)
    again = predict(teacher, np.asarray(large), sentence)
    assert np.array_equal(again.mask, found.mask)
    small = np.asarray(Image.fromarray(found.mask).resize((64, 64)))
    assert (small & plain.mask).sum() > 0.7 * (small | plain.mask).sum()
    grey = predict(teacher, Image.open(path).convert("LA"), sentence)
    assert grey.mask.shape == (64, 64)


def test_wide_pixels_are_scaled_or_rejected(tmp_path):
    """Pillow's own conversion would clip them at 255, which is all white."""
    grey = np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 34
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        got = read_image(tmp_path / name)
        assert np.array_equal(got, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))
    big_endian = Image.frombytes("I;16B", (48, 40), grey.astype(">u2").tobytes())
    assert np.array_equal(read_image(big_endian), got)
    for kind in (np.float32, np.int32):
        Image.fromarray(grey.astype(kind)).save(tmp_path / "wide.tif")
        with pytest.raises(ValueError, match=r"wide\.tif can't be read as an image .*32 bits and no defined range"):
            read_image(tmp_path / "wide.tif")


def test_exif_orientation_is_applied(teacher, scene, tmp_path):
    path, sentence = scene
    upright = Image.open(path).resize((80, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # a rotated camera: display rotated by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    found = predict(teacher, tmp_path / "turned.png", sentence)
    assert np.array_equal(found.image, np.asarray(upright))
    with Image.open(tmp_path / "turned.png") as opened:  # an image opened by Pillow gives the same
        assert np.array_equal(read_image(opened), np.asarray(upright))
        assert np.array_equal(as_image(opened), np.asarray(upright))


def test_preserves_mode_and_weights(teacher, scene):
    teacher.train()
    teacher.backbone.eval()  # frozen
    try:
        modes = [module.training for module in teacher.modules()]
        before = {k: v.clone() for k, v in teacher.state_dict().items()}
        predict(teacher, *scene)
        assert [module.training for module in teacher.modules()] == modes
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    finally:
        teacher.eval()


def test_model_may_return_the_logits_alone(teacher, scene):
    class LogitsOnly(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = teacher, teacher.config

        def forward(self, image, input_ids, word_mask):
            return self.inner(image, input_ids, word_mask).logits

    assert (predict(LogitsOnly(), *scene).mask == predict(teacher, *scene).mask).all()


def test_empty_mask_scores_0(teacher, scene, monkeypatch):
    with torch.no_grad():
        bias = teacher.decoder.classifier.bias
        old = bias.clone()
        try:
            bias[0] += 1e4
            found = predict(teacher, *scene)
        finally:
            bias.copy_(old)
    assert not found.mask.any()
    assert found.score == 0
    assert found.share == 0


def test_nan_logits_raise(teacher, scene):
    with torch.no_grad():
        bias = teacher.decoder.classifier.bias
        old = bias.clone()
        try:
            bias[0] = torch.nan
            with pytest.raises(
                FloatingPointError, match=r"NaN, which gives no mask: .*NaN or Inf \(decoder\.classifier\.bias\)"
            ):
                predict(teacher, *scene)
        finally:
            bias.copy_(old)


def test_rejects_a_tokenizer_larger_than_the_word_table(teacher, scene, tmp_path):
    pieces, rows = load_tokenizer("shapes").pieces(), teacher.text_encoder.vocab_size
    more = [f"word{number}" for number in range(rows + 1 - len(pieces))]
    (tmp_path / "vocab.txt").write_text("\n".join([*pieces, *more]) + "\n")
    with pytest.raises(ValueError, match=rf"has {rows + 1} entries, the model has {rows} word embeddings"):
        predict(teacher, scene[0], scene[1], load_tokenizer(tmp_path))


def test_long_sentence_is_truncated_with_a_warning(teacher, scene):
    sentence = "the " + "small " * 17 + "red circle"
    with pytest.warns(FastKDWarning, match=r"22 word pieces was truncated to max_words=20: .* lost 'circle'"):
        predict(teacher, scene[0], sentence)


def test_warning_of_a_very_long_sentence_is_short(teacher, scene, tmp_path, capsys, monkeypatch):
    with pytest.warns(FastKDWarning, match="2002 word pieces") as seen:
        predict(teacher, scene[0], "small " * 2000)
    assert len(str(seen[0].message)) < 500

    # On the command line it is one line, without the source line of the warning.
    show = lambda message, category, *where: sys.stderr.write(warnings.formatwarning(message, category, *where))
    plain = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        assert main(["predict", str(scene[0]), "small " * 20, "--model", "shapes", "--out", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("fastkd: warning: a sentence of 22 word pieces was truncated to max_words=20: ")
    assert warnings.formatwarning is plain


def test_position_table_limits_the_sentence(teacher):
    assert word_limit(teacher) == 20
    config = teacher.config
    try:
        config.max_words = 99
        assert word_limit(teacher) == teacher.text_encoder.max_words == 32
    finally:
        config.max_words = 20


def test_rejects_bad_arguments(teacher, scene, tmp_path):
    path, sentence = scene
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="the sentence is empty"):
            predict(teacher, path, empty)
    with pytest.raises(ValueError, match="holds no word"):
        predict(teacher, path, "\u200b")  # a zero-width space
    with pytest.raises(TypeError, match="sentence must be a string, got list"):
        predict(teacher, path, [sentence])
    with pytest.raises(TypeError, match="image must be uint8, got float32"):
        predict(teacher, np.zeros((4, 4, 3), np.float32), sentence)
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\), got shape \(4, 4\)"):
        predict(teacher, np.zeros((4, 4), np.uint8), sentence)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"cut\.jpg can't be read as an image"):
        predict(teacher, cut, sentence)
    name = teacher.config.tokenizer
    try:
        teacher.config.tokenizer = None
        with pytest.raises(ValueError, match="names no tokenizer, and word ids mean nothing"):
            predict(teacher, path, sentence)
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n")
        assert tokenizer_of(teacher, tmp_path).vocab_size == 6
    finally:
        teacher.config.tokenizer = name


# The command line


def test_command_writes_mask_and_overlay(teacher, scene, tmp_path, capsys):
    path, sentence = scene
    teacher.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["predict", str(path), sentence, "--model", str(tmp_path / "model"), "--out", str(out)]) == 0
    found = predict(teacher, path, sentence)
    mask = Image.open(out / f"{path.stem}-mask.png")
    assert np.array_equal(np.asarray(mask), found.mask * np.uint8(255))
    overlay = Image.open(out / f"{path.stem}-overlay.png")
    assert overlay.size == (384, 384)  # small images are enlarged
    assert sorted(p.name for p in out.iterdir()) == [f"{path.stem}-mask.png", f"{path.stem}-overlay.png"]
    output = capsys.readouterr().out
    assert f"score {found.score:.3f} (mean probability over the mask)" in output
    assert re.search(r"[\d.]+ % of the image", output)


def test_writes_both_pictures_or_none(scene, tmp_path, capsys):
    path, sentence = scene
    (tmp_path / f"{path.stem}-overlay.png").mkdir()
    args = ["predict", str(path), sentence, "--model", "shapes", "--out"]
    assert main([*args, str(tmp_path)]) == 2
    assert "overlay.png is a folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [f"{path.stem}-overlay.png"]

    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert main([*args, str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert f"--out: {tmp_path / 'file'} is a file" in error
        assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{tmp}/none.png", "red", "--model", "shapes"], "no image at"),
        (["{tmp}", "--model", "shapes"], "is a folder: pass at least one sentence for its images"),
        (["{tmp}", "", "--model", "shapes"], "the sentence is empty"),
        (["{tmp}", "red", "--model", "shapes"], "none of 1 records could be predicted: text.png: "),
        (["{scene}", "--model", "shapes"], "no sentence for"),
        (["{tmp}/none.jsonl", "--model", "shapes"], "no file at"),
        (["{tmp}/none.jsonl", "red", "--model", "shapes"], "names a sentence for every image: pass it without 'red'"),
        (["{scene}", "red", "--model", "shapes", "--image-root", "{tmp}"], "--image-root is the folder of the images"),
        (["{scene}", "red", "--model", "shapes", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["{tmp}/text.png", "red", "--model", "shapes"], "can't be read as an image (UnidentifiedImageError"),
        (["{scene}", "", "--model", "shapes"], "the sentence is empty"),
        (["{scene}", "red", "--model", "{tmp}/nowhere"], "no model at"),
        (["{scene}", "red", "--model", "some/folder"], "no model at some/folder"),
        (["{scene}", "red", "--model", "{tmp}"], "has no config.json"),
        (["{scene}", "red", "--model", "shapes", "--tokenizer", "{tmp}/none"], "does not exist; pass 'shapes'"),
        (["{scene}", "red", "--model", "shapes", "--tokenizer", "{tmp}/text.png"], "it is not a BERT vocabulary"),
        (["{scene}", "red", "--model", "shapes", "--device", "tpu7"], "device must be"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, message, scene, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    args = [arg.format(tmp=tmp_path, scene=scene[0]) for arg in args]
    assert main(["predict", *args, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrapped_model_predicts_the_same(teacher, scene):
    plain = predict(teacher, *scene)
    assert np.array_equal(predict(torch.optim.swa_utils.AveragedModel(teacher), *scene).mask, plain.mask)
    with pytest.raises(TypeError, match=r"model must have a config .*; Linear has none"):
        predict(torch.nn.Linear(2, 2), *scene)
