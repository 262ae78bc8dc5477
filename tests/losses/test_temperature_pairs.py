"""Temperatures (τ_S, τ_T), and learned temperatures where probabilities are 0."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from contract_cases import ALL_TERMS
from torch import Tensor, nn
from torch.autograd import grad, gradcheck

import fastkd
from fastkd import losses

LOSSES = {
    losses.channel_kd: losses.ChannelKD,
    losses.pixel_relation_kd: losses.PixelRelationKD,
    losses.channel_distribution_kd: losses.ChannelDistributionKD,
    losses.logit_kd: losses.LogitKD,
    losses.cross_modal_kd: losses.CrossModalKD,
    losses.cross_modal_kd_from_logits: None,
    losses.attention_kd: losses.AttentionKD,
}
INF = float("inf")


def inputs_of(f: Any, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if f is losses.cross_modal_kd:
        return [draw(2, n, 5, seed=seed) for seed, n in enumerate((6, 4, 6, 4))]
    if f is losses.attention_kd:
        return [draw(2, 1, n, 3, seed=seed) for seed, n in enumerate((4, 5, 4, 5))]
    return [draw(2, 5, 6, seed=seed) for seed in range(2)]


def every_term(f: Any) -> dict[str, Any]:
    """Return options with which a cross-modal loss has all its terms."""
    return {"terms": ALL_TERMS} if f in (losses.cross_modal_kd, losses.cross_modal_kd_from_logits) else {}


def run(f: Any, args: list[Tensor], **options: Any) -> list[Tensor]:
    student, options = args[0].clone().requires_grad_(), every_term(f) | options
    loss = f(student, *args[1:], **options)
    return [loss, *grad(loss, student)]


@pytest.mark.parametrize("f", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_pair_of_equal_temperatures_is_one_number_bit_for_bit(f: Any, dtype: torch.dtype, backend: str) -> None:
    args = inputs_of(f, dtype)
    for value in (0.3, 2.0):
        want = run(f, args, temperature=value, backend=backend)
        for pair in ((value, value), [value, value]):
            for a, b in zip(run(f, args, temperature=pair, backend=backend), want, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("f", LOSSES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_copy_of_the_teacher_has_no_loss_at_equal_temperatures_given_as_tensors(f: Any, backend: str) -> None:
    teacher = inputs_of(f, torch.float32)[len(inputs_of(f)) // 2 :]
    loss, gradient = run(f, teacher * 2, temperature=(torch.tensor(0.3), torch.tensor(0.3)), backend=backend)
    assert loss.abs() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("f", LOSSES)
def test_gradients_reach_both_learned_temperatures(f: Any) -> None:
    student, *others = inputs_of(f)
    f = functools.partial(f, **every_term(f))
    taus = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.7, 1.3)]
    student.requires_grad_()
    assert gradcheck(lambda s, *pair: f(s, *others, temperature=pair), (student, *taus))
    want = grad(f(student, *others, temperature=tuple(taus)), taus)
    inside = torch.func.grad(lambda *pair: f(student.detach(), *others, temperature=pair), argnums=(0, 1))(*taus)
    torch.testing.assert_close(inside, want)
    for pair in ((taus[0], 1.3), (0.7, taus[1])):  # only one is learned
        [alone] = grad(f(student, *others, temperature=pair), [t for t in pair if isinstance(t, Tensor)])
        torch.testing.assert_close(alone, want[0 if pair[0] is taus[0] else 1])
        with pytest.raises(fastkd.BackendUnavailable, match="no gradient with respect to the temperature"):
            f(student, *others, temperature=pair, backend="cpu")


@pytest.mark.parametrize("term", ["word_descriptor", "word_channel"])
def test_gradients_of_what_words_see_reach_learned_temperatures(term: str) -> None:
    args = inputs_of(losses.cross_modal_kd)
    one, other = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.7, 1.3))
    loss = lambda *taus, **more: losses.cross_modal_kd(
        *args, temperature=taus if taus[1:] else taus[0], terms={term: 1.0}, **more
    )
    assert gradcheck(loss, (one,))
    assert gradcheck(loss, (one, other))
    with pytest.raises(fastkd.BackendUnavailable, match="no gradient with respect to the temperature"):
        loss(one, backend="cpu")


@pytest.mark.parametrize("f", [f for f, module in LOSSES.items() if module])
def test_parameters_in_a_pair_belong_to_the_module(f: Any) -> None:
    args = inputs_of(f, torch.float32)
    made = LOSSES[f](temperature=(nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.3))))
    assert set(made.state_dict()) == {"temperature_0", "temperature_1"}
    torch.testing.assert_close(made(*args), f(*args, temperature=(0.7, 1.3)))
    made(*args).backward()
    assert all(p.grad is not None and p.grad != 0 for p in made.parameters())
    wide = made.double()
    assert wide(*inputs_of(f)).dtype == torch.float64
    made.temperature = (0.7, 1.3)
    assert not list(made.parameters())


def test_parameters_in_a_pair_belong_to_the_distiller() -> None:
    taus = [nn.Parameter(torch.tensor(t)) for t in (0.7, 1.3)]
    term = fastkd.Term(losses.logit_kd, "f", name="kd", kwargs={"temperature": tuple(taus)})
    net = lambda: nn.Sequential(nn.Conv2d(3, 4, 1))
    made = fastkd.Distiller(net(), net().requires_grad_(False), lambda *_: 0, [term], inputs=("x",))
    assert {id(p) for p in made.parameters()} >= {id(t) for t in taus}


@pytest.mark.parametrize("f", LOSSES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1.0,), r"temperature: expected a number or a pair \(student's, teacher's\), got 1 values"),
        ((1.0, 0.0), r"temperature\[1\]: expected a finite number above 0, got 0.0"),
        ((-1.0, 1.0), r"temperature\[0\]: expected a finite number above 0, got -1.0"),
    ],
)
def test_a_bad_pair_is_an_error(f: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        f(*inputs_of(f), temperature=value)
    if LOSSES[f]:
        with pytest.raises(ValueError, match=message):
            LOSSES[f](temperature=value)


def test_a_pair_counts_for_kl_only() -> None:
    for f in (losses.channel_kd, losses.pixel_relation_kd):
        args = inputs_of(f)
        assert torch.equal(f(*args, distance="mse", temperature=(0.1, 3.0)), f(*args, distance="mse"))


# --- learned temperatures and logits of −inf --------------------------------------------------------------------------


def impossible(f: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Return inputs and masks of which some probabilities are 0; masked teachers hold NaN."""
    args = inputs_of(f)
    words = torch.tensor([[True, True, False, True]] * 2)
    if f is losses.cross_modal_kd:
        args[3][~words] = float("nan")
        return args, every_term(f) | {"word_mask": words, "pixel_mask": torch.arange(6).expand(2, 6) > 1}
    if f is losses.cross_modal_kd_from_logits:
        args = [x.mT[:, :, :4].clone() for x in args]  # (B, N, T)
        args[1].masked_fill_(~words[:, None], float("nan"))
        return args, every_term(f) | {"word_mask": words, "pixel_mask": torch.arange(6).expand(2, 6) > 1}
    if f is losses.attention_kd:
        bias = torch.zeros(1, 1, 4, 5, dtype=torch.float64)
        bias[..., 0] = -INF
        args[3][:, :, 2] = float("nan")
        keys = torch.arange(5).expand(2, 5) != 2
        return args, {"student_bias": bias, "teacher_bias": bias, "key_mask": keys, "causal": True}
    args[0][:, 1, 2] = args[1][:, 1, 2] = -INF
    return args, {}


