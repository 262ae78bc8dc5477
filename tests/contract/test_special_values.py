"""Test the operator contract for every loss on every backend: special values.

Point 6 (NaN and Inf propagate), masks, −inf logits, one-hot teachers, student equal to teacher, large logits, fp16
extremes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract_cases import REPRESENTATIVE
from contract_problems import Case, Problem
from contract_tools import error
from torch import Tensor

from fastkd.losses import attention_kd, cross_modal_kd_from_logits, logit_kd

INF, NAN = math.inf, math.nan
TEMPERATURES = (0.05, 1.0, 20.0)


def has_several_logits(case: Case) -> bool:
    """Return whether a softmax keeps at least two logits after one is set to −inf."""
    one_channel = case.loss is logit_kd and case.shapes(*case.sizes["small"])[0][1] < 3
    return case.takes_logits and not one_channel


def first_order(case: Case) -> Case:
    """Return the case without second-order terms, which are finite where a KL is not."""
    return case.at(terms={"pixel_to_word": 1.0, "word_to_pixel": 1.0}) if "terms" in case.options else case


def with_students(problem: Problem, *students: Tensor) -> Problem:
    return problem.replaced(*students, *problem.args[problem.students :])


def reference_of(problem: Problem) -> list[Tensor]:
    """Return the reference's results in fp64: the eager formula would compute 0·(−inf)."""
    masks = {k: tuple(m.cpu() for m in v) if isinstance(v, tuple) else v.cpu() for k, v in problem.masks.items()}
    return Problem(problem.case, [x.detach().cpu().double() for x in problem.args], masks).run("reference")


# --- student = teacher ------------------------------------------------------------------------------------------------


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_student_equal_to_teacher(setting: Any, scale: float) -> None:
    """Loss and gradient are 0, up to rounding, at every size."""
    for size in setting.case.sizes:
        problem = setting.case.problem(size, device=setting.place.device, scale=scale)
        n = problem.students
        teacher = problem.args[n:]
        if [x.shape for x in teacher] != [x.shape for x in problem.args[:n]]:
            teacher = problem.args[:n]  # compare the student with itself
        if len({str(m) for v in problem.masks.values() if isinstance(v, tuple) for m in v}) > 1:
            problem.masks["word_mask"] = (problem.masks["word_mask"][0],) * 2
        tau2 = setting.case.temperature**2
        loss, *grads = problem.replaced(*(x.clone() for x in teacher), *teacher).run(setting.place.backend)
        assert loss.abs().max() <= 4 * problem.magnitude() * torch.finfo(torch.float32).eps
        for grad, x in zip(grads, teacher, strict=True):
            # The gradient of an input is a sum of softmaxes that agree up to rounding, times the other operand.
            size_of = max(y.abs().max().item() for y in teacher) ** 2 / x.abs().max().item()
            natural = max(tau2, 1.0) / setting.case.temperature * problem.condition() * max(size_of, 1.0)
            assert grad.abs().max() <= 8 * natural * torch.finfo(torch.float32).eps * weight_of(setting.case)


def weight_of(case: Case) -> float:
    return sum(case.options.get("terms", {"": 1.0}).values()) + 4.0 * (case.options.get("distance") == "mse")


# --- large and extreme numbers ----------------------------------------------------------------------------------------


