"""channel_kd against loops written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from loss_oracle import kl, log_softmax, unit
from torch.autograd import gradcheck, gradgradcheck

from fastkd.losses import ChannelKD, channel_kd

SIMILARITIES = ["cosine", "mean", "dot"]
DISTANCES = ["kl", "mse", "row_cosine"]
LAYOUTS = ["plain", "patches", "across_batch"]


# --- the oracle: Python floats, one loop per sum ----------------------------------------------------------------------


def relation_matrix(rows, similarity):
    if similarity == "cosine":
        rows = [unit(r) for r in rows]
    scale = len(rows[0]) if similarity == "mean" else 1
    return [[sum(a * b for a, b in zip(r, q, strict=True)) / scale for q in rows] for r in rows]


def row_distance(e_s, e_t, distance, tau, negate):
    if distance == "kl":
        sign = -1 if negate else 1
        return kl([sign * v / tau for v in e_t], [sign * v / tau for v in e_s])
    if distance == "mse":
        return sum((a - b) ** 2 for a, b in zip(e_s, e_t, strict=True)) / len(e_s)
    return sum((a - b) ** 2 for a, b in zip(unit(e_s), unit(e_t), strict=True))


def centre(maps, across_batch):
    """Subtract each channel's mean over its pixels (over the batch's pixels) from maps[b][c][y][x]."""
    out = []
    for b, sample in enumerate(maps):
        out.append([])
        for c, channel in enumerate(sample):
            of = [m[c] for m in maps] if across_batch else [maps[b][c]]
            values = [v for m in of for line in m for v in line]
            mean = sum(values) / len(values)
            out[-1].append([[v - mean for v in line] for line in channel])
    return out


def samples_of(maps, layout, p=2):
    """Return samples[s][c][n] from maps[b][c][y][x]."""
    if layout == "across_batch":
        return [[[v for m in maps for line in m[c] for v in line] for c in range(len(maps[0]))]]
    if layout == "plain":
        return [[[v for line in ch for v in line] for ch in m] for m in maps]
    out = []
    for m in maps:
        h, w = len(m[0]) // p, len(m[0][0]) // p
        for py in range(p):
            for px in range(p):
                out.append([[ch[py * h + y][px * w + x] for y in range(h) for x in range(w)] for ch in m])
    return out


def attention(sample):
    strength = [sum(abs(v) for v in row) / len(row) / 0.5 for row in sample]
    return [len(sample) * math.exp(v) for v in log_softmax(strength)]


def oracle(student, teacher, similarity, distance, tau, negate, centered, weight, layout):
    """Return weighted rows and weights, each [samples][channels]."""
    s, t = student.tolist(), teacher.tolist()
    weigh = samples_of(t, layout)
    if centered:
        s, t = centre(s, layout == "across_batch"), centre(t, layout == "across_batch")
    rows, weights = [], []
    for index, (x_s, x_t) in enumerate(zip(samples_of(s, layout), samples_of(t, layout), strict=True)):
        e_s, e_t = relation_matrix(x_s, similarity), relation_matrix(x_t, similarity)
        if weight == "attention":
            w = attention(weigh[index])
        elif weight is None:
            w = [1.0] * len(x_s)
        else:
            w = weight.tolist()[index // 4 if layout == "patches" else index]
        rows.append([w[r] * row_distance(e_s[r], e_t[r], distance, tau, negate) for r in range(len(x_s))])
        weights.append(w)
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


def maps(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 3, 4, 2, generator=g, dtype=torch.float64)
    teacher = torch.randn(2, 3, 2, 4, generator=g, dtype=torch.float64)  # a different H×W
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_option_equals_the_loop(similarity, distance, layout):
    student, teacher = maps()
    given = torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.25, 3.0]], dtype=torch.float64)
    given = given[:1] if layout == "across_batch" else given
    for negate in (False, True):
        for centered in (False, True):
            for weight in (None, given, "attention"):
                options = {"similarity": similarity, "distance": distance, "negate": negate, "centered": centered}
                want, w = oracle(student, teacher, tau=0.7, weight=weight, layout=layout, **options)
                options |= {
                    "temperature": 0.7,
                    "weight": weight,
                    "patches": 2 if layout == "patches" else 1,
                    "across_batch": layout == "across_batch",
                }
                for backend in ("reference", "auto"):
                    got = {
                        r: channel_kd(student, teacher, reduction=r, backend=backend, **options)
                        for r in ("none", "mean", "sum")
                    }
                    torch.testing.assert_close(got["none"], want, rtol=1e-10, atol=1e-12)
                    torch.testing.assert_close(got["sum"], want.sum(), rtol=1e-10, atol=1e-12)
                    torch.testing.assert_close(got["mean"], want.sum() / w.sum(), rtol=1e-10, atol=1e-12)


def test_shapes_of_rows():
    student, teacher = maps()
    assert channel_kd(student, teacher, reduction="none").shape == (2, 3)
    assert channel_kd(student, teacher, reduction="none", patches=2).shape == (8, 3)
    assert channel_kd(student, teacher, reduction="none", across_batch=True).shape == (1, 3)
    assert channel_kd(student.flatten(2), teacher.flatten(2), reduction="none").shape == (2, 3)


def test_defaults_are_cosine_kl_at_temperature_0_1():
    student, teacher = maps()
    want, _ = oracle(student, teacher, "cosine", "kl", 0.1, False, False, None, "plain")
    torch.testing.assert_close(channel_kd(student, teacher), want.mean())


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_first_and_second_derivatives(similarity, distance):
    student, teacher = maps(1)
    student = student.requires_grad_()
    for more in ({}, {"centered": True, "across_batch": True}, {"patches": 2, "weight": "attention"}):
        f = lambda x, backend="auto", more=more: channel_kd(
            x, teacher, similarity=similarity, distance=distance, temperature=0.7, backend=backend, **more
        )
        assert gradcheck(f, (student,))
        assert gradgradcheck(lambda x, f=f: f(x, "reference"), (student,))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_student_has_zero_loss_and_gradient(distance, temperature):
    teacher = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(2))
    student = teacher.clone().requires_grad_()
    loss = channel_kd(student, teacher, distance=distance, temperature=temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_fp32(dtype):
    student, teacher = maps(3, dtype)
    loss = channel_kd(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, channel_kd(student.float(), teacher.float()), rtol=1e-6, atol=1e-6)
    assert channel_kd(student.double(), teacher).dtype == torch.float64


def test_fp16_extremes_stay_finite():
    student, teacher = maps(3)
    big_s, big_t = (student.sign() * 65504).half(), (teacher.sign() * 65504).half()
    for similarity in SIMILARITIES:
        leaf = big_s.clone().requires_grad_()
        loss = channel_kd(leaf, big_t, similarity=similarity)
        loss.backward()
        assert torch.isfinite(loss)
        if similarity == "cosine":  # the raw products, 1e10, have gradients beyond fp16
            assert torch.isfinite(leaf.grad).all()


def test_autocast_does_not_reduce_precision():
    student, teacher = maps(3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = channel_kd(student, teacher)
    torch.testing.assert_close(inside, channel_kd(student, teacher), rtol=0, atol=0)


def test_zero_channel_has_finite_second_derivatives():
    student, teacher = maps(4)
    student[:, 1] = 0
    for distance in DISTANCES:
        leaf = student.clone().requires_grad_()
        loss = channel_kd(leaf, teacher, distance=distance, backend="reference")
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()
        assert (grad[:, 1] == 0).all()
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
        assert torch.isfinite(second).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_nan_and_inf_propagate(similarity, value):
    for which in (0, 1):
        for distance in DISTANCES:
            pair = list(maps(5))
            pair[which][0, 0, 0, 0] = value
            assert not torch.isfinite(channel_kd(*pair, similarity=similarity, distance=distance))


def test_strided_inputs():
    student, teacher = maps(6)
    want = channel_kd(student, teacher)
    wide = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    wide[:, ::2, :, 1:3] = student
    view = wide[:, ::2, :, 1:3]
    assert not view.is_contiguous()
    torch.testing.assert_close(channel_kd(view, teacher), want)
    last = student.to(memory_format=torch.channels_last)
    torch.testing.assert_close(channel_kd(last, teacher.to(memory_format=torch.channels_last)), want)
    one = teacher[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(channel_kd(student, one), channel_kd(student, one.contiguous()))


def test_module_equals_the_function():
    student, teacher = maps(7, torch.float32)
    options = {"similarity": "mean", "distance": "mse", "centered": True, "weight": "attention"}
    module = ChannelKD(**options)
    assert not list(module.parameters())
    assert module.aligner is None
    torch.testing.assert_close(module(student, teacher), channel_kd(student, teacher, **options))
    weight = torch.rand(2, 3)
    torch.testing.assert_close(
        module(student, teacher, weight=weight), channel_kd(student, teacher, **(options | {"weight": weight}))
    )
    torch.testing.assert_close(ChannelKD(weight=weight)(student, teacher), channel_kd(student, teacher, weight=weight))


def test_the_aligner_is_a_trainable_1x1_convolution():
    _, teacher = maps(7, torch.float32)
    student = torch.randn(2, 5, 4, 2)
    module = ChannelKD(student_channels=5, teacher_channels=3)
    (weight,) = module.parameters()
    assert weight.shape == (3, 5)
    aligned = torch.nn.functional.conv2d(student, weight[:, :, None, None])
    loss = module(student, teacher)
    torch.testing.assert_close(loss, channel_kd(aligned, teacher))
    torch.testing.assert_close(module(student.flatten(2), teacher), loss)
    loss.backward()
    assert weight.grad.abs().max() > 0
    assert ChannelKD(student_channels=3, teacher_channels=3).aligner is None
