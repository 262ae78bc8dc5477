"""Training in two processes: parameters without a gradient, and fewer samples than processes."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from teacher_cache_tools import built_and_trained
from train_tools import Scenes, collate, distiller, run, toy, two_processes

from fastkd import Distiller, Term, losses
from fastkd.cli import main as fastkd
from fastkd.data import make_shapes
from fastkd.distill import Schedule
from fastkd.errors import FastKDWarning
from fastkd.evaluate import evaluate
from fastkd.train import segmentation_loss
from fastkd.train.split import without_gradient


def test_without_gradient_names_parameters() -> None:
    model = distiller()
    model.student.spare = torch.compile(nn.Linear(2, 2), backend="eager")
    batch = collate([Scenes()[i] for i in range(4)])
    assert without_gradient(model, batch) == (["student.spare.weight", "student.spare.bias"], [])
    assert all(p.grad is None for p in model.parameters())
    model.student.spare.requires_grad_(False)
    assert without_gradient(model, batch) == ([], [])


class Sometimes(nn.Module):
    """Model with a parameter that only its first two forwards use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.extra, self.calls = toy(), nn.Parameter(torch.zeros(2)), 0

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        self.calls += 1
        logits = self.inner(image, input_ids)
        return logits + self.extra[:, None, None] if self.calls < 3 else logits


def scheduled() -> Distiller:
    """Return a distiller whose terms are computed at steps 1 and 2 only.

    They train an aligner, a pair of temperatures and a head of the student.
    """
    aligned = distiller(loss=losses.ChannelDistributionKD(student_channels=2, teacher_channels=4))
    aligned.student.spare = nn.Conv2d(2, 2, 1)
    spare = aligned.student.spare
    pair = (nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(2.0)))
    headed = Term(lambda s, t, **options: losses.logit_kd(spare(s), t, **options), str, kwargs={"temperature": pair})
    wide = replace(aligned.terms["kd"], teacher=lambda logits: torch.cat([logits, logits], 1))
    terms = [wide, replace(headed, student=lambda logits: logits, name="headed")]
    terms = [replace(term, schedule=Schedule(start=1, stop=3)) for term in terms]
    return Distiller(aligned.student, aligned.teacher, segmentation_loss, terms)


