"""ONNX export: the file matches torch at every batch size, holds only the student, and is not written on failure."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os

import pytest
import torch

pytest.importorskip("timm", reason="needs the [ris] extra")
onnx = pytest.importorskip("onnx", reason="needs the [export] extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the [export] extra")
pytest.importorskip("onnxscript", reason="needs the [export] extra")

from fastkd import Distiller, Term, losses  # noqa: E402
from fastkd.cli import main  # noqa: E402
from fastkd.data import load_tokenizer  # noqa: E402
from fastkd.models import RISConfig, RISModel, export  # noqa: E402
from fastkd.models.export import export_onnx  # noqa: E402
from fastkd.train import segmentation_loss  # noqa: E402

TEXT = {
    "vocab_size": 160,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
SWIN = {
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "img_size": 32,
    "strict_img_size": False,
}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24], "stem_width": 8}


def build(backbone="resnet18", args=RESNET, out_indices=(1, 2), **more) -> RISModel:
    torch.manual_seed(0)
    values = {"text": TEXT, "decoder_width": 8, "image_size": 32, "max_words": 8, "tokenizer": "shapes", **more}
    model = RISModel(RISConfig(backbone=backbone, backbone_args=args, out_indices=out_indices, **values))
    with torch.no_grad():  # non-trivial statistics and norms
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def student():
    return build(fusion_heads=2)


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    # A new folder whose name is not valid UTF-8.
    path = tmp_path_factory.mktemp("onnx") / os.fsdecode(b"mad\xe9") / "student.onnx"
    return export_onnx(student, path, size=(40, 56), tokenizer=load_tokenizer("shapes"))


def run(path, image, ids, mask):
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(
        session.run(["logits"], {"image": image.numpy(), "input_ids": ids.numpy(), "word_mask": mask.numpy()})[0]
    )


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_matches_torch_at_every_batch_size(student, exported, batch):
    """Use inputs that differ from those of the export's own comparison."""
    generator = torch.Generator().manual_seed(99 + batch)
    image = torch.randn(batch, 3, 40, 56, generator=generator)
    ids = torch.randint(1, 160, (batch, 8), generator=generator)
    mask = torch.arange(8) < torch.arange(1, batch + 1)[:, None]
    with torch.no_grad():
        expected = student(image, ids, mask).logits
    got = run(exported.onnx, image, ids, mask)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert set(exported.differences) == {1, 3}
    assert 0 <= max(exported.differences.values()) <= 1e-5


def test_output_depends_on_the_sentence_but_not_on_padding(exported):
    generator = torch.Generator().manual_seed(5)
    image, mask = torch.randn(1, 3, 40, 56, generator=generator), torch.tensor([[True] * 3 + [False] * 5])
    ids = torch.tensor([[1, 7, 9, 0, 0, 0, 0, 0]])
    plain = run(exported.onnx, image, ids, mask)
    padded = run(exported.onnx, image, torch.tensor([[1, 7, 9, 4, 4, 4, 4, 4]]), mask)
    other = run(exported.onnx, image, torch.tensor([[1, 50, 9, 0, 0, 0, 0, 0]]), mask)
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(other, plain, rtol=1e-3)


def test_metadata_describes_inputs_and_outputs(student, exported):
    facts = json.loads(exported.metadata.read_text())
    assert exported.metadata.name == "student.json"
    assert facts["inputs"]["image"] == {"shape": ["batch", 3, 40, 56], "dtype": "float32"}
    assert facts["inputs"]["input_ids"]["shape"] == ["batch", 8]
    assert facts["image"]["mean"] == [0.485, 0.456, 0.406]
    assert facts["tokenizer"]["name"] == "shapes"
    assert facts["tokenizer"]["max_words"] == 8
    assert RISConfig.from_dict(facts["config"]) == student.config
    assert facts["sha256"] == hashlib.sha256(exported.onnx.read_bytes()).hexdigest()
    assert facts["parameters"] == exported.parameters
    assert set(facts["difference_from_torch"]["by_batch_size"]) == {"1", "3"}
    pieces = exported.vocabulary.read_text().splitlines()
    ids, mask = load_tokenizer("shapes")(["the red circle"], 8)
    assert [pieces[i] for i in ids[0][mask[0]]] == ["[CLS]", "the", "red", "circle", "[SEP]"]
    assert sorted(p.name for p in exported.onnx.parent.iterdir()) == [
        "student.json",
        "student.onnx",
        "student.vocab.txt",
    ]
    graph = onnx.load_from_string(exported.onnx.read_bytes()).graph
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert shapes["image"][1:] == [3, 40, 56]
    assert isinstance(shapes["image"][0], str)
    onnx.checker.check_model(exported.onnx.read_bytes())


