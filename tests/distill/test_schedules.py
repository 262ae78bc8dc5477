"""Weights that follow a schedule: values, what is computed at a step, checks, compilation."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from distiller_tools import Out, Toy, make_batch, make_distiller, mse
from torch import Tensor

from fastkd import Term
from fastkd.distill import Schedule
from fastkd.distill.schedules import check_schedules


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule(), {0: 1.0, 10**9: 1.0}),
        (Schedule(start=3, stop=5), {0: 0.0, 2: 0.0, 3: 1.0, 4: 1.0, 5: 0.0, 9: 0.0}),
        (Schedule("linear", start=10, stop=20), {9: 0.0, 10: 1.0, 12: 0.8, 19: 0.1, 20: 0.0}),
        (Schedule("linear", stop=4, initial=0, final=2), {0: 0.0, 1: 0.5, 3: 1.5, 4: 2.0, 400: 2.0}),
        (Schedule("cosine", stop=8, final=0.5), {0: 1.0, 2: 0.75 + 0.25 * math.sqrt(0.5), 4: 0.75, 8: 0.5}),
        (Schedule(stop=2, initial=0.25, final=1), {1: 0.25, 2: 1.0}),
    ],
)
def test_factor(schedule: Schedule, factors: dict[int, float]) -> None:
    assert {step: schedule.factor(step) for step in factors} == pytest.approx(factors, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cosin"}, "schedule must be 'constant', 'linear' or 'cosine', got 'cosin'"),
        ({"kind": "linear"}, "schedule 'linear' needs stop"),
        ({"start": 5, "stop": 5}, "stop must be after start, got start=5 and stop=5"),
        ({"start": -1}, "start must be a step, an integer >= 0, got -1"),
        ({"stop": 2.5}, "stop must be a step, an integer >= 0, got 2.5"),
        ({"final": math.nan}, "final must be a finite number >= 0, got nan"),
        ({"initial": True}, "initial must be a finite number >= 0, got True"),
    ],
)
def test_rejects_schedules_that_are_not_defined(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


class Counting(Toy):
    """Teacher that counts its forwards."""

    calls = 0

    def forward(self, image: Tensor, word_mask: Tensor | None = None) -> Out:
        self.calls += 1
        return super().forward(image, word_mask)


def two_stages() -> Any:
    """Return a distiller whose terms stop at step 4, where the task begins."""
    teacher = Counting().eval().requires_grad_(False)
    terms = [
        Term(mse, "features", weight=0.5, name="a", schedule=Schedule("linear", stop=4)),
        Term(mse, "logits", weight=3.0, name="b", schedule=Schedule(start=2, stop=4)),
    ]
    return make_distiller(*terms, teacher=teacher, task_schedule=Schedule(start=4))


@pytest.mark.parametrize(
    ("step", "weights", "forwards"), [(1, (0.0, 0.375, 0.0), 1), (3, (0.0, 0.125, 3.0), 1), (4, (1.0, 0.0, 0.0), 0)]
)
def test_loss_at_a_step(step: int, weights: tuple[float, ...], forwards: int) -> None:
    distiller, batch = two_stages(), make_batch()
    distiller.set_step(step)
    out = distiller(batch)
    assert distiller.teacher.calls == forwards
    assert tuple(distiller.weights_at(step).values()) == weights
    values = (out.task, *out.terms.values())
    assert out.loss.item() == pytest.approx(sum(w * v.item() for w, v in zip(weights, values, strict=True)), rel=1e-6)
    assert [value.item() == 0 for value in out.terms.values()] == [weight == 0 for weight in weights[1:]]


def test_schedule_without_a_step_is_an_error() -> None:
    distiller = two_stages()
    with pytest.raises(ValueError, match=r"'task' has a schedule: call distiller.set_step\(step\)"):
        distiller(make_batch())
    for step in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="step: expected an integer >= 0, counted from 0, got"):
            distiller.set_step(step)  # type: ignore[arg-type]


def test_checks_and_balance_measure_every_term_at_any_step() -> None:
    distiller, batch = two_stages(), make_batch()
    distiller.set_step(7)
    assert list(distiller.check(batch).values) == ["task", "a", "b"]
    distiller.balance(batch, {"b": 0.25})
    assert distiller.gradient_shares(batch)["b"] == pytest.approx(0.25)
    assert list(distiller.gradient_report(batch, step=1).values) == ["task", "a"]
    before = distiller.teacher.calls
    assert float(distiller(batch).terms["b"]) == 0  # still at step 7
    assert distiller.teacher.calls == before


def test_steps_do_not_recompile_one_by_one() -> None:
    term = Term(mse, "features", weight=0.5, schedule=Schedule("cosine", stop=12))
    distiller, batch, graphs = make_distiller(term), make_batch(), []
    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(distiller, backend=backend)
    for step in range(12):
        distiller.set_step(step)
        expected, loss = distiller(batch).loss.item(), compiled(batch).loss.item()
        assert loss == pytest.approx(expected, rel=1e-5)
    assert len(graphs) <= 3


def test_schedule_of_another_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="Term 'mse': schedule must be a Schedule or None, got 'linear'"):
        Term(mse, "features", schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="task_schedule must be a Schedule or None, got 'linear'"):
        make_distiller(task_schedule="linear")


def test_misspelt_tap_is_suggested() -> None:
    distiller = make_distiller(Term(mse, "midle"), student_taps={"middle": "stem"}, teacher_taps={"middle": "stem"})
    with pytest.raises(ValueError, match=r"term 'mse', student: path 'midle': Out has no 'midle'. .*'middle'"):
        distiller(make_batch())


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({"task": Schedule(start=6), "kd": Schedule(stop=4)}, "every term are 0 at steps 4 to 5"),
        ({"task": Schedule(start=2)}, "are 0 at steps 0 to 1"),
        ({"task": Schedule(stop=8), "kd": Schedule("linear", stop=8)}, "are 0 at steps 8 to 9"),
        ({"task": Schedule(start=4), "kd": Schedule("linear", initial=0, final=1, stop=4)}, None),
        ({"task": Schedule(stop=5), "kd": Schedule(start=5)}, None),
        ({"kd": Schedule(start=10)}, None),
    ],
)
def test_steps_at_which_nothing_trains_are_refused(schedules: dict[str, Schedule], message: str | None) -> None:
    weights = {"task": 1.0, "kd": 0.0 if schedules.keys() == {"task"} else 2.0}

    def weights_at(step: int) -> dict[str, float]:
        return {name: weight * schedules.get(name, Schedule()).factor(step) for name, weight in weights.items()}

    with pytest.raises(ValueError, match=message) if message else nullcontext():
        unused = check_schedules(schedules, weights_at, 10)
        assert unused == [name for name, schedule in schedules.items() if schedule.start == 10]