def summed(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum() / 100


def pooled() -> Distiller:
    """Return a distiller whose term relates the samples of all processes."""
    return distiller(loss=losses.PixelRelationKD(cross_image=True, temperature=0.5, group="world"))


def test_two_processes(tmp_path: Path) -> None:
    """Run all checks that need two processes in one start, which takes seconds."""
    program = """
    import pathlib, torch, warnings
    sys.path.insert(0, os.path.dirname(t.__file__) + "/../train")
    from test_processes import Sometimes, pooled, scheduled, summed
    from fastkd.evaluate import evaluate
    # One write, with its own line even where the other process has printed half of one.
    write = lambda line: os.write(1, (chr(10) + line + chr(10)).encode())
    from fastkd.cli import main as fastkd
    command = ["distill", "--data", SHAPES, "--out", FOLDER, "--batch-size", "2", "--preflight-only"]
    write(f"status {rank} {fastkd(command)} {fastkd(['cache', '--data', SHAPES, '--out', FOLDER + '-of-command'])}")
    command = ["evaluate", "--data", SHAPES, "--model", "shapes", "--batch-size", "1", "--out-samples", SAMPLES]
    write(f"evaluated {rank} {fastkd(command)}")
    model = t.toy()
    model.spare = torch.nn.Linear(2, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = t.run(model, steps=4, accumulate=2, log_every=1, gradients_every=2)
    named = [str(w.message) for w in caught if "spare" in str(w.message)]
    score = evaluate(model, t.Scenes(1), collate=t.collate, device="cpu")
    write(f"trained {rank} {result.history[-1]['loss']:.5f} {named}")
    try:
        t.run(t.distiller(loss=summed))
    except ValueError as error:
        write(f"refused {rank} {error}")
    terms = [line["terms"]["kd"] for line in t.run(pooled(), steps=4, log_every=1).history]
    write(f"pooled {rank} {' '.join(f'{value:.7f}' for value in terms)}")
    write(f"scored {rank} {score.sentences} {score.resolution} {score.miou:.6f} {len(score.sample_iou)}")
    try:
        t.run(Sometimes(), steps=4, check=False)
    except RuntimeError as error:
        write(f"raised {rank} {error}")
    steps = t.run(Sometimes(), steps=4, check=False, find_unused_parameters=True).steps
    write(f"completed {rank} {steps}")
    aligned = scheduled()  # its aligner gets no gradient at steps 0 and 3
    write(f"scheduled {rank} {t.run(aligned, steps=4, log_every=1).history[-1]['task']:.5f}")
    from teacher_cache_tools import built_and_trained
    write(f"cached {rank} {built_and_trained(pathlib.Path(FOLDER))}")
"""
    make_shapes(tmp_path / "shapes", images=20, image_size=64)
    places = {"FOLDER": repr(str(tmp_path / "both")), "SHAPES": repr(str(tmp_path / "shapes"))}
    places["SAMPLES"] = repr(str(tmp_path / "samples.jsonl"))
    out = two_processes(re.sub("|".join(places), lambda name: places[name[0]], program))
    lines = {tuple(line.split(" ", 2)[:2]): line.split(" ", 2)[2] for line in out.splitlines() if line.count(" ") > 1}
    model = toy()
    model.spare = nn.Linear(2, 2)
    with pytest.warns(FastKDWarning, match="2 parameters get no gradient on the first batch"):
        alone = run(model, steps=4, log_every=1)
    assert (lines["status", "0"], lines["status", "1"]) == ("0 0", "0 0")
    assert (lines["evaluated", "0"], lines["evaluated", "1"], out.count("true masks: union]")) == ("0", "0", 1)
    command = ["evaluate", "--data", str(tmp_path / "shapes"), "--model", "shapes", "--batch-size", "1"]
    assert fastkd([*command, "--device", "cpu", "--out-samples", str(tmp_path / "alone.jsonl")]) == 0
    assert (tmp_path / "samples.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert [out.count(text) for text in ("weights: first_order", "seconds a step", "teacher cache: ")] == [1, 1, 1]
    warning = "2 parameters get no gradient on the first batch, so they do not train: student.spare.weight, student"
    for rank in "01":
        loss, _, named = lines["trained", rank].partition(" ")
        assert float(loss) == pytest.approx(alone.history[-1]["loss"], rel=1e-4)
        assert (warning in named) is (rank == "0")
        assert "1 parameters got no gradient at step 2, although" in lines["raised", rank]
        assert "student.extra" in lines["raised", rank]
        assert "term 'kd' adds up samples" in lines["refused", rank]
        assert "accumulate=1 micro-batches and 2 processes" in lines["refused", rank]
        assert lines["completed", rank] == "4"
    planned = scheduled()
    assert len(without_gradient(planned, collate([Scenes()[i] for i in range(4)]))[1]) == 1 + 2 + 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastKDWarning)
        task = run(planned, steps=4, log_every=1).history[-1]["task"]
    assert [float(lines["scheduled", rank]) for rank in "01"] == pytest.approx([task, task], rel=1e-3)
    pooled_alone = [line["terms"]["kd"] for line in run(pooled(), steps=4, log_every=1).history]
    for rank in "01":
        assert list(map(float, lines["pooled", rank].split())) == pytest.approx(pooled_alone, rel=1e-4)
    score = evaluate(model, Scenes(1), collate=collate)
    for rank in "01":  # fewer samples than processes
        sentences, height, width, miou, samples = lines["scored", rank].split()
        assert (sentences, height, width, samples) == ("1", "(8,", "8)", "1")
        assert float(miou) == pytest.approx(score.miou, abs=1.0)
    norm_alone = float(built_and_trained(tmp_path / "alone").split()[1])
    for rank, shards in (("0", "00000,00002"), ("1", "00001,00003")):  # disjoint, and equal to those of one process
        written, norm = lines["cached", rank].split()
        assert written == shards
        assert float(norm) == pytest.approx(norm_alone, rel=1e-6)
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "both" / file.name).read_bytes()
