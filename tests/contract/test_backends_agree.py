"""Test the operator contract (docs/architecture.md) for every loss on every backend: accuracy.

| point | tested in |
|---|---|
| 1 dtypes; 6 error against fp64 | here |
| 1 teachers that require grad; 2 per-row gradients; 3 inputs unchanged; 5 double backward | ``test_gradients.py`` |
| 1 strides; 2 saved tensors; 3 every output element is written; 4 64-bit offsets | ``test_memory.py`` |
| 3 bit-identical results | ``test_determinism.py`` |
| 4 streams, CUDA graphs; 5 ``torch.library``, ``torch.compile``; autocast, DDP | ``test_torch_integration.py`` |
| 6 NaN and Inf; masks, −inf logits, one-hot teachers, extreme values | ``test_special_values.py`` |
| random shapes, strides, dtypes, temperatures | ``test_random_inputs.py`` |
| invalid input | ``test_contract_errors.py``, ``losses/test_losses_errors.py`` |

Cases are listed in ``helpers/contract_cases.py``, the formulas they are compared with in
``helpers/contract_formulas.py``. A backend is tested as soon as it is listed in ``fastkd.ops.backends.BACKENDS``.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from contract_cases import BASIC, CASES, DTYPES, PLAIN, REPRESENTATIVE
from contract_errors import compare_with_fp64
from contract_problems import Problem
from contract_tools import Recorder, error, rounding

from fastkd.ops import dispatch


def check_errors(problem: Problem, backend: str) -> None:
    """Assert the error bounds (point 6) of the per-row losses and of the gradients of their weighted sum."""
    weight = problem.weight()
    for output in compare_with_fp64(problem, backend, problem.run(backend, weight), weight):
        assert output.error <= output.allowed, output[:3]


@pytest.mark.applies(
    lambda setting, dtype: (
        setting.supports(dtype)
        and (not setting.place.is_simulated or dtype == torch.float32 or setting.case.name in REPRESENTATIVE)
    )
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_fp64(setting: Any, dtype: torch.dtype) -> None:
    for size in setting.case.sizes:
        problem = setting.case.problem(size, dtype=dtype, device=setting.place.device)
        check_errors(problem, setting.place.backend)


@pytest.mark.applies(
    lambda setting, scale: setting.case.options.get("distance") == "row_cosine" and not setting.case.has_cosines
)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_error_where_the_networks_differ_in_magnitude(setting: Any, scale: float) -> None:
    """The distance of directions does not depend on a network's scale, nor does the relative error."""
    problem = setting.case.problem(device=setting.place.device)
    n = problem.students
    scaled = problem.replaced(*(scale * x for x in problem.args[:n]), *problem.args[n:])
    got, exact, plain = scaled.run(setting.place.backend), scaled.exact(), scaled.plain()
    for a, b, c in zip(got, exact, plain, strict=True):
        assert error(a, b) <= 2 * error(c, b) + 4 * rounding(b, torch.float32)


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting, dtype: setting.case.is_kl and setting.covers(dtype))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_at_any_temperature(setting: Any, dtype: torch.dtype) -> None:
    for temperature in (0.05, 20.0) if setting.place.is_simulated else (0.05, 1.0, 4.0, 20.0):
        problem = setting.case.at(temperature=temperature).problem(dtype=dtype, device=setting.place.device)
        check_errors(problem, setting.place.backend)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_mixed_dtypes_are_promoted(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device)
    half = [x.half() if i % 2 == 0 else x.bfloat16() for i, x in enumerate(problem.args)]
    for student, teacher, want in ((torch.float16, torch.bfloat16, torch.float32),
                                   (torch.float32, torch.float16, torch.float32),
                                   (torch.bfloat16, torch.float64, torch.float64),
                                   (torch.float64, torch.float16, torch.float64)):  # fmt: skip
        if not setting.supports(want):
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
def test_checks_detect_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    correct_run = Problem.run

    def broken(self: Problem, backend: str, weight: torch.Tensor) -> list[torch.Tensor]:
        if wrong.endswith("weights"):
            return correct_run(self, backend, torch.full_like(weight, weight.mean().item()))
        loss, *grads = correct_run(self, backend, weight)
        return [loss * (1 + 1e-4), *grads] if wrong.startswith("loss") else [loss, *(g * (1 + 1e-3) for g in grads)]

    for case in BASIC.values():
        check_errors(case.problem(), "reference")
        with monkeypatch.context() as patch:
            patch.setattr(Problem, "run", broken)
            with pytest.raises(AssertionError):
                check_errors(case.problem(), "reference")


def test_only_kernel_backends_call_operators(setting: Any) -> None:
    recorder = Recorder()
    with recorder:
        setting.case.problem(device=setting.place.device).run(setting.place.backend)
    assert bool(recorder.calls) == (setting.place.backend != "reference")


def test_every_family_and_loss_has_a_case() -> None:
    from fastkd import losses

    public = [getattr(losses, name) for name in losses.__all__]
    with_backends = {x for x in public if callable(x) and "backend" in inspect.signature(x).parameters}
    assert {case.family for case in CASES} == {*dispatch.FAMILIES, PLAIN}
    assert {case.loss for case in CASES} | {case.module_class for case in CASES} - {None} == with_backends
    assert len({case.name for case in CASES}) == len(CASES)


def test_oracle_equals_reference() -> None:
    """Compare two independent implementations; the loops in ``tests/losses`` are a third."""
    for case in CASES:
        for size in case.sizes:
            problem = case.problem(size, dtype=torch.float64)
            for got, want in zip(problem.run("reference"), problem.exact(), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
