"""Terms: selected tensors, keyword arguments, names, and errors that name the term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distiller_tools import make_batch, make_distiller, mse
from torch import Tensor, nn

import fastkd
from fastkd import Term
from fastkd.distill.selectors import follow, select


@pytest.fixture
def batch() -> dict[str, Any]:
    return make_batch()


def test_selects_by_path_callable_tuple_and_slice(batch: dict[str, Any]) -> None:
    def pair(s0: Tensor, s1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        return mse(s0, t0) + 10 * mse(s1, t1)

    distiller = make_distiller(
        Term(mse, "stages.1", "stages.-1", name="path"),
        Term(mse, lambda out: out.stages[1], name="callable"),
        Term(pair, ("logits", "features"), name="tuple"),
        Term(mse, "stages.*", name="each"),
        Term(mse, "stages.1:", name="slice"),
    ).eval()
    out = distiller(batch)
    s, t = out.student, out.teacher
    expected = {
        "path": mse(s.stages[1], t.stages[1]),
        "callable": mse(s.stages[1], t.stages[1]),
        "tuple": mse(s.logits, t.logits) + 10 * mse(s.features, t.features),
        "each": (mse(s.stages[0], t.stages[0]) + mse(s.stages[1], t.stages[1])) / 2,
        "slice": mse(s.stages[1], t.stages[1]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out.terms[name], value)


def test_kwargs_from_batch_student_and_teacher(batch: dict[str, Any]) -> None:
    seen = {}

    def spy(student: Tensor, teacher: Tensor, **kwargs: Any) -> Tensor:
        seen.update(kwargs)
        return mse(student, teacher)

    kwargs = {
        "mask": "batch.word_mask",
        "own": "student.logits",
        "theirs": "teacher.stages.1",
        "mode": "sca.led",
        "t": 2,
    }
    out = make_distiller(Term(spy, "logits", kwargs=kwargs))(batch)
    assert seen["mask"] is batch["word_mask"]
    assert seen["own"] is out.student.logits
    assert seen["theirs"] is out.teacher.stages[1]
    assert (seen["mode"], seen["t"]) == ("sca.led", 2)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("feature", "term 'mse', student: path 'feature': Out has no 'feature'. Did you mean 'features'"),
        ("stages.5", "term 'mse', student: path 'stages.5' asks for item 5 of list at 'stages', which has 2"),
        ("nothing", "term 'mse', student: path 'nothing' leads to None"),
        ("logits.0", "is a tensor: end the path there"),
        ("stages.a:b", "neither a number, '\\*' nor a slice"),
        (("stages.*", "logits"), "lists of tensors must have the same length"),
    ],
)
def test_rejects_a_bad_selector(batch: dict[str, Any], selector: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_distiller(Term(mse, selector))(batch)


def test_selector_errors_name_term_and_side(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^term 'mse', teacher: path 'features\.x'"):
        make_distiller(Term(mse, "features", "features.x"))(batch)
    with pytest.raises(ValueError, match=r"^term 'mse', kwargs: path 'mesk'"):
        make_distiller(Term(mse, "features", kwargs={"mask": "batch.mesk"}))(batch)
    with pytest.raises(IndexError) as caught:
        make_distiller(Term(mse, "features", lambda out: out.stages[7]))(batch)
    assert caught.value.__notes__ == ["This is term 'mse' of the Distiller, selecting for teacher."]
    with pytest.raises(ValueError, match="has 0 items: this network does not compute it"):
        follow({"stages": []}, "stages.-1")


def test_rejects_bad_terms() -> None:
    with pytest.raises(ValueError, match="two terms are named 'mse'"):
        make_distiller(Term(mse, "logits"), Term(mse, "features"))
    with pytest.raises(ValueError, match="weight must be a finite number >= 0, got nan"):
        Term(mse, "logits", weight=float("nan"))
    with pytest.raises(ValueError, match="got -1"):
        Term(mse, "logits", weight=-1)
    with pytest.raises(ValueError, match="'task'"):
        Term(mse, "logits", name="task")
    with pytest.raises(TypeError, match="loss must be a function or a module"):
        Term("mse", "logits")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="student must be a path"):
        Term(mse, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no module 'stam'.* Did you mean 'stem'"):
        make_distiller(student_taps={"a": "stam"})


def test_rejects_arguments_of_the_wrong_type() -> None:
    with pytest.raises(ValueError, match="weight must be a finite number >= 0, got '1'"):
        Term(mse, "features", weight="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kwargs must be a dict"):
        Term(mse, "features", kwargs=[1])  # type: ignore[arg-type]


def test_error_inside_a_loss_names_the_term(batch: dict[str, Any]) -> None:
    loss = fastkd.losses.channel_distribution_kd
    distiller = make_distiller(Term(loss, "features", name="fine"), Term(loss, "features", "logits", name="wide"))
    with pytest.raises(ValueError, match="student and teacher: shapes differ") as caught:
        distiller(batch)
    assert caught.value.__notes__ == ["This is term 'wide' of the Distiller."]


def test_follow_mappings_and_namedtuples() -> None:
    value = {"a.b": 1, "a": [{"c": torch.ones(1)}]}
    assert torch.equal(follow(value, "a.0.c"), torch.ones(1))
    assert select("tap.0", None, {"tap": [5]}) == (5,)
    with pytest.raises(ValueError, match="Available: 'c'"):
        follow(value, "a.0.zzz")


def test_default_names() -> None:
    class ChannelThingKD(nn.Module):
        pass

    assert Term(ChannelThingKD(), "x").name == "channel_thing_kd"
    assert Term(fastkd.losses.ChannelDistributionKD(), "x").name == "channel_distribution_kd"
    assert Term(lambda s, t: s, "x").name == "lambda"