def test_parameters_equal_those_of_an_undistilled_student(student, exported):
    graph = onnx.load_from_string(exported.onnx.read_bytes()).graph
    buffers = {name for name, _ in student.named_buffers()}
    sizes = {i.name.removeprefix("model."): math.prod(i.dims) for i in graph.initializer}
    fresh = RISModel(student.config)
    assert sum(sizes[name] for name, _ in fresh.named_parameters()) == exported.parameters
    assert exported.parameters == fresh.parameter_count()["total"]
    other = sizes.keys() - {n for n, _ in fresh.named_parameters()} - buffers
    assert sum(sizes[name] for name in other) < 64  # constants of the traced code


def test_a_distilled_student_exports_no_extra_parameters(tmp_path):
    """Aligners train in the Distiller and are neither saved nor exported."""
    student, teacher = build(), build(args={**RESNET, "channels": [16, 24, 16, 24]})
    before = student.parameter_count()
    aligned = losses.ChannelKD(student_channels=16, teacher_channels=24)
    assert sum(p.numel() for p in aligned.parameters()) > 0
    teacher.requires_grad_(False)
    distiller = Distiller(student.train(), teacher, segmentation_loss, [Term(aligned, "stages.1")])
    optimiser = torch.optim.SGD(distiller.parameters(), lr=1e-2)
    batch = {
        "image": torch.randn(2, 3, 32, 32),
        "input_ids": torch.randint(1, 160, (2, 8)),
        "mask": torch.rand(2, 32, 32) > 0.5,
    }
    old = [p.clone() for p in aligned.parameters()]
    distiller(batch).loss.backward()
    optimiser.step()
    assert any(not torch.equal(a, b) for a, b in zip(old, aligned.parameters(), strict=True))
    assert distiller.student.parameter_count() == before
    assert distiller.student.state_dict().keys() == build().state_dict().keys()
    assert sum(p.numel() for p in distiller.parameters()) == before["total"] + sum(p.numel() for p in old)
    distiller.student.save_pretrained(tmp_path / "student")
    done = export_onnx(RISModel.from_pretrained(tmp_path / "student"), tmp_path / "student.onnx")
    assert done.parameters == before["total"]
    assert done.vocabulary is None

    student.aligner = torch.nn.Conv2d(16, 24, 1)  # must never happen
    with pytest.raises(ValueError, match="Aligners belong to the Distiller"):
        export_onnx(student, tmp_path / "more.onnx")
    assert not (tmp_path / "more.onnx").exists()


def test_exports_swin_at_odd_sizes(tmp_path):
    model = build("swin_tiny_patch4_window7_224", SWIN, (0, 1))
    done = export_onnx(model, tmp_path / "model.onnx", size=(33, 47), batch_sizes=(2, 5))
    assert set(done.differences) == {2, 5}
    assert max(done.differences.values()) < 1e-5
    assert done.parameters == model.parameter_count()["total"]


class Program:
    """Stand-in for a traced program that holds the fixture's file."""

    def __init__(self, path, edit=lambda proto: None):
        self.proto = onnx.load(str(path))
        edit(self.proto)

    def save(self, destination, external_data):
        assert external_data is False
        onnx.save(self.proto, destination)


def assert_rejected(student, exported, monkeypatch, folder, kind, message, edit=lambda proto: None, **options):
    monkeypatch.setattr(export, "_trace", lambda network, example: Program(exported.onnx, edit))
    folder.mkdir()
    (folder / "student.onnx").write_bytes(b"an earlier file")
    with pytest.raises(kind, match=message):
        export_onnx(student, folder / "student.onnx", size=(40, 56), **options)
    assert [p.name for p in folder.iterdir()] == ["student.onnx"]
    assert (folder / "student.onnx").read_bytes() == b"an earlier file"


def test_a_difference_above_the_tolerance_writes_nothing(student, exported, monkeypatch, tmp_path):
    changed = copy.deepcopy(student)
    with torch.no_grad():
        changed.fusions[0].attention.f_key.weight.mul_(1.05)
    assert_rejected(changed, exported, monkeypatch, tmp_path / "a", ArithmeticError, r"more than tolerance=0\.0001")
    assert_rejected(student, exported, monkeypatch, tmp_path / "b", ArithmeticError, "more than", tolerance=1e-12)
    with torch.no_grad():
        changed.decoder.classifier.bias[0] = torch.nan
    assert_rejected(changed, exported, monkeypatch, tmp_path / "c", ArithmeticError, "differ by nan")


def test_detects_added_parameters(student, exported, monkeypatch, tmp_path):
    def grow(proto):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(torch.zeros(7).numpy(), "model.aligner.weight"))

    total = exported.parameters
    assert_rejected(
        student, exported, monkeypatch, tmp_path / "a", RuntimeError, f"the file has {total + 7} parameters", grow
    )


