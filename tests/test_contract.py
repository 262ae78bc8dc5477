"""The operator contract, for every loss on every backend: right answers. Its other points have files of their own.

| point | tested in |
|---|---|
| 1 dtypes, 9 error against fp64 | here |
| 2 per-row gradients; 3 functional; 8 teachers that require grad | ``test_contract_gradients.py`` |
| 3 every output element is written; 6 offsets and layouts; memory | ``test_contract_memory.py`` |
| 4 the same bits every time | ``test_contract_determinism.py`` |
| 5 streams, CUDA graphs; 7 ``torch.library``, ``torch.compile``, autocast, DDP, pickling | ``test_contract_torch.py`` |
| 8 NaN and Inf; masks, −inf logits, one-hot teachers, extremes | ``test_contract_values.py`` |
| random shapes, strides, dtypes, temperatures | ``test_contract_random.py`` |
| bad input | ``test_contract_errors.py``, ``test_losses_errors.py`` |

The cases are in ``helpers/contract_cases.py``, the formulas they are held against in ``helpers/contract_formulas.py``.
A backend is in all of this by its row in ``fastkd.ops._backends.IMPLEMENTED``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_cases import BASIC, CASES, DTYPES, Problem
from contract_tools import Recorder, arithmetic, error, needs, rounding, roundings

from fastkd.ops import _backends


def check_errors(problem: Problem, backend: str) -> None:
    """Point 9, on the losses of the rows and on the gradients of their weighted sum."""
    dtype = problem.args[0].dtype
    weight = problem.weight()
    got, exact = problem.run(backend, weight), problem.exact(weight)
    assert [x.dtype for x in got] == [arithmetic(dtype)] + [dtype] * problem.students
    assert [x.shape for x in got[1:]] == [x.shape for x in problem.args[: problem.students]]
    errors = [error(a, b) for a, b in zip(got, exact, strict=True)]
    stored = [1.01 * rounding(b, a.dtype) for a, b in zip(got, exact, strict=True)]
    noise = fp32_noise(problem, weight)
    # The hard ceiling. fp16 and bf16 inputs too are computed in fp32, so theirs is fp32's, and the gradient's rounding
    # with that of what it is made from.
    ceilings = [stored[0]] + [roundings(problem.case.family, backend, dtype) * one for one in stored[1:]]
    smaller = torch.finfo(arithmetic(dtype)).eps / torch.finfo(torch.float32).eps
    # In fp64 a log-sum-exp is one number, in fp32 it is kept in more digits: the exponential of a large one shows it.
    saturated = 4 * problem.condition() * rounding(problem.slope(), dtype) if dtype == torch.float64 else 0.0
    for mine, storing, one in zip(errors, ceilings, noise, strict=True):
        assert mine <= storing + 8 * smaller * one + saturated
    if dtype == torch.float64:
        return  # there the plain formula is the oracle
    # An entry or two can make the plain formula exact by luck, hence the noise.
    plain = [error(a, b) for a, b in zip(problem.plain(weight), exact, strict=True)]
    for mine, storing, one, users in zip(errors, stored, noise, plain, strict=True):
        assert mine <= 2 * users + storing + 2 * one


def fp32_noise(problem: Problem, weight: torch.Tensor) -> list[float]:
    """How far fp32 arithmetic may be expected to be from the losses and gradients: the plain formula's error in it."""
    problem = problem.mapped(lambda x: x.float())
    exact, plain = problem.exact(weight), problem.plain(weight)
    largest = max(1e-6, *(b.abs().max().item() for b in exact[1:]))  # where one gradient is 0, what cancels is not
    sizes = [problem.magnitude()] + [problem.condition() * largest] * problem.students
    noise = [error(a, b) for a, b in zip(plain, exact, strict=True)]
    assert all(one <= 1e-4 * size + 1e-6 for one, size in zip(noise, sizes, strict=True))  # a case that means something
    return [max(one, rounding(size, torch.float32)) for one, size in zip(noise, sizes, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_fp64(setting: Any, dtype: torch.dtype) -> None:
    needs(setting, dtype)
    for size in setting.case.sizes:
        problem = setting.case.problem(size, dtype=dtype, device=setting.place.device)
        check_errors(problem, setting.place.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_at_any_temperature(setting: Any, dtype: torch.dtype) -> None:
    if setting.case.options.get("distance", "kl") != "kl":
        pytest.skip("no temperature in this distance")
    needs(setting, dtype)
    for temperature in (0.05, 1.0, 4.0, 20.0):
        problem = setting.case.at(temperature=temperature).problem(dtype=dtype, device=setting.place.device)
        check_errors(problem, setting.place.backend)


def test_mixed_dtypes_are_promoted(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device)
    half = [x.half() if i % 2 == 0 else x.bfloat16() for i, x in enumerate(problem.args)]
    for student, teacher, want in ((torch.float16, torch.bfloat16, torch.float32),
                                   (torch.float32, torch.float16, torch.float32),
                                   (torch.bfloat16, torch.float64, torch.float64)):  # fmt: skip
        if not setting.takes(want):
            continue
        n = problem.students
        mixed = problem.replaced(*(x.to(student) for x in half[:n]), *(x.to(teacher) for x in half[n:]))
        wide = mixed.mapped(lambda x, want=want: x.to(want))
        loss, *grads = mixed.run(setting.place.backend)
        same_loss, *same_grads = wide.run(setting.place.backend)
        assert loss.dtype == want
        assert torch.equal(loss, same_loss)
        for grad, same in zip(grads, same_grads, strict=True):
            assert grad.dtype == student
            torch.testing.assert_close(grad, same.to(student), rtol=2 * torch.finfo(student).eps, atol=1e-7)


@pytest.mark.parametrize("wrong", ["loss off by 1e-4", "gradient off by 1e-3", "gradient of the wrong weights"])
def test_the_checks_tell_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    honest = Problem.run

    def broken(self: Problem, backend: str, weight: torch.Tensor) -> list[torch.Tensor]:
        if wrong.endswith("weights"):
            return honest(self, backend, torch.full_like(weight, weight.mean().item()))
        loss, *grads = honest(self, backend, weight)
        return [loss * (1 + 1e-4), *grads] if wrong.startswith("loss") else [loss, *(g * (1 + 1e-3) for g in grads)]

    for case in BASIC.values():
        check_errors(case.problem(), "reference")
        with monkeypatch.context() as patch:
            patch.setattr(Problem, "run", broken)
            with pytest.raises(AssertionError):
                check_errors(case.problem(), "reference")


def test_kernels_are_called_by_name_and_the_reference_calls_none(setting: Any) -> None:
    recorder = Recorder()
    with recorder:
        setting.case.problem(device=setting.place.device).run(setting.place.backend)
    assert bool(recorder.calls) == (setting.place.backend != "reference")


def test_every_family_and_loss_has_a_case() -> None:
    from fastkd import losses

    assert {case.family for case in CASES} == set(_backends.IMPLEMENTED)
    assert {case.loss.__name__ for case in CASES} == {n for n in losses.__all__ if n.endswith(("_kd", "_logits"))}
    assert {case.twin for case in CASES} - {None} == {
        v for n in losses.__all__ if isinstance(v := getattr(losses, n), type)
    }
    assert len({case.name for case in CASES}) == len(CASES)


def test_oracle_equals_the_reference() -> None:
    """Two independent ways to each number; the loop formulas of ``test_*_kd.py`` are the third."""
    for case in CASES:
        for size in case.sizes:
            problem = case.problem(size, dtype=torch.float64)
            for got, want in zip(problem.run("reference"), problem.exact(), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
