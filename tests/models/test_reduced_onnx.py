"""Exports in fp16 and int8, and exported students as models to evaluate and predict with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
onnx = pytest.importorskip("onnx", reason="needs the [export] extra")
pytest.importorskip("onnxruntime", reason="needs the [export] extra")
pytest.importorskip("onnxscript", reason="needs the [export] extra")

from fastkd.cli import main  # noqa: E402
from fastkd.data import RefCOCO, ReferDataset, collate, load_tokenizer  # noqa: E402
from fastkd.data.shapes import make_shapes  # noqa: E402
from fastkd.evaluate import evaluate, predict, tokenizer_of  # noqa: E402
from fastkd.models import OnnxModel, RISConfig, RISModel, export  # noqa: E402
from fastkd.models.export import export_onnx  # noqa: E402

TEXT = {
    "vocab_size": 160,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32], "stem_width": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, images=24, image_size=32)
    return folder


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    config = {"text": TEXT, "decoder_width": 16, "image_size": 32, "max_words": 12, "tokenizer": "shapes"}
    model = RISModel(RISConfig(backbone="resnet18", backbone_args=RESNET, out_indices=(1, 2), **config)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the average of all batches below
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):  # statistics of batch norms, which the conversions fold
            image = torch.randn(8, 3, 32, 32, generator=generator)
            model(image, torch.randint(1, 160, (8, 12), generator=generator))
    return model.eval()


def samples_of(root, student, split):
    return ReferDataset(
        RefCOCO(root, split=split),
        load_tokenizer("shapes"),
        image_size=32,
        max_words=12,
        image_mean=student.config.image_mean,
        image_std=student.config.image_std,
        sentences="all",
    )


@pytest.fixture(scope="module")
def batches(root, student):
    train = samples_of(root, student, "train")
    return [collate([train[i] for i in range(start, start + 8)]) for start in (0, 8)]


@pytest.fixture(scope="module")
def exports(student, batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reduced")
    words = load_tokenizer("shapes")
    done = {"fp32": export_onnx(student, folder / "fp32.onnx", tokenizer=words)}
    with pytest.MonkeyPatch.context() as patch:
        reuse_trace(patch, done["fp32"].onnx)
        for dtype in ("fp16", "int8"):
            path = folder / f"{dtype}.onnx"
            done[dtype] = export_onnx(student, path, tokenizer=words, dtype=dtype, calibration=batches)
    return done


def reuse_trace(patch, path):
    """Let exports of the same student read this file, since tracing takes seconds."""
    patch.setattr(export, "_trace", lambda network, example: Traced(path))


class Traced:
    def __init__(self, path):
        self.path = path

    def save(self, destination, external_data):
        shutil.copy(self.path, destination)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_is_smaller_and_close_to_fp32(exports, batches, dtype):
    exact, reduced = exports["fp32"], exports[dtype]
    assert exact.agreement is None
    assert reduced.onnx.stat().st_size < {"fp16": 0.75, "int8": 0.65}[dtype] * exact.onnx.stat().st_size
    inputs = [batches[0][name] for name in ("image", "input_ids", "word_mask")]
    expected, got = (OnnxModel(one.onnx)(*inputs).logits for one in (exact, reduced))
    error = float((got - expected).norm() / expected.norm())
    assert 0 < error < {"fp16": 2e-3, "int8": 0.1}[dtype]
    assert {"fp16": 0.98, "int8": 0.6}[dtype] < reduced.agreement <= 1
    facts = json.loads(reduced.metadata.read_text())
    assert facts["dtype"] == dtype
    assert facts["mask_iou_with_fp32"] == reduced.agreement
    assert {path.suffix for path in reduced.onnx.parent.glob(f"{dtype}.*")} == {".onnx", ".json", ".txt"}


def test_int8_weights_have_one_scale_per_output_channel(exports, student):
    graph = onnx.load(str(exports["int8"].onnx)).graph
    tensors = {one.name: one for one in graph.initializer}
    scales = {}  # weight to scales
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            weight = onnx.numpy_helper.to_array(tensors[node.input[0]])
            if weight.ndim == 4:
                scales[node.input[0]] = onnx.numpy_helper.to_array(tensors[node.input[1]])
                assert weight.dtype == "int8"
                assert abs(weight.astype(int)).max() == 64  # 255 * 127 twice would saturate without VNNI
                assert scales[node.input[0]].shape == (len(weight),)
    convolutions = [m for m in student.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(scales) == len(convolutions)


def test_files_name_no_source_lines(exports):
    for one in exports.values():
        content = one.onnx.read_bytes()
        assert b"stack_trace" not in content
        assert b"site-packages" not in content


def test_exported_student_scores_and_predicts_like_the_student(exports, student, root):
    val = samples_of(root, student, "val")
    expected, got = evaluate(student, val), evaluate(OnnxModel(exports["fp32"].onnx, threads=1), val)
    assert got.metrics == pytest.approx(expected.metrics)
    image = next(path for path in (root / "images").rglob("*.*") if path.is_file())
    masks = [predict(model, image, "the red circle").mask for model in (student, OnnxModel(exports["fp32"].onnx))]
    assert (masks[0] == masks[1]).all()


def bert(folder, **options):
    """Return a tokenizer with the pieces of the shipped one and other options."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in load_tokenizer("shapes").pieces()))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return load_tokenizer(folder)


