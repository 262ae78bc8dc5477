"""pixel_relation_kd against loops written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from loss_oracle import log_softmax, unit
from torch.autograd import gradcheck, gradgradcheck

from fastkd.losses import PixelRelationKD, pixel_relation_kd
from fastkd.ops.relation.reference import relation, relation_mse_gram

SIMILARITIES = ["cosine", "mean", "dot"]
DISTANCES = ["kl", "mse", "row_cosine"]


def similarities(pixel, others, similarity):
    if similarity == "cosine":
        pixel, others = unit(pixel), [unit(o) for o in others]
    scale = len(pixel) if similarity == "mean" else 1
    return [sum(a * b for a, b in zip(pixel, o, strict=True)) / scale for o in others]


def row_distance(e_s, e_t, distance, tau):
    if distance == "kl":
        lt, ls = log_softmax([v / tau for v in e_t]), log_softmax([v / tau for v in e_s])
        return sum(math.exp(t) * (t - s) for t, s in zip(lt, ls, strict=True))
    if distance == "mse":
        return sum((a - b) ** 2 for a, b in zip(e_s, e_t, strict=True)) / len(e_s)
    return sum((a - b) ** 2 for a, b in zip(unit(e_s), unit(e_t), strict=True))


def pixels_of(features):
    return [
        [[features[b, c, y, x].item() for c in range(features.shape[1])] for y in range(features.shape[2])
         for x in range(features.shape[3])]
        for b in range(features.shape[0])
    ]  # fmt: skip


def oracle(student, teacher, similarity, distance, tau, cross_image):
    s, t = pixels_of(student), pixels_of(teacher)
    rows = []
    for i in range(len(s)):
        rows.append([])
        partners = range(len(s)) if cross_image else [i]
        for n in range(len(s[i])):
            each = [
                row_distance(
                    similarities(s[i][n], s[j], similarity), similarities(t[i][n], t[j], similarity), distance, tau
                )
                for j in partners
            ]
            rows[-1].append(sum(each) / len(each))
    return torch.tensor(rows, dtype=torch.float64)


def maps(seed=0, widths=(2, 3), size=(3, 2), batch=2):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, c, *size, generator=g, dtype=torch.float64) for c in widths)


@pytest.mark.parametrize("cross_image", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("widths", [(2, 3), (3, 3), (7, 5)])
def test_every_option_equals_the_loop(widths, similarity, distance, cross_image):
    student, teacher = maps(widths=widths)
    want = oracle(student, teacher, similarity, distance, 0.3, cross_image)
    weight = torch.rand(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for backend in ("reference", "auto"):  # "auto" uses the Gram form of "mse" for small widths
        f = lambda backend=backend, **more: pixel_relation_kd(
            student,
            teacher,
            similarity=similarity,
            distance=distance,
            temperature=0.3,
            cross_image=cross_image,
            backend=backend,
            **more,
        )
        torch.testing.assert_close(f(reduction="none"), want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(f(), want.mean(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(f(reduction="sum"), want.sum(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(f(weight=weight, reduction="none"), want * weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(f(weight=weight), (want * weight).sum() / weight.sum(), rtol=1e-9, atol=1e-12)


def test_mse_is_a_squared_frobenius_norm():
    student, teacher = maps(widths=(4, 4), size=(3, 5), batch=1)
    a = torch.nn.functional.normalize(student.flatten(2)[0].T)
    b = torch.nn.functional.normalize(teacher.flatten(2)[0].T)
    want = torch.linalg.matrix_norm(a @ a.T - b @ b.T).square() / 15**2
    torch.testing.assert_close(pixel_relation_kd(student, teacher, distance="mse"), want)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_first_and_second_derivatives(similarity, distance):
    for cross_image in (False, True):
        student, teacher = maps(1)
        student = student.requires_grad_()
        f = lambda x, backend="auto", cross_image=cross_image, teacher=teacher: pixel_relation_kd(
            x,
            teacher,
            similarity=similarity,
            distance=distance,
            temperature=0.5,
            cross_image=cross_image,
            backend=backend,
        )
        assert gradcheck(f, (student,))
        assert gradgradcheck(lambda x, f=f: f(x, "reference"), (student,))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gram_form_has_the_derivatives_of_the_plain_formula(similarity, cross):
    for widths in ((4, 4), (4, 3)):
        a, b = (x.flatten(2).mT for x in maps(2, widths, size=(4, 3)))
        leaf = a.clone().requires_grad_()
        got = relation_mse_gram(leaf, b, similarity=similarity, cross=cross)
        want = relation(leaf, b, similarity=similarity, distance="mse", cross=cross)
        g = torch.rand_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, leaf, g)[0], torch.autograd.grad(want, leaf, g)[0], rtol=1e-9, atol=1e-12
        )
        small = leaf[:, :4].detach().requires_grad_()
        assert gradgradcheck(
            lambda x, b=b: relation_mse_gram(x, b[:, :4], similarity=similarity, cross=cross), (small,)
        )


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3])
def test_gram_form_is_accurate_near_the_teacher(difference):
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(1, 400, 16, generator=g)
    student = teacher + difference * torch.randn(1, 400, 16, generator=g)
    wide = torch.cat([teacher, torch.zeros(1, 400, 1)], 2)  # the same relations, but the widths differ
    for target in (teacher, wide):
        leaf, exact_leaf = student.clone().requires_grad_(), student.double().requires_grad_()
        got = relation_mse_gram(leaf, target, similarity="cosine")
        want = relation(exact_leaf, target.double(), distance="mse")
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=0)
        torch.testing.assert_close(got.mean().double(), want.mean(), rtol=2e-5, atol=0)
        got.mean().backward()
        want.mean().backward()
        error = (leaf.grad.double() - exact_leaf.grad).norm() / exact_leaf.grad.norm()
        assert error < 2e-4


@pytest.mark.parametrize("cross_image", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_student_has_zero_loss_and_gradient(distance, cross_image):
    teacher = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    for temperature in (0.05, 20.0):
        student = teacher.clone().requires_grad_()
        loss = pixel_relation_kd(student, teacher, distance=distance, cross_image=cross_image, temperature=temperature)
        loss.backward()
        assert abs(loss.item()) < 1e-6
        assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_propagate(value):
    for which in (0, 1):
        for distance in DISTANCES:
            for similarity in SIMILARITIES:
                pair = maps(4, (3, 3))
                pair[which][0, 0, 0, 0] = value
                assert not torch.isfinite(pixel_relation_kd(*pair, distance=distance, similarity=similarity))


def test_strided_and_low_precision_inputs():
    student, teacher = maps(5, (4, 3), (4, 4))
    want = pixel_relation_kd(student, teacher)
    wide = torch.zeros(4, 4, 4, 8, dtype=torch.float64)
    wide[::2, :, :, ::2] = student
    torch.testing.assert_close(pixel_relation_kd(wide[::2, :, :, ::2], teacher), want)
    torch.testing.assert_close(
        pixel_relation_kd(student.to(memory_format=torch.channels_last), teacher.flatten(2).view(2, 3, 4, 4)), want
    )
    one = teacher[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(pixel_relation_kd(student, one), pixel_relation_kd(student, one.contiguous()))
    for dtype in (torch.float16, torch.bfloat16):
        s, t = student.to(dtype), teacher.to(dtype)
        torch.testing.assert_close(
            pixel_relation_kd(s, t), pixel_relation_kd(s.float(), t.float()), rtol=1e-6, atol=1e-6
        )


def test_module_equals_the_function():
    student, teacher = maps(6)
    options = {"similarity": "mean", "distance": "row_cosine", "cross_image": True, "reduction": "sum"}
    torch.testing.assert_close(
        PixelRelationKD(**options)(student, teacher), pixel_relation_kd(student, teacher, **options)
    )
    weight = torch.rand(2, 6, dtype=torch.float64)
    torch.testing.assert_close(
        PixelRelationKD()(student, teacher, weight=weight), pixel_relation_kd(student, teacher, weight=weight)
    )
