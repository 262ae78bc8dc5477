"""The distiller: what trains, what doesn't, what is compared, and what is refused before training."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd import Distiller, Term
from fastkd.distill.selectors import follow, select


@dataclass
class Out:
    logits: Tensor
    features: Tensor
    stages: list[Tensor]
    nothing: Tensor | None = None


class Toy(nn.Module):
    def __init__(self, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.idle = nn.Identity()
        self.head = nn.Conv2d(width, 2, 1)
        self.dropout = dropout

    def forward(self, image: Tensor, word_mask: Tensor | None = None) -> Out:
        features = torch.relu(self.norm(self.stem(image)))
        features = F.dropout(features, self.dropout, training=self.dropout > 0)
        return Out(self.head(features), features, [features, features.mean((2, 3))])


def task_loss(output: Out, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(output.logits, batch["mask"].long())


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)


@pytest.fixture
def batch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    image = torch.randn(4, 3, 6, 6, generator=g)
    return {
        "image": image,
        "word_mask": torch.ones(4, 5, dtype=torch.bool),
        "mask": image[:, 0] > 0,
        "sentence": ["the left one"] * 4,
    }


def make(*terms: Term, student: nn.Module | None = None, teacher: nn.Module | None = None, **kwargs: Any) -> Distiller:
    torch.manual_seed(0)
    student = student or Toy()
    teacher = teacher or Toy().eval().requires_grad_(False)
    return Distiller(student, teacher, task_loss, terms or [Term(mse, "features")], **kwargs)


class TestModuleTree:
    def test_teacher_is_outside(self) -> None:
        teacher = Toy(width=8).eval().requires_grad_(False)
        distiller = make(Term(mse, "logits"), teacher=teacher)
        assert distiller.teacher is teacher
        assert all(name.startswith("student.") for name in distiller.state_dict())
        theirs = {id(p) for p in teacher.parameters()}
        assert not theirs & {id(p) for p in distiller.parameters()}
        distiller.train()
        assert not any(m.training for m in teacher.modules())
        distiller.zero_grad()
        distiller.requires_grad_(True)
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_to_moves_the_teacher(self) -> None:
        distiller = make()
        distiller.to(torch.float64)
        assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float64}
        distiller.to("meta")
        assert all(p.is_meta for p in distiller.teacher.parameters())

    def test_aligner_trains_but_is_not_the_students(self, batch: dict[str, Any]) -> None:
        class Aligned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.aligner = nn.Conv2d(4, 8, 1)

            def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
                return mse(self.aligner(student), teacher)

        student = Toy()
        before = set(student.state_dict())
        teacher = Toy(8).eval().requires_grad_(False)
        distiller = make(Term(Aligned(), "features", name="aligned"), student=student, teacher=teacher)
        assert set(student.state_dict()) == before
        names = [name for name, _ in distiller.named_parameters() if not name.startswith("student.")]
        assert names == ["term_modules.aligned.aligner.weight", "term_modules.aligned.aligner.bias"]
        distiller(batch).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.term_modules.parameters())
        assert all(p.grad is None for p in teacher.parameters())


class TestForward:
    def test_loss_is_task_plus_weighted_terms(self, batch: dict[str, Any]) -> None:
        distiller = make(Term(mse, "features", weight=0.5), Term(F.l1_loss, "logits", weight=3.0)).eval()
        out = distiller(batch)
        s, t = distiller.student(batch["image"]), distiller.teacher(batch["image"])
        a, b = mse(s.features, t.features), (s.logits - t.logits).abs().mean()
        assert list(out.terms) == ["mse", "l1_loss"]
        torch.testing.assert_close(out.terms["mse"], a)
        torch.testing.assert_close(out.terms["l1_loss"], b)
        torch.testing.assert_close(out.loss, task_loss(s, batch) + 0.5 * a + 3.0 * b)
        assert not out.teacher.logits.requires_grad

    def test_without_teacher_it_is_the_task(self, batch: dict[str, Any]) -> None:
        distiller = Distiller(Toy(), None, task_loss)
        out = distiller(batch)
        assert out.loss is out.task
        assert out.terms == {}
        assert out.teacher is None
        assert set(distiller.check(batch).norms) == {"task"}

    def test_selectors(self, batch: dict[str, Any]) -> None:
        def pair(s0: Tensor, s1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
            return mse(s0, t0) + 10 * mse(s1, t1)

        distiller = make(
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

    def test_kwargs_from_batch_student_and_teacher(self, batch: dict[str, Any]) -> None:
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
        out = make(Term(spy, "logits", kwargs=kwargs))(batch)
        assert seen["mask"] is batch["word_mask"]
        assert seen["own"] is out.student.logits
        assert seen["theirs"] is out.teacher.stages[1]
        assert (seen["mode"], seen["t"]) == ("sca.led", 2)

    def test_taps(self, batch: dict[str, Any]) -> None:
        distiller = make(
            Term(mse, "stem", name="hooked"), student_taps={"stem": "stem"}, teacher_taps={"stem": "stem"}
        ).eval()
        out = distiller(batch)
        expected = mse(distiller.student.stem(batch["image"]), distiller.teacher.stem(batch["image"]))
        torch.testing.assert_close(out.terms["hooked"], expected)
        distiller.check(batch)
        idle = make(Term(mse, "x"), student_taps={"x": "idle"}, teacher_taps={"x": "stem"})
        idle.student.forward = lambda image, word_mask=None: Toy.forward(idle.student, image)  # idle is never called
        with pytest.raises(RuntimeError, match=r"term 'mse', student: tap 'x' never fired"):
            idle.check(batch)

    def test_gradients_reach_only_the_student(self, batch: dict[str, Any]) -> None:
        distiller = make()
        distiller(batch).loss.backward()
        assert all(p.grad is not None for p in distiller.student.parameters())
        assert all(p.grad is None for p in distiller.teacher.parameters())


class TestRefusals:
    """What fails silently elsewhere, one clear error each."""

    def test_teacher_is_student(self) -> None:
        model = Toy()
        with pytest.raises(ValueError, match="same object"):
            Distiller(model, model, task_loss, [])

    def test_terms_without_teacher(self) -> None:
        with pytest.raises(ValueError, match="terms need a teacher"):
            Distiller(Toy(), None, task_loss, [Term(mse, "logits")])

    def test_teacher_in_train_mode(self, batch: dict[str, Any]) -> None:
        teacher = Toy().eval().requires_grad_(False)
        teacher.norm.train()
        distiller = make(teacher=teacher)
        with pytest.raises(ValueError, match=r"train mode \(norm\).*teacher.eval\(\)"):
            distiller.check(batch)
        teacher.train()
        with pytest.raises(ValueError, match="train mode"):
            distiller(batch)

    def test_teacher_requires_grad(self, batch: dict[str, Any]) -> None:
        with pytest.raises(
            ValueError, match=r"stem.weight, stem.bias, norm.weight and 3 more.*requires_grad_\(False\)"
        ):
            make(teacher=Toy().eval()).check(batch)

    def test_teacher_output_changes(self, batch: dict[str, Any]) -> None:
        teacher = Toy(dropout=0.1).eval().requires_grad_(False)
        with pytest.raises(ValueError, match="teacher's logits changes between two passes"):
            make(teacher=teacher).check(batch)

    def test_tapped_feature_changes(self, batch: dict[str, Any]) -> None:
        class Aside(Toy):
            """Steady in what it returns, random in what it is tapped for."""

            def forward(self, image: Tensor, word_mask: Tensor | None = None) -> Out:
                self.idle(torch.rand_like(image))
                return super().forward(image)

        teacher = Aside().eval().requires_grad_(False)
        far = Term(lambda s, t: (s.mean() - t.mean() - 1).square(), "logits", "x")
        distiller = make(far, teacher=teacher, teacher_taps={"x": "idle"})
        with pytest.raises(ValueError, match="teacher's tap 'x' changes between two passes"):
            distiller.check(batch)

    def test_teacher_with_nan_or_without_weights(self, batch: dict[str, Any]) -> None:
        teacher = Toy().eval().requires_grad_(False)
        teacher.head.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="teacher's logits holds NaN or Inf"):
            make(teacher=teacher).check(batch)
        with pytest.raises(ValueError, match="without weights"):
            make(teacher=Toy().eval().requires_grad_(False).to("meta")).check(batch)

    def test_term_is_zero(self, batch: dict[str, Any]) -> None:
        distiller = make(Term(mse, "logits", name="late"))
        distiller.student.load_state_dict(distiller.teacher.state_dict())
        with pytest.raises(ValueError, match="term 'late' is exactly 0"):
            distiller.eval().check(batch)

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda s, t: (s - t).mean() / 0, "term 'x' is -?inf|term 'x' is nan"),
            (lambda s, t: (s.detach() - t).square().mean(), "term 'x' sends no gradient to the student"),
            (lambda s, t: (t * t).mean() + 0 * s.sum(), "term 'x' sends no gradient to the student"),
            (lambda s, t: (s - s.detach()).abs().sqrt().sum() + 1, "its gradient with respect to the student is nan"),
            (lambda s, t: (s - t).square(), "term 'x': its loss must return a scalar tensor, got shape"),
            (lambda s, t: {"a": s.mean()}, "term 'x': its loss must return a scalar tensor, got dict"),
        ],
    )
    def test_term_that_teaches_nothing(self, batch: dict[str, Any], loss: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(Term(loss, "logits", name="x")).check(batch)

    def test_aligner_alone_gets_the_gradient(self, batch: dict[str, Any]) -> None:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
                return mse(self.scale * student.detach(), teacher)

        with pytest.raises(ValueError, match="term 'own' sends no gradient to the student"):
            make(Term(Own(), "logits")).check(batch)

    def test_frozen_student(self, batch: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="student has no parameter that requires a gradient"):
            make(student=Toy().requires_grad_(False)).check(batch)

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
    def test_bad_selector(self, batch: dict[str, Any], selector: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(Term(mse, selector))(batch)

    def test_errors_of_selectors_say_whose(self, batch: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"^term 'mse', teacher: path 'features\.x'"):
            make(Term(mse, "features", "features.x"))(batch)
        with pytest.raises(ValueError, match=r"^term 'mse', kwargs: path 'mesk'"):
            make(Term(mse, "features", kwargs={"mask": "batch.mesk"}))(batch)
        with pytest.raises(IndexError) as caught:
            make(Term(mse, "features", lambda out: out.stages[7]))(batch)
        assert caught.value.__notes__ == ["This is term 'mse' of the Distiller, selecting for teacher."]
        with pytest.raises(ValueError, match="has 0 items: this network does not compute it"):
            follow({"stages": []}, "stages.-1")

    def test_bad_terms(self) -> None:
        with pytest.raises(ValueError, match="two terms are named 'mse'"):
            make(Term(mse, "logits"), Term(mse, "features"))
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
            make(student_taps={"a": "stam"})


class TestGradients:
    def test_check_changes_nothing(self, batch: dict[str, Any]) -> None:
        class Noisy(Toy):
            def forward(self, image: Tensor, word_mask: Tensor | None = None) -> Out:
                return super().forward(image + torch.rand_like(image))

        distiller = make(student=Noisy()).train()
        state = {k: v.clone() for k, v in distiller.state_dict().items()}
        random = torch.get_rng_state()
        distiller.check(batch)
        assert torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(v, state[k]) for k, v in distiller.state_dict().items())
        assert all(p.grad is None for p in distiller.parameters())

    def test_norms_and_shares_by_hand(self, batch: dict[str, Any]) -> None:
        distiller = make(Term(mse, "features", weight=0.5), Term(F.l1_loss, "logits", weight=2.0)).eval()
        report = distiller.check(batch)
        for name in ("task", "mse", "l1_loss"):
            distiller.zero_grad()
            out = distiller(batch)
            (out.task if name == "task" else out.terms[name]).backward()
            norm = sum(p.grad.square().sum() for p in distiller.student.parameters() if p.grad is not None) ** 0.5
            assert report.norms[name] == pytest.approx(float(norm), rel=1e-5)
        shares = distiller.gradient_shares(batch)
        assert shares["mse"] == pytest.approx(0.5 * report.norms["mse"] / report.norms["task"])
        assert shares == pytest.approx(report.shares)
        assert "l1_loss" in str(report)

    def test_balance(self, batch: dict[str, Any]) -> None:
        distiller = make(Term(mse, "features"), Term(F.l1_loss, "logits", weight=2.0)).eval()
        weights = distiller.balance(batch, {"mse": 0.25})
        assert weights == distiller.weights
        assert weights["l1_loss"] == 2.0
        assert distiller.gradient_shares(batch)["mse"] == pytest.approx(0.25, rel=1e-5)
        double = {**batch, "image": 2 * batch["image"]}
        distiller.balance([batch, double], {"mse": 0.25})
        r = [distiller.check(b) for b in (batch, double)]
        task, term = (sum(x.norms[n] for x in r) for n in ("task", "mse"))
        assert distiller.weights["mse"] * term == pytest.approx(0.25 * task, rel=1e-5)
        with pytest.raises(ValueError, match="no term named 'mes'"):
            distiller.balance(batch, {"mes": 0.5})
        with pytest.raises(ValueError, match="must be a finite number >= 0, got -1"):
            distiller.balance(batch, {"mse": -1})

    def test_weights_do_not_leak_into_the_callers_term(self) -> None:
        term = Term(mse, "features")
        make(term).set_weights({"mse": 7.0})
        assert term.weight == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": None}, r"student must be an nn\.Module, got None"),
        ({"teacher": "teacher"}, r"teacher must be an nn\.Module or None, got 'teacher'"),
        ({"task_loss": None}, "task_loss must be a function"),
        ({"terms": [mse]}, r"terms must be a list of fastkd\.Term, got <function mse"),
        ({"inputs": "image"}, "inputs must be a sequence of keys, got the string 'image'"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"student": Toy(), "teacher": Toy().eval(), "task_loss": task_loss}
    with pytest.raises(TypeError, match=message):
        Distiller(**{**given, **arguments})


def test_terms_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match="weight must be a finite number >= 0, got '1'"):
        Term(mse, "features", weight="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kwargs must be a dict"):
        Term(mse, "features", kwargs=[1])  # type: ignore[arg-type]


def test_weights_are_set_together_or_not_at_all() -> None:
    distiller = make(Term(mse, "features"))
    with pytest.raises(ValueError, match="no term named 'other'"):
        distiller.set_weights({"mse": 2.0, "other": 1.0})
    assert distiller.weights == {"mse": 1.0}


def test_an_error_inside_a_loss_says_which_term(batch: dict[str, Any]) -> None:
    loss = fastkd.losses.channel_distribution_kd
    distiller = make(Term(loss, "features", name="fine"), Term(loss, "features", "logits", name="wide"))
    with pytest.raises(ValueError, match="student and teacher: shapes differ") as caught:
        distiller(batch)
    assert caught.value.__notes__ == ["This is term 'wide' of the Distiller."]


def test_follow_mappings_and_namedtuples() -> None:
    value = {"a.b": 1, "a": [{"c": torch.ones(1)}]}
    assert torch.equal(follow(value, "a.0.c"), torch.ones(1))
    assert select("tap.0", None, {"tap": [5]}) == (5,)
    with pytest.raises(ValueError, match="There is: 'c'"):
        follow(value, "a.0.zzz")


def test_names_of_losses() -> None:
    class ChannelThingKD(nn.Module):
        pass

    assert Term(ChannelThingKD(), "x").name == "channel_thing_kd"
    assert Term(fastkd.losses.ChannelDistributionKD(), "x").name == "channel_distribution_kd"
    assert Term(lambda s, t: s, "x").name == "lambda"


def test_distiller_and_taps_need_torch_alone() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"accelerate", "torchmetrics", "timm", "transformers", "rich", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import fastkd
fastkd.Distiller, fastkd.Taps, fastkd.Term, fastkd.train.TrainConfig
for module, name in ((fastkd.train, "train"), (fastkd.evaluate, "evaluate"), (fastkd.evaluate, "RISMetrics")):
    try:
        getattr(module, name)
    except ImportError as error:
        assert "pip install 'fastkd[ris]'" in str(error), error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