@pytest.mark.parametrize(
    "f", [f for f in LOSSES if f not in (losses.channel_kd, losses.pixel_relation_kd)], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("paired", [False, True])
def test_learned_temperatures_where_probabilities_are_0(f: Any, paired: bool) -> None:
    """A derivative of −inf/τ is infinite; compare the gradient with differences of the loss."""
    args, options = impossible(f)
    student = args[0].requires_grad_()
    loss = lambda *taus: f(student, *args[1:], temperature=taus if paired else taus[0], **options)
    numbers = [0.8, 1.7][: 1 + paired]
    taus = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in numbers]
    found, of_student = grad(loss(*taus), taus), grad(loss(*taus), student)[0]
    torch.testing.assert_close(of_student, grad(loss(*numbers), student)[0])
    with torch.no_grad():
        for i, derivative in enumerate(found):
            up, down = ([t + sign * 1e-5 * (i == k) for k, t in enumerate(numbers)] for sign in (1, -1))
            torch.testing.assert_close(derivative, (loss(*up) - loss(*down)) / 2e-5, rtol=1e-6, atol=1e-8)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "options"),
    [
        (losses.channel_kd, {"backend": "cpu"}),
        (losses.pixel_relation_kd, {"backend": "cpu"}),
        (losses.logit_kd, {"backend": "reference"}),
        (losses.cross_modal_kd, {"backend": "cpu", "similarity": "cosine"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_pairs_compile_no_graph_per_value(f: Any, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    args = inputs_of(f, torch.float32)
    compiled = torch.compile(lambda pair: f(*args, temperature=pair, **options), fullgraph=True, backend="aot_eager")
    for i, pair in enumerate(((0.5, 1.0), (0.4, 0.9), (0.3, 0.3), (0.2, 0.7))):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            torch.testing.assert_close(compiled(pair), f(*args, temperature=pair, **options), rtol=1e-5, atol=1e-6)
    torch.compiler.reset()
