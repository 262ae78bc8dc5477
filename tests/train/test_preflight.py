"""The checks before training: each mistake of the list is planted and refused, and the table states what is true."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("accelerate", reason="needs the [ris] extra")

from train_tools import Scenes, Toy, collate, read_log, run, same, toy

from fastkd import Distiller, Term
from fastkd.train import PreflightReport, TeacherCache, TrainConfig, preflight, segmentation_loss


def trained_teacher(width: int = 8) -> Toy:
    """Return a teacher whose norm has other values than a new one."""
    teacher = toy(100, width=width).eval().requires_grad_(False)
    teacher.norm.weight.uniform_(0.5, 1.5)
    return teacher


def untrained_teacher() -> Toy:
    return toy(100).eval().requires_grad_(False)


def make(loss: Any = F.mse_loss, **changes: Any) -> Distiller:
    given: dict[str, Any] = {"student": toy(), "teacher": trained_teacher(), "taps": None, **changes}
    student, teacher = given["student"], given["teacher"]
    taps = given["taps"]
    term = Term(loss, "tap" if taps else lambda logits: logits, weight=0.5, name="kd")
    return Distiller(student, teacher, segmentation_loss, [term], student_taps=taps, teacher_taps=taps)


def checked(model: nn.Module, **settings: Any) -> PreflightReport:
    config = TrainConfig(**{"batch_size": 8, "device": "cpu", "steps": 1, **settings})
    return preflight(model, Scenes(), config, collate=collate)


class Idle(Toy):
    """A model with a module that its forward does not use, so that a tap on it never fires."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.idle = nn.Identity()


class Noisy(Toy):
    """A model whose output is random."""

    def forward(self, image: Tensor, input_ids: Tensor, word_mask: Tensor | None = None) -> Tensor:
        return super().forward(image + torch.rand_like(image), input_ids)


def altered(change: Callable[[Toy], Any]) -> Toy:
    teacher = trained_teacher()
    change(teacher)
    return teacher


def random_teacher() -> Toy:
    teacher = Noisy(8).eval().requires_grad_(False)
    teacher.load_state_dict(trained_teacher().state_dict())
    return teacher


def half_loaded() -> nn.Module:
    """Return a teacher with weights in which one of two norms was missing."""
    teacher = trained_teacher()
    teacher.stem = nn.Sequential(teacher.stem, nn.BatchNorm2d(8))
    return teacher.eval().requires_grad_(False)


def idle() -> Distiller:
    torch.manual_seed(0)
    teacher = Idle(8).eval().requires_grad_(False)
    teacher.norm.weight.uniform_(0.5, 1.5)
    return make(student=Idle(4), teacher=teacher, taps={"tap": "idle"})


