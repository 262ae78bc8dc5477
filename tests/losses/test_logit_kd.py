"""logit_kd against a loop written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from loss_oracle import log_softmax
from torch.autograd import gradcheck, gradgradcheck

from fastkd.losses import LogitKD, logit, logit_kd

BACKENDS = ["reference", "auto"]


@pytest.fixture(autouse=True)
def _kernels_for_few_classes(monkeypatch):
    monkeypatch.setattr(logit, "FEW_CLASSES", 0)


def oracle(student, teacher, tau):
    """Return (B, N) from (B, K, ...)."""
    s, t = student.flatten(2), teacher.flatten(2)
    out = torch.zeros(s.shape[0], s.shape[2], dtype=torch.float64)
    for b in range(s.shape[0]):
        for n in range(s.shape[2]):
            z_s, z_t = s[b, :, n].tolist(), t[b, :, n].tolist()
            if len(z_s) == 1:
                z_s, z_t = [0.0, *z_s], [0.0, *z_t]
            ls, lt = log_softmax([v / tau for v in z_s]), log_softmax([v / tau for v in z_t])
            out[b, n] = tau**2 * sum(math.exp(p) * (p - q) for p, q in zip(lt, ls, strict=True) if math.exp(p) > 0)
    return out


def logits(k=3, seed=0, size=(2, 3)):
    g = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(2, k, *size, generator=g, dtype=torch.float64) for _ in range(2))


def some_pixels():
    mask = torch.ones(2, 2, 3, dtype=torch.bool)
    mask[0, 0] = mask[1, 1, 2] = False
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_option_equals_the_loop(k, tau, backend):
    student, teacher = logits(k)
    want = oracle(student, teacher, tau)
    f = lambda **more: logit_kd(student, teacher, temperature=tau, backend=backend, **more)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    close(f(), want.mean())
    close(f(reduction="sum"), want.sum())
    close(f(reduction="none"), want.view(2, 2, 3))
    mask = some_pixels()
    for shape in ((2, 2, 3), (2, 6)):
        valid = want[mask.view(2, 6)]
        close(f(pixel_mask=mask.view(shape)), valid.mean())
        close(f(pixel_mask=mask.view(shape), reduction="sum"), valid.sum())
        rows = f(pixel_mask=mask.view(shape), reduction="none")
        close(rows, (want * mask.view(2, 6)).view(2, 2, 3))
    flat = logit_kd(student.flatten(2), teacher.flatten(2), temperature=tau, reduction="none", backend=backend)
    close(flat, want)
    vector = logit_kd(student[..., 0, 0], teacher[..., 0, 0], temperature=tau, reduction="none", backend=backend)
    close(vector, want[:, 0])


def test_a_single_channel_is_a_sigmoid():
    student, teacher = logits(1)
    p, q = teacher.sigmoid(), student.sigmoid()
    want = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(logit_kd(student, teacher), want.mean())


@pytest.mark.parametrize("k", [1, 3])
def test_first_and_second_derivatives(k):
    student, teacher = logits(k, 1)
    leaf = student.requires_grad_()
    for mask in (None, some_pixels()):
        f = lambda x, mask=mask: logit_kd(x, teacher, temperature=1.5, pixel_mask=mask, backend="reference")
        assert gradcheck(f, (leaf,))
        assert gradgradcheck(f, (leaf,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_student_has_zero_loss_and_gradient(backend):
    teacher = torch.randn(2, 2, 8, 8)
    student = teacher.clone().requires_grad_()
    loss = logit_kd(student, teacher, temperature=3.0, backend=backend)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_one_hot_and_fp16_extremes(backend):
    inf = math.inf
    student = torch.tensor([[1.0, 2.0, -inf], [0.5, 0.0, -1.0], [0.0, -inf, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, 1.0, -inf], [-inf, 0.0, -inf], [0.0, 1.0, 0.0]])
    rows = logit_kd(student, teacher, reduction="none", backend=backend)
    lt, ls = log_softmax([0.5, 1.0]), log_softmax([1.0, 2.0])
    first = sum(math.exp(a) * (a - b) for a, b in zip(lt, ls, strict=True))
    torch.testing.assert_close(rows[:2], torch.tensor([first, -log_softmax([0.5, 0.0, -1.0])[1]]))
    assert rows[2] == inf
    rows[:2].sum().backward()
    assert torch.isfinite(student.grad).all()
    big = torch.tensor([[65504.0, -65504.0]]).half()
    leaf = big.flip(1).requires_grad_()
    loss = logit_kd(leaf, big, temperature=0.05, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(0.05 * 2 * 65504.0))
    loss.backward()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_propagate_unless_masked(value, backend):
    for which in (0, 1):
        pair = logits()
        pair[which][0, 1, 0, 0] = value
        rows = logit_kd(*pair, reduction="none", backend=backend)
        assert not torch.isfinite(rows[0, 0, 0])
        assert torch.isfinite(rows).sum() == 11
        leaf = pair[0].requires_grad_()
        loss = logit_kd(leaf, pair[1], pixel_mask=some_pixels(), backend=backend)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad[0, :, 0] == 0).all()


def test_padding_with_masked_pixels_changes_nothing():
    student, teacher = logits()
    pad = lambda x: torch.nn.functional.pad(x, (0, 4, 0, 1), value=math.nan)
    mask = torch.nn.functional.pad(some_pixels(), (0, 4, 0, 1))
    torch.testing.assert_close(
        logit_kd(pad(student), pad(teacher), pixel_mask=mask), logit_kd(student, teacher, pixel_mask=some_pixels())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_low_precision_inputs(backend):
    student, teacher = logits(4, 2, (4, 6))
    want = logit_kd(student, teacher, backend=backend)
    last = student.to(memory_format=torch.channels_last)
    torch.testing.assert_close(logit_kd(last, teacher, backend=backend), want)
    wide = torch.zeros(2, 8, 4, 12, dtype=torch.float64)
    wide[:, ::2, :, ::2] = student
    torch.testing.assert_close(logit_kd(wide[:, ::2, :, ::2], teacher, backend=backend), want)
    one = teacher[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        logit_kd(student, one, backend=backend), logit_kd(student, one.contiguous(), backend=backend)
    )
    s, t = student.bfloat16(), teacher.half()
    got = logit_kd(s, t, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logit_kd(s.float(), t.float(), backend=backend))


def test_module_equals_the_function():
    student, teacher = logits()
    mask = some_pixels()
    module = LogitKD(temperature=2.0, reduction="sum")
    torch.testing.assert_close(
        module(student, teacher, pixel_mask=mask),
        logit_kd(student, teacher, temperature=2.0, reduction="sum", pixel_mask=mask),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 3])
def test_classes_in_any_dimension(k, backend):
    student, teacher = logits(k)
    f = lambda s, t, **more: logit_kd(s, t, temperature=2.0, backend=backend, **more)
    rows = f(student, teacher, reduction="none")
    mask = some_pixels()
    for dim in (0, 2, 3, -1):
        s, t = (x.movedim(1, dim).contiguous() for x in (student, teacher))
        leaf = s.requires_grad_()
        torch.testing.assert_close(f(leaf, t, class_dim=dim, reduction="none"), rows)
        got = f(leaf, t, class_dim=dim, pixel_mask=mask)
        torch.testing.assert_close(got, f(student, teacher, pixel_mask=mask))
        other = student.detach().requires_grad_()
        (want,) = torch.autograd.grad(f(other, teacher, pixel_mask=mask), other)
        torch.testing.assert_close(torch.autograd.grad(got, leaf)[0].movedim(dim, 1), want)
    # Tokens of a language model: (B, T, V).
    words = [x.flatten(2).mT.contiguous() for x in (student, teacher)]
    torch.testing.assert_close(f(*words, class_dim=-1, reduction="none"), rows.flatten(1))
    assert f(*words, reduction="none").shape == (2, k)  # by default V is read as pixels


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_labels_in_every_layout(backend):
    student, teacher = logits(4)
    mask, f = some_pixels(), lambda s, t, **more: logit_kd(s, t, backend=backend, **more)
    labels = torch.where(mask, torch.arange(12).view(2, 2, 3), 255)
    rows = f(student, teacher, reduction="none")
    want = rows[mask].mean()
    torch.testing.assert_close(f(student, teacher, labels=labels, ignore_index=255), want)
    torch.testing.assert_close(f(student, teacher, labels=labels.where(mask, -100).int()), want)
    torch.testing.assert_close(LogitKD(ignore_index=255, backend=backend)(student, teacher, labels=labels), want)
    flat = (student.flatten(2), teacher.flatten(2))
    torch.testing.assert_close(f(*flat, labels=labels.flatten(1), ignore_index=255), want)
    words = LogitKD(class_dim=-1, ignore_index=255, backend=backend)
    torch.testing.assert_close(words(flat[0].mT, flat[1].mT, labels=labels.flatten(1)), want)
    both = mask.clone()
    both[0, 1] = False
    got = f(student, teacher, labels=labels, ignore_index=255, pixel_mask=both)
    torch.testing.assert_close(got, rows[mask & both].mean())
    # One row per sample, (B, K): a mask and labels of shape (B,). The values of skipped rows have no effect.
    vectors = [x.flatten(2).movedim(1, 2).flatten(0, 1) for x in (student, teacher)]
    vectors[0] = torch.where(mask.view(12, 1), vectors[0], math.nan).requires_grad_()
    for more in ({"pixel_mask": mask.view(12)}, {"labels": labels.view(12), "ignore_index": 255}):
        loss = f(*vectors, **more)
        torch.testing.assert_close(loss, want)
        (grad,) = torch.autograd.grad(loss, vectors[0])
        assert torch.isfinite(grad).all()
        assert (grad[~mask.view(12)] == 0).all()