def byte_level(folder):
    """Return a tokenizer of RoBERTa's kind: byte-level BPE, other special tokens, padding id 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet())[:140], "th", "the"]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("t", "h"), ("th", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special).save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.filterwarnings("ignore:tokenizer")  # of words that it cannot represent
@pytest.mark.parametrize("kind", ["cased", "accents", "byte-level"])
def test_words_are_those_of_the_students_tokenizer(student, exports, tmp_path, monkeypatch, kind):
    reuse_trace(monkeypatch, exports["fp32"].onnx)
    monkeypatch.setattr(export, "check_vocabulary", lambda *args: None)  # the traced file stays that of padding id 0
    options = {"cased": {"do_lower_case": False}, "accents": {"strip_accents": False}}
    words = bert(tmp_path / "w", **options[kind]) if kind in options else byte_level(tmp_path / "w")
    done = export_onnx(student, tmp_path / "out" / "a.onnx", tokenizer=words)
    assert done.tokenizer == tmp_path / "out" / "a.tokenizer.json"
    facts = json.loads(done.metadata.read_text())["tokenizer"]
    assert facts["form"].startswith("<s> pieces </s>" if kind == "byte-level" else "[CLS] pieces [SEP]")
    shutil.rmtree(tmp_path / "w")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    found = tokenizer_of(OnnxModel(moved / "a.onnx"))
    sentences = ["the Red circle", "the réd circle", "the red circle"]
    for ours, theirs in zip(found(sentences, 16), words(sentences, 16), strict=True):
        assert ours.equal(theirs)
    assert (found.pad_id, found.vocab_size) == (words.pad_id, words.vocab_size)

    (moved / "a.tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.tokenizer\.json can't be read as a tokenizer"):
        OnnxModel(moved / "a.onnx")
    (moved / "a.tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.tokenizer\.json, the student's tokenizer"):
        OnnxModel(moved / "a.onnx")


class Elsewhere(torch.Tensor):
    """A tensor that numpy cannot read before it is on the CPU, as on a GPU."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def numpy(self):
        raise TypeError("can't convert this device's tensor to numpy")


def test_takes_inputs_on_other_devices(exports, batches):
    inputs = [batches[0][name] for name in ("image", "input_ids", "word_mask")]
    model = OnnxModel(exports["fp32"].onnx)
    elsewhere = [each.as_subclass(Elsewhere) for each in inputs]
    assert model(*elsewhere).logits.equal(model(*inputs).logits)