@pytest.mark.applies(lambda setting: setting.case.takes_logits)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_large_logits(setting: Any, temperature: float) -> None:
    """Rows shifted by up to ±1e4, differently for student and teacher: only differences within a row matter."""
    problem = first_order(setting.case).at(temperature=temperature).problem(device=setting.place.device, scale=3.0)
    levels = torch.tensor([1e4, -1e4, 9e3, -7e3, 0.0], device=setting.place.device)
    args = []
    for side, x in enumerate(problem.args):
        x = x.movedim(1, -1).contiguous() if setting.case.loss is logit_kd else x.contiguous()
        rows = torch.arange(x.numel() // x.shape[-1], device=x.device)
        x = x + levels[(rows + 2 * side) % 5].view(*x.shape[:-1], 1)
        args.append(x.movedim(-1, 1) if setting.case.loss is logit_kd else x)
    problem = problem.replaced(*args)
    got, exact, plain = problem.run(setting.place.backend), problem.exact(), problem.plain()
    unit = 1e4 / temperature * torch.finfo(torch.float32).eps  # one ulp of the logits / τ
    for i, (a, b, c) in enumerate(zip(got, exact, plain, strict=True)):
        size = max(temperature**2, 1.0) if i == 0 else max(b.abs().max().item(), 1e-2)
        assert a.isfinite().all()
        assert error(a, b) <= 2 * error(c, b) + 2 * unit * size


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp16_extremes(setting: Any, dtype: torch.dtype) -> None:
    """Inputs of ±65504 do not overflow unless the exact gradient exceeds the range of fp16."""
    for temperature in TEMPERATURES[::2] if setting.place.is_simulated else TEMPERATURES:
        problem = setting.case.at(temperature=temperature).problem(dtype=torch.float32, device=setting.place.device)
        problem = problem.mapped(lambda x: (x.sign() * 65504).to(dtype))
        loss, *grads = problem.run(setting.place.backend)
        exact_loss, *exact = reference_of(problem)
        assert loss.isfinite().all()
        assert (
            error(loss, exact_loss) <= 1e-4 * max(exact_loss.abs().max().item(), 1.0) + 16 * problem.magnitude() * 1e-7
        )
        for grad, want in zip(grads, exact, strict=True):
            if want.abs().max() < 1e9:  # otherwise summands that cancel exceed fp16
                assert grad[want.abs().to(grad.device) < 6e4].isfinite().all()


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting: setting.case.has_cosines)
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_cosines_are_scale_invariant(setting: Any, scale: float) -> None:
    """Norms whose squares approach the limits of fp32."""
    problem = setting.case.problem(device=setting.place.device)
    scaled = problem.mapped(lambda x: x * (scale if scale > 1 else 1e-6))
    want, got = problem.run(setting.place.backend)[0], scaled.run(setting.place.backend)[0]
    if not setting.case.options.get("weight"):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=16 * problem.magnitude() * 6e-8)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_rows_of_zeros(setting: Any) -> None:
    """A channel, pixel or word of zeros has cosine 0 with all others, no gradient and no NaN."""
    problem = setting.case.problem(device=setting.place.device)
    for dim in (1, 2):
        args = [x.clone() for x in problem.args]
        for x in args:
            x.select(dim, 0).zero_()
        dead = problem.replaced(*args)
        got, want = dead.run(setting.place.backend), reference_of(dead)
        assert all(x.isfinite().all() for x in got)
        dead.assert_near(got, want, ulps=32)
    zeros = problem.mapped(torch.zeros_like)
    problem.assert_near(zeros.run(setting.place.backend), reference_of(zeros), min_size=1.0)


# --- −inf, one-hot, NaN and Inf ---------------------------------------------------------------------------------------


@pytest.mark.applies(lambda setting: has_several_logits(setting.case))
def test_minus_infinity_logits(setting: Any) -> None:
    """−inf in both, or in the teacher alone (0·log 0 = 0): finite. In the student alone: inf."""
    case = first_order(setting.case).at(temperature=0.7)
    problem = case.problem(device=setting.place.device)
    column = 1 if case.loss is logit_kd else -1
    for whose, is_finite in (("both", True), ("teacher", True), ("student", False)):
        args = [x.clone() for x in problem.args]
        for side, x in enumerate(args):
            if whose in ("both", ("student", "teacher")[side]):
                x.select(column, 1)[..., -1] = -INF
        changed = problem.replaced(*args)
        loss, *grads = changed.run(setting.place.backend)
        want, *exact = reference_of(changed)
        torch.testing.assert_close(loss.cpu().double(), want, rtol=1e-5, atol=1e-5)
        assert bool(loss.isfinite().all()) == is_finite
        if is_finite:
            for a, b in zip(grads, exact, strict=True):
                torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.applies(lambda setting: has_several_logits(setting.case))
@pytest.mark.parametrize("peak", [1e4, INF])
def test_one_hot_teachers(setting: Any, peak: float) -> None:
    case = first_order(setting.case)
    case = case.at(terms={"pixel_to_word": 1.0}) if "terms" in case.options else case
    problem = case.problem(device=setting.place.device)
    teacher = torch.full_like(problem.args[1], -peak)
    teacher.select(1 if case.loss is logit_kd else -1, 1).fill_(1e4 if peak != INF else 0.0)
    hot = problem.replaced(problem.args[0], teacher)
    loss, grad = hot.run(setting.place.backend)
    want, exact = reference_of(hot)
    assert loss.isfinite().all()
    torch.testing.assert_close(loss.cpu().double(), want, rtol=1e-5, atol=5e-3)  # of terms near 1e4
    torch.testing.assert_close(grad.cpu().double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting, value: not (setting.place.is_simulated and value == -INF))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_infinity_propagate(setting: Any, value: float) -> None:
    """One non-finite input element makes the same losses non-finite as in the reference."""
    problem = setting.case.problem(device=setting.place.device)
    for index, x in enumerate(problem.args):
        for position in (0, -1):
            bad = x.clone()
            bad[0].view(-1)[position] = value
            args = list(problem.args)
            args[index] = bad
            changed = problem.replaced(*args)
            loss, *grads = changed.run(setting.place.backend)
            want, *_ = reference_of(changed)
            assert torch.equal(loss.cpu().isfinite(), want.isfinite())
            if value != value:
                assert torch.equal(loss.cpu().isnan(), want.isnan())
                if want.isnan().any() and index < problem.students:
                    assert grads[index].isnan().any()


# --- masks ------------------------------------------------------------------------------------------------------------