def summed(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum() / 100


def communicating(student: Tensor, teacher: Tensor) -> Tensor:
    value = F.mse_loss(student, teacher)
    torch.distributed.all_reduce(value)
    return value


PLANTED: list[tuple[str, Callable[[], Distiller], dict[str, Any], str]] = [
    ("no weights", lambda: make(teacher=untrained_teacher()), {}, "1 of the 1 norm.*so its weights were"),
    ("half loaded", lambda: make(teacher=half_loaded()), {}, r"1 of the 2 norm.*\(stem.1\), so some of its weights"),
    ("meta", lambda: make(teacher=trained_teacher().to("meta")), {}, r"parameters without weights \(stem.weight"),
    ("nan", lambda: make(teacher=altered(lambda t: t.head.bias.fill_(math.nan))), {}, "output holds NaN"),
    ("copy", lambda: make(student=toy(), teacher=toy().eval().requires_grad_(False)), {}, "'kd' is exactly 0"),
    ("train mode", lambda: make(teacher=altered(lambda t: t.norm.train())), {}, r"train mode \(norm\)"),
    ("requires grad", lambda: make(teacher=altered(lambda t: t.head.requires_grad_())), {}, "require a gradient"),
    ("random", lambda: make(teacher=random_teacher()), {}, "changes between two passes"),
    ("tap", idle, {}, "tap 'tap' never fired"),
    ("zero", lambda: make(lambda s, t: 0 * F.mse_loss(s, t)), {}, "'kd' is exactly 0"),
    ("not finite", lambda: make(lambda s, t: F.mse_loss(s, t) / 0), {}, "'kd' is inf"),
    ("no gradient", lambda: make(lambda s, t: F.mse_loss(s.detach(), t)), {}, "'kd' sends no gradient"),
    ("a sum", lambda: make(summed), {"accumulate": 2}, r"term 'kd' adds up samples .*accumulate=2 micro-batches"),
    ("distributed", lambda: make(communicating), {}, r"joined no others\. This is term 'kd' of the Distiller"),
]


@pytest.mark.parametrize(("build", "settings", "message"), [pytest.param(*row[1:], id=row[0]) for row in PLANTED])
def test_planted_mistake_is_refused_before_training(
    build: Callable[[], Distiller], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = build()
    before = copy.deepcopy(model.student.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(model, out=tmp_path, allow_untrained_teacher=False, **settings)
    log = read_log(tmp_path) if (tmp_path / "log.jsonl").exists() else []
    assert {line["event"] for line in log} <= {"end"}  # not "start"
    after = model.student.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_untrained_teacher_is_not_cached(tmp_path: Path) -> None:
    distiller = make(teacher=untrained_teacher())
    distiller.terms["kd"] = replace(distiller.terms["kd"], student=lambda logits: logits, teacher="logits")
    distiller.teacher.forward = lambda *args, **inputs: {"logits": Toy.forward(distiller.teacher, *args, **inputs)}
    options: dict[str, Any] = {"device": "cpu", "collate": collate, "progress": False}
    with pytest.raises(ValueError, match="1 of the 1 normalisation layers"):
        TeacherCache.build(tmp_path / "cache", distiller, Scenes(), **options)
    assert not (tmp_path / "cache").exists()


def test_teacher_and_student_must_be_two_models() -> None:
    model = toy()
    with pytest.raises(ValueError, match="teacher and student are the same object"):
        Distiller(model, model, segmentation_loss)


def test_validation_set_is_checked_too() -> None:
    validation = Scenes()
    validation.sentences = "random"
    config = TrainConfig(batch_size=8, device="cpu")
    with pytest.raises(ValueError, match="use sentences='all'"):
        preflight(make(), Scenes(), config, val_dataset=validation, collate=collate)


def test_correct_runs_are_not_refused() -> None:
    checked(make(teacher=untrained_teacher()), allow_untrained_teacher=True)
    checked(make(summed))  # one micro-batch in one process
    report = checked(make(), accumulate=4)
    assert checked(toy()).gradients.weights == {}
    assert report.gradients.shares["kd"] > 0


class TestTable:
    def test_states_norms_shares_and_reached_parts(self) -> None:
        model = make(lambda s, t: F.mse_loss(s.mean(), t.mean()))
        student = model.student
        student.unused = nn.Linear(2, 2)
        report = checked(model)
        batch = collate([Scenes()[i] for i in _first_indices()])
        output = model(batch)
        for name, loss in (("task", output.task), ("kd", output.terms["kd"])):
            gradients = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
            assert report.gradients.norms[name] == pytest.approx(norm, rel=1e-4)
            reached = dict.fromkeys(report.gradients.parts, 0)
            for (parameter, _), g in zip(student.named_parameters(), gradients, strict=True):
                reached[parameter.partition(".")[0]] += g is not None and bool(g.any())
            assert report.gradients.reached[name] == reached
        assert report.gradients.parts == {"stem": 2, "norm": 2, "words": 1, "head": 2, "unused": 2}
        text = str(report)
        assert "stem 2/2" in text
        assert "unused" not in text.splitlines()[1]
        share = 0.5 * report.gradients.norms["kd"] / report.gradients.norms["task"]
        assert f"{share:.2f}" in text.splitlines()[2]

    def test_states_memory_and_seconds(self) -> None:
        model = make(student=toy(width=16))
        report = checked(model, batch_size=16)
        parameters = sum(p.numel() for p in model.student.parameters()) * 4
        assert report.memory["student"] == report.memory["gradients"] == parameters
        assert report.memory["optimizer"] == 2 * parameters
        assert report.memory["teacher"] == sum(p.numel() for p in model.teacher.parameters()) * 4
        feature_map = 16 * 16 * 8 * 8 * 4  # batch, channels, height, width, bytes
        assert 3 * feature_map < report.memory["activations"] < 10 * feature_map
        assert list(report.seconds) == ["data", "student", "teacher", "losses", "backward"]
        assert all(seconds > 0 for seconds in report.seconds.values())
        assert "teacher" not in checked(toy()).seconds

    def test_is_the_same_for_the_log_and_a_terminal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        import io

        from rich.console import Console

        from fastkd.train import train

        config = TrainConfig(steps=1, batch_size=8, device="cpu")
        train(make(), Scenes(), config, collate=collate, out_dir=tmp_path)
        printed = capsys.readouterr().err
        start = read_log(tmp_path)[0]
        assert f"{start['gradients']['norms']['kd']:.4g}" in printed
        assert "seconds a step: " in printed
        assert start["memory"]["student"] > 0
        assert start["step_seconds"]["teacher"] > 0
        console = Console(file=io.StringIO(), width=120, force_terminal=True)
        console.print(checked(make(F.l1_loss)))
        assert "reaches" in console.file.getvalue()

    def test_changes_nothing(self, tmp_path: Path) -> None:
        with_check, without = make(student=toy(dropout=0.3)), make(student=toy(dropout=0.3))
        state = copy.deepcopy(with_check.student.state_dict())
        random = torch.get_rng_state()
        checked(with_check, accumulate=2)
        assert torch.equal(random, torch.get_rng_state())
        assert with_check.student.training
        assert with_check.timer is None
        assert all(torch.equal(with_check.student.state_dict()[name], value) for name, value in state.items())
        run(with_check, steps=2, accumulate=2)
        run(without, steps=2, accumulate=2, check=False)
        assert same(with_check.student, without.student)
        assert not list(tmp_path.iterdir())


def _first_indices() -> list[int]:
    from fastkd.train.optim import BatchOrder

    return BatchOrder(32, TrainConfig(batch_size=8)).indices(0)[0]