def test_reports_a_failed_trace_in_one_line(student, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("no such operator\nand many more lines")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(RuntimeError, match=r"torch cannot trace this model: no such operator$"):
        export_onnx(student, tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


def test_keeps_the_training_mode(student, exported, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_trace", lambda network, example: Program(exported.onnx))
    model = copy.deepcopy(student).train()
    model.backbone.eval()  # frozen
    modes = [module.training for module in model.modules()]
    export_onnx(model, tmp_path / "student.onnx", size=(40, 56))
    assert [module.training for module in model.modules()] == modes


def test_rejects_bad_arguments(student, tmp_path):
    pieces = load_tokenizer("shapes")
    cases = [
        (ValueError, r"must end in \.onnx", {"path": tmp_path / "student"}),
        (ValueError, "tolerance must be above 0", {"tolerance": 0.0}),
        (ValueError, "tolerance must be above 0", {"tolerance": math.nan}),
        (ValueError, "two different sizes", {"batch_sizes": (2, 2)}),
        (ValueError, "two different sizes", {"batch_sizes": (0, 2)}),
        (ValueError, r"size must be \(height, width\)", {"size": (0, 32)}),
        (TypeError, "distiller.student", {"model": torch.nn.Linear(1, 1)}),
        (
            ValueError,
            "the model has 40 word embeddings: use",
            {"model": build(text={**TEXT, "vocab_size": 40}), "tokenizer": pieces},
        ),
        (ValueError, r"call model\.float\(\)", {"model": copy.deepcopy(student).half()}),
    ]
    for kind, message, change in cases:
        with pytest.raises(kind, match=message):
            export_onnx(**{"model": student, "path": tmp_path / "student.onnx", **change})
    strict = build("swin_tiny_patch4_window7_224", {**SWIN, "strict_img_size": True}, (0, 1))
    (tmp_path / "config.json").write_text('{"backbone": "resnet18"}')
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(
        ValueError, match=r"config\.onnx would replace .*config\.json, which was not written by an export"
    ):
        export_onnx(student, tmp_path / "config.onnx")
    with pytest.raises(IsADirectoryError, match=r"taken\.json is a folder"):
        export_onnx(student, tmp_path / "taken.onnx")  # or the network would be written without its metadata
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "taken.json"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "taken.json").rmdir()
    with pytest.raises(ValueError, match="does not support an image of"):
        export_onnx(strict, tmp_path / "student.onnx", size=(33, 32))
    assert not list(tmp_path.iterdir())


def test_names_a_missing_package(student, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs the package 'onnxruntime': pip install 'fastkd\[export\]'"):
        export_onnx(student, tmp_path / "student.onnx")


# The command


def test_command(student, exported, tmp_path, capsys, monkeypatch):
    student.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(export, "_trace", lambda network, example: Program(exported.onnx))
    path = tmp_path / "out" / "student.onnx"
    args = ["export", "--model", str(tmp_path / "model"), "--height", "40", "--width", "56"]
    assert main([*args, "--onnx", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"{student.parameter_count()['total']:,} parameters" in printed
    assert "batch of 3: differs from torch by" in printed
    assert {p.name for p in path.parent.iterdir()} == {"student.onnx", "student.json", "student.vocab.txt"}
    assert main([*args, "--onnx", str(path)]) == 0  # replaces the earlier file
    assert main([*args, "--onnx", str(path / "below.onnx")]) == 2
    assert f"--onnx: {path} is a file" in capsys.readouterr().err

    rejected = tmp_path / "rejected.onnx"
    assert main([*args, "--onnx", str(rejected), "--tolerance", "1e-15"]) == 2
    assert "more than tolerance=1e-15" in capsys.readouterr().err
    assert main(["export", "--model", str(tmp_path / "nowhere"), "--onnx", str(rejected)]) == 2
    assert "no model at" in capsys.readouterr().err
    assert main([*args, "--onnx", str(tmp_path / "rejected.bin")]) == 2
    assert "must end in .onnx" in capsys.readouterr().err
    assert not list(tmp_path.glob("rejected*"))


def test_exports_a_compiled_student(student, exported, tmp_path):
    compiled = copy.deepcopy(student)
    compiled.decoder = torch.compile(compiled.decoder, backend="eager")
    again = export_onnx(torch.compile(compiled), tmp_path / "student.onnx", size=(40, 56))
    assert again.parameters == exported.parameters
    names = [[i.name for i in onnx.load(str(one.onnx)).graph.initializer] for one in (exported, again)]
    assert names[0] == names[1]
    assert "_orig_mod" in dict(compiled.decoder.named_children())