def test_refuses_other_sizes_and_other_files(exports, tmp_path):
    model = OnnxModel(exports["fp32"].onnx)
    ids, mask = torch.ones(1, 12, dtype=torch.int64), torch.ones(1, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"image must be \(B, 3, 32, 32\), the size of the exported file"):
        model(torch.zeros(1, 3, 40, 40), ids, mask)
    path = tmp_path / "a.onnx"
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.onnx"):
        OnnxModel(path)
    path.write_bytes(b"changed")
    path.with_suffix(".json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="was not written by an export"):
        OnnxModel(path)
    path.with_suffix(".json").write_text(exports["fp32"].metadata.read_text())
    with pytest.raises(ValueError, match=r"is not the file that a\.json describes"):
        OnnxModel(path)


def test_bad_arguments_write_nothing(student, batches, tmp_path):
    with pytest.raises(ValueError, match="dtype='int8' needs calibration"):
        export_onnx(student, tmp_path / "a.onnx", dtype="int8")
    with pytest.raises(ValueError, match="dtype must be 'fp32', 'fp16', 'int8', got 'int4'"):
        export_onnx(student, tmp_path / "a.onnx", dtype="int4")
    with pytest.raises(ValueError, match=r"calibration images are \(32, 32\), the export is for \(48, 48\)"):
        export_onnx(student, tmp_path / "a.onnx", dtype="int8", calibration=batches, size=(48, 48))
    assert not list(tmp_path.iterdir())


def test_overflow_in_fp16_writes_nothing(student, exports, batches, tmp_path, monkeypatch):
    def overflow(source, target):
        network = onnx.load(str(source))
        name = next(i.name for i in network.graph.initializer if i.name.endswith("classifier.weight"))
        for each in network.graph.initializer:
            if each.name == name:
                each.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(each) * float("inf"), name))
        onnx.save(network, str(target))

    reuse_trace(monkeypatch, exports["fp32"].onnx)
    monkeypatch.setattr(export, "to_fp16", overflow)
    with pytest.raises(ArithmeticError, match="logits that are not finite"):
        export_onnx(student, tmp_path / "a.onnx", dtype="fp16", calibration=batches)
    assert not list(tmp_path.iterdir())


def test_commands(student, exports, root, tmp_path, capsys, monkeypatch):
    reuse_trace(monkeypatch, exports["fp32"].onnx)
    student.save_pretrained(tmp_path / "model")
    path = tmp_path / "student.onnx"
    args = ["export", "--model", str(tmp_path / "model"), "--onnx", str(path), "--dtype", "int8"]
    assert main(args) == 2
    assert "--dtype int8 needs --data" in capsys.readouterr().err
    data = ["--data", str(root), "--calibrate-samples", "8"]
    assert main([*args, *data, "--height", "48"]) == 2
    assert "--data gives images of the model's size, 32" in capsys.readouterr().err
    assert main([*args, *data]) == 0
    assert "int8: masks have IoU" in capsys.readouterr().out
    assert main(["evaluate", "--data", str(root), "--model", str(path)]) == 0
    assert "mIoU" in capsys.readouterr().out


def test_calibration_has_the_data_options_of_training(student, exports, root, tmp_path, capsys, monkeypatch):
    reuse_trace(monkeypatch, exports["fp32"].onnx)
    student.save_pretrained(tmp_path / "model")
    sets = tmp_path / "sets"
    shutil.copytree(root / "refcoco", sets / "refcoco")
    (sets / "refcoco" / "refs(unc).p").rename(sets / "refcoco" / "refs(google).p")
    shutil.copytree(root / "images", tmp_path / "pictures")
    images = next(path.parent for path in (tmp_path / "pictures").rglob("*.jpg"))
    args = ["export", "--model", str(tmp_path / "model"), "--onnx", str(tmp_path / "a.onnx"), "--dtype", "fp16"]
    options = ["--split-by", "google", "--image-root", str(images)]
    data = ["--data", str(sets), "--calibrate-samples", "8"]
    assert main([*args, *data, *options[2:]]) == 2  # without them, neither refs nor images are found
    assert "refs(unc).p" in capsys.readouterr().err
    assert main([*args, *data, *options[:2]]) == 2
    assert "image" in capsys.readouterr().err
    assert main([*args, *data, *options]) == 0
    assert "fp16: masks have IoU" in capsys.readouterr().out
    assert main([*args, *options]) == 2  # neither of them may be ignored
    assert "--split-by, --image-root: needs --data, the dataset that it is about" in capsys.readouterr().err
    assert main([*args[:-2], *data, *options]) == 2
    assert "fp32 needs no dataset" in capsys.readouterr().err
