"""Test the operator contract for every loss on every backend: gradients.

Points 1 (a teacher that requires grad), 2 (per-row gradients of any strides), 3 (inputs and saved tensors are not
modified; a second backward gives the same bits) and 5 (double backward). Under ``no_grad`` nothing is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import ONE_PER_LOSS, REPRESENTATIVE, Setting
from contract_problems import Case, Problem
from contract_tools import Recorder, assert_same, saved_for_backward, tensors_in
from torch import Tensor


def leaves_of(setting: Setting, **options: Any) -> Problem:
    return setting.case.problem(device=setting.place.device, **options).leaves()


def backwards(problem: Problem, loss: Tensor, weight: Tensor | None = None, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, problem.args[: problem.students], weight, **options))


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting: setting.supports(torch.float64))
def test_gradcheck(setting: Any) -> None:
    """Check the derivative of every row with respect to every input element, in fp64."""
    problem = leaves_of(setting, size="tiny", dtype=torch.float64)
    n = problem.students
    assert torch.autograd.gradcheck(
        lambda *own: problem.replaced(*own, *problem.args[n:]).loss(setting.place.backend), tuple(problem.args[:n])
    )


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_gradient_of_each_row(setting: Any) -> None:
    """A one-hot row gradient gives the gradient of that row; the gradients of all rows add up to the total."""
    problem = leaves_of(setting)
    rows = problem.loss(setting.place.backend)
    total = [torch.zeros_like(x) for x in problem.args[: problem.students]]
    for row in range(rows.numel()):
        one = torch.zeros_like(rows).flatten()
        one[row] = 1.0
        one = one.view_as(rows)
        got = backwards(problem, rows, one, retain_graph=True)
        if row in (0, rows.numel() - 1):
            problem.assert_near(got, problem.exact(one)[1:], ulps=32)
        total = [a + b for a, b in zip(total, got, strict=True)]
    problem.assert_near(total, problem.exact()[1:], ulps=32)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_row_gradients_of_any_strides(setting: Any) -> None:
    """Expanded (stride 0, as from .sum() and .mean()), transposed, strided and zero row gradients."""
    problem = leaves_of(setting)
    rows = problem.loss(setting.place.backend)
    like = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(rows.device)
    flipped = like(*rows.shape[::-1])
    spaced = like(*rows.shape[:-1], 2 * rows.shape[-1])
    for weight in (
        like().expand(rows.shape),
        like(*rows.shape[1:]).expand(rows.shape),
        like(rows.shape[0], *[1] * (rows.dim() - 1)).expand(rows.shape),
        flipped.permute(*range(rows.dim())[::-1]),
        spaced[..., 1::2],
        torch.zeros_like(rows),
    ):
        got = backwards(problem, rows, weight, retain_graph=True)
        problem.assert_near(got, problem.exact(weight)[1:], ulps=32)
    contiguous = backwards(problem, rows, torch.full_like(rows, 0.5), retain_graph=True)
    assert_same(backwards(problem, rows, rows.new_full((), 0.5).expand(rows.shape), retain_graph=True), contiguous)
    problem.assert_near(backwards(problem, rows.sum(), retain_graph=True), problem.exact()[1:], ulps=32)
    count = torch.tensor(1 / rows.numel())
    problem.assert_near(backwards(problem, rows.mean()), problem.exact(count.expand(rows.shape))[1:], ulps=32)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_negative_row_gradients_give_the_negative_gradient(setting: Any) -> None:
    """To the last bit, so that neither sign is less accurate."""
    problem = leaves_of(setting)
    rows, weight = problem.loss(setting.place.backend), problem.weight()
    positive = backwards(problem, rows, weight.to(rows), retain_graph=True)
    assert_same([-x for x in backwards(problem, rows, -weight.to(rows))], positive)


@pytest.mark.simulated_cases(ONE_PER_LOSS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(setting: Any, reduction: str) -> None:
    problem = leaves_of(setting)
    none = problem.loss(setting.place.backend)
    if reduction == "sum":
        want = none.sum()
    elif problem.case.loss.__name__ == "logit_kd" and problem.masks:
        want = none.sum() / problem.masks["pixel_mask"].sum()
    elif problem.case.loss.__name__ == "attention_kd" and problem.masks:
        want = none.sum() / (problem.masks["query_mask"].sum() * none.shape[1])
    else:  # Attention weights have mean 1 already.
        want = none.mean()
    loss = problem.loss(setting.place.backend, reduction)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    problem.assert_near(backwards(problem, loss), backwards(problem, want), ulps=32)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_gradient_of_one_input(setting: Any) -> None:
    """With one student input constant, the gradient of the other is unchanged."""
    problem = leaves_of(setting)
    n = problem.students
    got: list[Tensor] = []
    for kept in range(n):
        args = [x.detach().requires_grad_(i == kept) for i, x in enumerate(problem.args)]
        loss = problem.replaced(*args).loss(setting.place.backend).sum()
        (grad,) = torch.autograd.grad(loss, args[kept])
        got.append(grad)
    problem.assert_near(got, problem.run(setting.place.backend)[1:])


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_second_backward_gives_same_bits(setting: Any) -> None:
    problem = leaves_of(setting)
    rows = problem.loss(setting.place.backend)
    weight = problem.weight().to(rows.dtype)
    first = backwards(problem, rows, weight, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.fill_(torch.nan)  # detects a gradient that is reused as a buffer
    assert_same(backwards(problem, rows, weight, retain_graph=True), kept)
    backwards(problem, rows, 2 * weight, retain_graph=True)
    assert_same(backwards(problem, rows, weight), kept)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_inputs_and_saved_tensors_are_not_modified(setting: Any) -> None:
    problem = leaves_of(setting)
    with saved_for_backward() as saved:
        rows = problem.loss(setting.place.backend)
    weight = problem.weight().to(rows.dtype)
    watched = [*problem.args, *tensors_in(list(problem.masks.values())), weight, *saved]
    before = [(x, x._version, x.detach().clone()) for x in watched]
    backwards(problem, rows, weight, retain_graph=True)
    backwards(problem, rows, weight)
    for x, version, copy in before:
        assert x._version == version
        torch.testing.assert_close(x.detach(), copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_inplace_change_before_backward_is_detected(kernel_setting: Any) -> None:
    """The backward raises an error, or returns the right gradient if the forward saved a copy."""
    problem = kernel_setting.case.problem(device=kernel_setting.place.device).leaves()
    n = problem.students
    want = problem.run(kernel_setting.place.backend)[1:]
    alive = [x * 1 for x in problem.args[:n]]
    loss = problem.replaced(*alive, *problem.args[n:]).loss(kernel_setting.place.backend).sum()
    with torch.no_grad():
        for x in alive:
            x.mul_(2)
    try:
        got = backwards(problem, loss)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert_same(got, want)


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_saves_nothing(setting: Any, mode: Callable[[], Any]) -> None:
    problem = leaves_of(setting)
    want = problem.loss(setting.place.backend).detach()
    with mode(), saved_for_backward() as saved, Recorder() as recorder:
        rows = problem.loss(setting.place.backend)
    assert not rows.requires_grad
    assert not saved
    torch.testing.assert_close(rows.clone(), want, rtol=1e-6, atol=1e-6)
    if setting.place.backend != "reference":
        assert all("backward" not in str(call[0]) for call in recorder.calls)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_no_grad_computes_nothing_for_backward(kernel_setting: Any) -> None:
    """The forward operators return a few numbers per row at every size, and no matrix."""
    for size in kernel_setting.case.sizes:
        problem = kernel_setting.case.problem(size, device=kernel_setting.place.device)
        with torch.no_grad(), Recorder() as recorder:
            problem.loss(kernel_setting.place.backend)
        for _, args, result in recorder.calls:
            rows = sum(x.numel() // x.shape[-1] for x in tensors_in(args) if x.dim() > 1)
            pairs = problem.args[0].shape[0] if kernel_setting.case.options.get("cross_image") else 1
            allowed = 40 * rows * pairs + 64
            if kernel_setting.case.options.get("distance") == "mse":  # computed from K×K Gram matrices, in tiles
                narrow = max(min(x.shape[-1], x.shape[-2]) for x in tensors_in(args) if x.dim() == 3)
                allowed += 32 * (-(-narrow // 32) * 32) ** 2
            assert sum(x.nbytes for x in tensors_in(result)) <= allowed


@pytest.mark.simulated_cases(ONE_PER_LOSS)
def test_constant_student_saves_nothing(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device)
    problem.loss(setting.place.backend)  # the self-test of the backend saves tensors too
    with saved_for_backward() as saved:
        rows = problem.loss(setting.place.backend)
    assert not rows.requires_grad
    assert not saved


@pytest.mark.simulated_cases(ONE_PER_LOSS)
def test_double_backward(setting: Any) -> None:
    """The reference is differentiable twice; kernels raise an error instead of returning zeros."""
    problem = leaves_of(setting, dtype=torch.float64 if setting.supports(torch.float64) else torch.float32)
    grads = backwards(problem, problem.loss(setting.place.backend).sum(), create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    if setting.place.backend == "reference":
        second = torch.autograd.grad(penalty, problem.args[: problem.students])
        assert all(x.isfinite().all() for x in second)
    else:
        with pytest.raises(RuntimeError, match='backend="reference"'):
            penalty.backward()


@pytest.mark.simulated_cases(ONE_PER_LOSS)
def test_rejects_teacher_that_requires_grad(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device).leaves()
    n = problem.students
    for index in range(n, 2 * n):
        args = list(problem.args)
        args[index] = args[index].detach().requires_grad_()
        with Recorder() as recorder, pytest.raises(ValueError, match=r"teacher\w*: requires grad.*detach"):
            problem.replaced(*args).loss(setting.place.backend)
        assert not recorder.calls
        with torch.no_grad():
            problem.replaced(*args).loss(setting.place.backend)


@pytest.mark.applies(lambda setting: setting.case.has_equal_shapes)
def test_gradient_near_teacher_is_relatively_accurate(setting: Any) -> None:
    """Gradients keep their relative accuracy where the loss is as small as its rounding error."""
    case: Case = setting.case
    problem = case.problem(device=setting.place.device)
    n = problem.students
    teacher = problem.args[n:]
    near = problem.replaced(*(t + 1e-3 * s for s, t in zip(problem.args[:n], teacher, strict=True)), *teacher)
    got, exact, plain = (x[1:] for x in (near.run(setting.place.backend), near.exact(), near.plain()))
    for a, b, c in zip(got, exact, plain, strict=True):
        relative = lambda x, b=b: ((x.cpu().double() - b).norm() / b.norm().clamp_min(1e-30)).item()
        assert relative(a) <= 2 * relative(c) + 1e-4
        assert relative(a) <= 5e-3
