"""The distiller: module tree, loss, gradients, and mistakes found before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distiller_tools import Out, Toy, make_batch, make_distiller, mse, task_loss
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import Distiller, Term
from fastkd.distill.forward import run_model


@pytest.fixture
def batch() -> dict[str, Any]:
    return make_batch()


class TestModuleTree:
    def test_teacher_is_outside_the_module_tree(self) -> None:
        teacher = Toy(width=8).eval().requires_grad_(False)
        distiller = make_distiller(Term(mse, "logits"), teacher=teacher)
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
        distiller = make_distiller()
        distiller.to(torch.float64)
        assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float64}
        distiller.to("meta")
        assert all(p.is_meta for p in distiller.teacher.parameters())

    def test_aligner_trains_outside_the_student(self, batch: dict[str, Any]) -> None:
        class Aligned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.aligner = nn.Conv2d(4, 8, 1)

            def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
                return mse(self.aligner(student), teacher)

        student = Toy()
        before = set(student.state_dict())
        teacher = Toy(8).eval().requires_grad_(False)
        distiller = make_distiller(Term(Aligned(), "features", name="aligned"), student=student, teacher=teacher)
        assert set(student.state_dict()) == before
        names = [name for name, _ in distiller.named_parameters() if not name.startswith("student.")]
        assert names == ["term_modules.aligned.aligner.weight", "term_modules.aligned.aligner.bias"]
        distiller(batch).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.term_modules.parameters())
        assert all(p.grad is None for p in teacher.parameters())


class TestForward:
    def test_loss_is_task_plus_weighted_terms(self, batch: dict[str, Any]) -> None:
        distiller = make_distiller(Term(mse, "features", weight=0.5), Term(F.l1_loss, "logits", weight=3.0)).eval()
        out = distiller(batch)
        s, t = distiller.student(batch["image"]), distiller.teacher(batch["image"])
        a, b = mse(s.features, t.features), (s.logits - t.logits).abs().mean()
        assert list(out.terms) == ["mse", "l1_loss"]
        torch.testing.assert_close(out.terms["mse"], a)
        torch.testing.assert_close(out.terms["l1_loss"], b)
        torch.testing.assert_close(out.loss, task_loss(s, batch) + 0.5 * a + 3.0 * b)
        assert not out.teacher.logits.requires_grad

    def test_loss_without_a_teacher_is_the_task(self, batch: dict[str, Any]) -> None:
        distiller = Distiller(Toy(), None, task_loss)
        out = distiller(batch)
        assert out.loss is out.task
        assert out.terms == {}
        assert out.teacher is None
        assert set(distiller.check(batch).norms) == {"task"}

    def test_terms_select_taps(self, batch: dict[str, Any]) -> None:
        distiller = make_distiller(
            Term(mse, "stem", name="hooked"), student_taps={"stem": "stem"}, teacher_taps={"stem": "stem"}
        ).eval()
        out = distiller(batch)
        expected = mse(distiller.student.stem(batch["image"]), distiller.teacher.stem(batch["image"]))
        torch.testing.assert_close(out.terms["hooked"], expected)
        distiller.check(batch)
        idle = make_distiller(Term(mse, "x"), student_taps={"x": "idle"}, teacher_taps={"x": "stem"})
        idle.student.forward = lambda image, word_mask=None: Toy.forward(idle.student, image)  # idle is never called
        with pytest.raises(RuntimeError, match=r"term 'mse', student: tap 'x' never fired"):
            idle.check(batch)

    def test_gradients_reach_only_the_student(self, batch: dict[str, Any]) -> None:
        distiller = make_distiller()
        distiller(batch).loss.backward()
        assert all(p.grad is not None for p in distiller.student.parameters())
        assert all(p.grad is None for p in distiller.teacher.parameters())


class TestErrors:
    """Each mistake that would otherwise go unnoticed raises one clear error."""

    def test_rejects_the_student_as_teacher(self) -> None:
        model = Toy()
        with pytest.raises(ValueError, match="same object"):
            Distiller(model, model, task_loss, [])

    def test_rejects_terms_without_a_teacher(self) -> None:
        with pytest.raises(ValueError, match="terms need a teacher"):
            Distiller(Toy(), None, task_loss, [Term(mse, "logits")])

    def test_rejects_a_teacher_in_train_mode(self, batch: dict[str, Any]) -> None:
        teacher = Toy().eval().requires_grad_(False)
        teacher.norm.train()
        distiller = make_distiller(teacher=teacher)
        with pytest.raises(ValueError, match=r"train mode \(norm\).*teacher.eval\(\)"):
            distiller.check(batch)
        teacher.train()
        with pytest.raises(ValueError, match="train mode"):
            distiller(batch)

    def test_rejects_a_teacher_that_requires_grad(self, batch: dict[str, Any]) -> None:
        with pytest.raises(
            ValueError, match=r"stem.weight, stem.bias, norm.weight and 3 more.*requires_grad_\(False\)"
        ):
            make_distiller(teacher=Toy().eval()).check(batch)

    def test_rejects_a_random_teacher(self, batch: dict[str, Any]) -> None:
        teacher = Toy(dropout=0.1).eval().requires_grad_(False)
        with pytest.raises(ValueError, match="teacher's logits changes between two passes"):
            make_distiller(teacher=teacher).check(batch)

    def test_rejects_a_random_tapped_feature(self, batch: dict[str, Any]) -> None:
        class RandomFeature(Toy):
            """Model with a deterministic output and a random feature."""

            def forward(self, image: Tensor, word_mask: Tensor | None = None) -> Out:
                self.idle(torch.rand_like(image))
                return super().forward(image)

        teacher = RandomFeature().eval().requires_grad_(False)
        far = Term(lambda s, t: (s.mean() - t.mean() - 1).square(), "logits", "x")
        distiller = make_distiller(far, teacher=teacher, teacher_taps={"x": "idle"})
        with pytest.raises(ValueError, match="teacher's tap 'x' changes between two passes"):
            distiller.check(batch)

    def test_rejects_a_teacher_with_nan_or_without_weights(self, batch: dict[str, Any]) -> None:
        teacher = Toy().eval().requires_grad_(False)
        teacher.head.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="teacher's logits holds NaN or Inf"):
            make_distiller(teacher=teacher).check(batch)
        with pytest.raises(ValueError, match="without weights"):
            make_distiller(teacher=Toy().eval().requires_grad_(False).to("meta")).check(batch)

    @pytest.mark.parametrize("teacher", [True, False])
    def test_rejects_nan_in_the_batch(self, batch: dict[str, Any], teacher: bool) -> None:
        batch["image"][[1, 3], 0, 0, 0] = torch.tensor([float("nan"), float("inf")])
        distiller = make_distiller() if teacher else Distiller(Toy(), None, task_loss)
        with pytest.raises(ValueError, match=r"batch\['image'\] holds NaN or Inf \(samples 1, 3 of the batch\)"):
            distiller.check(batch)

    def test_rejects_a_term_that_is_zero(self, batch: dict[str, Any]) -> None:
        distiller = make_distiller(Term(mse, "logits", name="copy"))
        distiller.student.load_state_dict(distiller.teacher.state_dict())
        with pytest.raises(ValueError, match="term 'copy' is exactly 0"):
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
    def test_rejects_a_term_that_teaches_nothing(self, batch: dict[str, Any], loss: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_distiller(Term(loss, "logits", name="x")).check(batch)

    def test_rejects_a_term_whose_gradient_reaches_only_the_aligner(self, batch: dict[str, Any]) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
                return mse(self.scale * student.detach(), teacher)

        with pytest.raises(ValueError, match="term 'scaled' sends no gradient to the student"):
            make_distiller(Term(Scaled(), "logits")).check(batch)

    def test_rejects_a_frozen_student(self, batch: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="student has no parameter that requires a gradient"):
            make_distiller(student=Toy().requires_grad_(False)).check(batch)


class TestGradients:
    def test_check_changes_nothing(self, batch: dict[str, Any]) -> None:
        class Noisy(Toy):
            def forward(self, image: Tensor, word_mask: Tensor | None = None) -> Out:
                return super().forward(image + torch.rand_like(image))

        distiller = make_distiller(student=Noisy()).train()
        state = {k: v.clone() for k, v in distiller.state_dict().items()}
        random = torch.get_rng_state()
        distiller.check(batch)
        assert torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(v, state[k]) for k, v in distiller.state_dict().items())
        assert all(p.grad is None for p in distiller.parameters())

    def test_norms_and_shares_equal_autograd(self, batch: dict[str, Any]) -> None:
        distiller = make_distiller(Term(mse, "features", weight=0.5), Term(F.l1_loss, "logits", weight=2.0)).eval()
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

    def test_balance_sets_the_requested_shares(self, batch: dict[str, Any]) -> None:
        distiller = make_distiller(Term(mse, "features"), Term(F.l1_loss, "logits", weight=2.0)).eval()
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

    def test_set_weights_does_not_change_the_callers_term(self) -> None:
        term = Term(mse, "features")
        make_distiller(term).set_weights({"mse": 7.0})
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
def test_rejects_arguments_of_the_wrong_type(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"student": Toy(), "teacher": Toy().eval(), "task_loss": task_loss}
    with pytest.raises(TypeError, match=message):
        Distiller(**{**given, **arguments})


@pytest.mark.parametrize("method", ["forward", "check", "run_teacher"])
def test_rejects_a_batch_that_is_not_a_mapping(method: str, batch: dict[str, Any]) -> None:
    for given in ((batch["image"], batch["mask"]), batch["image"]):
        with pytest.raises(TypeError, match=f"batch must be a mapping .* got {type(given).__name__}; pass a dict"):
            getattr(make_distiller(), method)(given)


def test_set_weights_changes_all_or_none() -> None:
    distiller = make_distiller(Term(mse, "features"))
    with pytest.raises(ValueError, match="no term named 'other'"):
        distiller.set_weights({"mse": 2.0, "other": 1.0})
    assert distiller.weights == {"mse": 1.0}


def test_half_precision_weights_elsewhere_do_not_choose_the_device() -> None:
    """Weights of an offloaded teacher wait on another device than its inputs; autocast is disabled on the latter."""

    class Offloaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float16, device="meta"))

        def forward(self, image: Tensor) -> Tensor:
            return image @ torch.eye(2, dtype=image.dtype)

    with torch.autocast("cpu", torch.bfloat16):
        assert run_model(Offloaded(), image=torch.ones(1, 2)).dtype == torch.float16