def padded(problem: Problem, pixels: int, words: int, fill: float) -> Problem:
    """Return the problem with masked pixels and words appended that hold ``fill``."""
    case, n = problem.case, problem.students

    def more(x: Tensor, dim: int, count: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = count
        return torch.cat([x, x.new_full(shape, fill if x.dtype != torch.bool else 0)], dim)

    args = list(problem.args)
    if case.loss is logit_kd:
        args = [more(x, 3, pixels) for x in args]
    elif case.loss is attention_kd:
        args = [more(x, 2, words if i % n else pixels) for i, x in enumerate(args)]  # keys, queries
    elif case.loss is cross_modal_kd_from_logits:
        args = [more(more(x, -1, words), -2, pixels) for x in args]
    else:
        args = [more(x, 1, pixels if i % n == 0 and "pixel_mask" in problem.masks else 0) for i, x in enumerate(args)]
        args = [more(x, 1, words if i % n == 1 else 0) for i, x in enumerate(args)]
    masks = {}
    for name, mask in problem.masks.items():
        count = pixels if name in ("pixel_mask", "query_mask") else words
        masks[name] = tuple(more(m, 1, count) for m in mask) if isinstance(mask, tuple) else more(mask, -1, count)
    return Problem(case, args, masks)


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting, fill: setting.case.has_masks and not (setting.place.is_simulated and fill == fill))
@pytest.mark.parametrize("fill", [0.0, 1e30, NAN, INF, -INF])
@pytest.mark.parametrize(("pixels", "words"), [(3, 0), (0, 2), (40, 70)])
def test_masked_padding_changes_nothing(setting: Any, pixels: int, words: int, fill: float) -> None:
    problem = setting.case.problem(device=setting.place.device)
    loss, *grads = problem.run(setting.place.backend)
    more = padded(problem, pixels, words, fill)
    more_loss, *more_grads = more.run(setting.place.backend)
    kept = [x[tuple(slice(0, size) for size in like.shape)] for x, like in zip(more_grads, grads, strict=True)]
    if more_loss.shape != loss.shape:  # the rows of logit_kd are pixels
        assert (more_loss[..., loss.shape[-1] :] == 0).all()
        more_loss = more_loss[..., : loss.shape[-1]]
    problem.assert_near([more_loss, *kept], [loss, *grads])
    total = sum(x.abs().sum() for x in more_grads)
    torch.testing.assert_close(total, sum(x.abs().sum() for x in kept))  # gradients of the padding are 0


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting: setting.case.has_masks)
@pytest.mark.parametrize("fill", [1e30, NAN, INF, -INF])
def test_masked_values_change_nothing(setting: Any, fill: float) -> None:
    problem = setting.case.problem(device=setting.place.device)
    want = problem.run(setting.place.backend)
    n, case = problem.students, setting.case
    word = problem.masks.get("word_mask")
    words = word if isinstance(word, tuple) else (word, word)
    pixel = problem.masks.get("pixel_mask")
    args = []
    for i, x in enumerate(problem.args):
        keep = torch.ones_like(x, dtype=torch.bool)
        if case.loss is logit_kd:
            keep &= pixel[:, None]
        elif case.loss is attention_kd:
            keep &= problem.masks["key_mask" if i % n else "query_mask"][:, None, :, None]
        elif case.loss is cross_modal_kd_from_logits:
            heads = [1] * (x.dim() - 3)
            keep &= pixel.view(x.shape[0], *heads, -1, 1) & words[i // n].view(x.shape[0], *heads, 1, -1)
        else:
            mask = words[i // n] if i % n == 1 else pixel
            keep &= torch.ones((), dtype=torch.bool, device=x.device) if mask is None else mask[..., None]
        args.append(torch.where(keep, x, fill))
    problem.assert_near(problem.replaced(*args).run(setting.place.backend), want)


@pytest.mark.applies(lambda setting: setting.case.has_masks)
def test_mask_with_one_valid_pixel_and_word(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device)

    def only(mask: Any) -> Any:
        if isinstance(mask, tuple):
            return tuple(only(m) for m in mask)
        one = torch.zeros_like(mask).flatten(1)
        one[:, 1] = True
        return one.view_as(mask)

    masks = {name: only(mask) for name, mask in problem.masks.items()}
    one = Problem(problem.case, problem.args, masks)
    got = one.run(setting.place.backend)
    one.assert_near(got, one.exact(), min_size=1.0)


@pytest.mark.applies(lambda setting: setting.case.has_masks)
def test_all_true_masks_equal_no_masks(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device)
    full = lambda m: tuple(torch.ones_like(x) for x in m) if isinstance(m, tuple) else torch.ones_like(m)
    masked = Problem(problem.case, problem.args, {k: full(m) for k, m in problem.masks.items()})
    bare = Problem(problem.case, problem.args, {})
    problem.assert_near(masked.run(setting.place.backend), bare.run(setting.place.backend))
