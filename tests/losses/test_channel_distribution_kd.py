"""channel_distribution_kd against loops written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from loss_oracle import kl, log_softmax, unit
from torch.autograd import gradcheck, gradgradcheck

from fastkd.losses import ChannelDistributionKD, channel_distribution_kd


def guide_matrix(rows, tau):
    hats = [unit(r) for r in rows]
    gram = [[sum(a * b for a, b in zip(r, q, strict=True)) / tau for q in hats] for r in hats]
    return [[math.exp(v) for v in log_softmax(row)] for row in gram]


def mixed(p, rows):
    return [[sum(p[c][k] * rows[k][n] for k in range(len(rows))) for n in range(len(rows[0]))] for c in range(len(p))]


def oracle(student, teacher, tau, guide, guide_tau, weight):
    out, weights = [], []
    for b, (s, t) in enumerate(zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True)):
        if weight == "attention":
            w = [len(t) * math.exp(v) for v in log_softmax([sum(map(abs, row)) / len(row) / 0.5 for row in t])]
        else:
            w = [1.0] * len(t) if weight is None else weight[b].tolist()
        if guide == "own":
            s, t = mixed(guide_matrix(s, guide_tau), s), mixed(guide_matrix(t, guide_tau), t)
        elif guide == "teacher":
            p = guide_matrix(t, guide_tau)
            s, t = mixed(p, s), mixed(p, t)
        rows = [tau**2 * kl([v / tau for v in y], [v / tau for v in x]) for x, y in zip(s, t, strict=True)]
        out.append([w[c] * rows[c] for c in range(len(rows))])
        weights.append(w)
    return torch.tensor(out, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


def maps(seed=0, shape=(2, 3, 2, 4)):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("weight", [None, "given", "attention"])
@pytest.mark.parametrize("guide", [None, "own", "teacher"])
def test_every_option_equals_the_loop(guide, weight, backend):
    student, teacher = maps()
    if weight == "given":
        weight = torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.25, 3.0]], dtype=torch.float64)
    for tau in (0.05, 1.0, 20.0):
        want, w = oracle(student, teacher, tau, guide, 0.3, weight)
        options = {"temperature": tau, "guide": guide, "guide_temperature": 0.3, "weight": weight, "backend": backend}
        f = lambda r, options=options: channel_distribution_kd(student, teacher, reduction=r, **options)
        # At τ = 20 the KL is a difference of numbers near log N, and τ² amplifies its rounding error.
        torch.testing.assert_close(f("none"), want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(f("sum"), want.sum(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(f("mean"), want.sum() / w.sum(), rtol=1e-9, atol=1e-12)


def test_defaults_and_shapes():
    student, teacher = maps()
    want, _ = oracle(student, teacher, 4.0, None, 0.1, None)
    torch.testing.assert_close(channel_distribution_kd(student, teacher), want.mean())
    assert channel_distribution_kd(student.flatten(2), teacher.flatten(2), reduction="none").shape == (2, 3)


@pytest.mark.parametrize("guide", [None, "own", "teacher"])
def test_first_and_second_derivatives(guide):
    student, teacher = maps(1)
    f = lambda x: channel_distribution_kd(
        x, teacher, guide=guide, guide_temperature=0.5, weight="attention", temperature=1.5, backend="reference"
    )
    assert gradcheck(f, (student.requires_grad_(),))
    assert gradgradcheck(f, (student,))


def test_gradient_is_tau_times_the_difference_of_the_softmaxes():
    student, teacher = maps(2)
    student.requires_grad_()
    for backend in ("reference", "auto"):
        rows = channel_distribution_kd(student, teacher, temperature=4.0, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(rows, student, torch.ones_like(rows))
        want = 4.0 * ((student.flatten(2) / 4).softmax(-1) - (teacher.flatten(2) / 4).softmax(-1))
        torch.testing.assert_close(grad.flatten(2), want.detach())


@pytest.mark.parametrize("guide", [None, "own", "teacher"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_equal_student_has_zero_loss_and_gradient(backend, guide):
    teacher = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    student = teacher.clone().requires_grad_()
    loss = channel_distribution_kd(student, teacher, guide=guide, backend=backend)
    loss.backward()
    assert abs(loss.item()) < 16 * 1e-6
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_minus_infinity_and_one_hot_teachers(backend):
    inf = math.inf
    student = torch.tensor([[[1.0, 2.0, -inf, 0.5], [0.0, 1.0, 2.0, 3.0], [0.0, -inf, 0.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.5, 1.0, -inf, 2.0], [-inf, -inf, 0.0, -inf], [0.0, 1.0, 0.0, 0.0]]])
    rows = channel_distribution_kd(student, teacher, temperature=1.0, reduction="none", backend=backend)
    keep = [0, 1, 3]
    first = kl(teacher[0, 0][keep].tolist(), student[0, 0][keep].tolist())
    second = -log_softmax(student[0, 1].tolist())[2]  # a one-hot teacher: minus the student's log-probability
    torch.testing.assert_close(rows[0, :2], torch.tensor([first, second]), rtol=1e-5, atol=1e-6)
    assert rows[0, 2] == inf  # the student excludes an event that the teacher allows
    rows[0, :2].sum().backward()
    assert torch.isfinite(student.grad).all()
    want = student.detach().softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(student.grad[0, :2], want[0, :2])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("temperature", [0.05, 4.0, 20.0])
def test_extreme_logits(temperature, backend):
    g = torch.Generator().manual_seed(3)
    for scale, dtype in ((65504.0, torch.float16), (1e4, torch.float32), (1e4, torch.bfloat16)):
        student, teacher = ((torch.rand(1, 3, 16, generator=g) * 2 - 1) * scale for _ in range(2))
        student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
        rows = channel_distribution_kd(student, teacher, temperature=temperature, reduction="none", backend=backend)
        want, _ = oracle(student.double(), teacher.double(), temperature, None, 0.1, None)
        torch.testing.assert_close(rows.double(), want, rtol=1e-4, atol=1e-3)
        rows.mean().backward()
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("guide", [None, "own", "teacher"])
def test_nan_and_inf_propagate(guide, value):
    for which in (0, 1):
        for backend in ("reference", "auto"):
            pair = maps(4)
            pair[which][0, 0, 0, 0] = value
            rows = channel_distribution_kd(*pair, guide=guide, reduction="none", backend=backend)
            assert not torch.isfinite(rows[0, 0])
            assert torch.isfinite(rows[1]).all()


def test_strided_inputs():
    student, teacher = maps(5, (2, 4, 4, 4))
    want = channel_distribution_kd(student, teacher)
    wide = torch.zeros(2, 8, 4, 8, dtype=torch.float64)
    wide[:, ::2, :, 1::2] = student
    view = wide[:, ::2, :, 1::2].requires_grad_()
    torch.testing.assert_close(channel_distribution_kd(view, teacher), want)
    last = teacher.to(memory_format=torch.channels_last)
    torch.testing.assert_close(channel_distribution_kd(student, last), want)
    one = teacher[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        channel_distribution_kd(student, one), channel_distribution_kd(student, one.contiguous())
    )


def test_mixed_dtypes():
    student, teacher = maps(6)
    got = channel_distribution_kd(student.bfloat16(), teacher.half())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, channel_distribution_kd(student.bfloat16().float(), teacher.half().float()))


def test_module_equals_the_function():
    student, teacher = (x.float() for x in maps(7))
    options = {"temperature": 2.0, "guide": "teacher", "weight": "attention"}
    torch.testing.assert_close(
        ChannelDistributionKD(**options)(student, teacher), channel_distribution_kd(student, teacher, **options)
    )
    module = ChannelDistributionKD(student_channels=5, teacher_channels=3)
    wide = torch.randn(2, 5, 2, 4)
    aligned = torch.einsum("oc,bchw->bohw", module.aligner.linear.weight, wide)
    torch.testing.assert_close(module(wide, teacher), channel_distribution_kd(aligned, teacher))
