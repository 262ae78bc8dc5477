"""Test the operator contract for every loss on every backend: bad input raises one clear error before any computation.

``losses/test_losses_errors.py`` checks the message of each argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import Setting
from contract_problems import Case, Problem
from contract_tools import Recorder

import fastkd
from fastkd.ops import dispatch


def assert_rejected(
    problem: Problem, backend: str, kind: type[Exception], message: str, products: bool = False, **more: Any
) -> None:
    """Assert that the loss raises this error before it calls a kernel.

    ``products``: the loss may compute products or softmaxes first, as guides and weights do.
    """
    with Recorder() as recorder, pytest.raises(kind, match=message):
        problem.case.loss(*problem.args, **(problem.options | {"backend": backend} | more))
    assert not recorder.calls
    assert products or not recorder.others & {"mm", "bmm", "_softmax", "_log_softmax", "exp"}


def changed(problem: Problem, index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Problem:
    args = list(problem.args)
    args[index] = change(args[index])
    return problem.replaced(*args)


def test_rejects_invalid_options(setting: Any) -> None:
    problem, backend = setting.case.problem(device=setting.place.device), setting.place.backend
    for value in (0, 0.0, -1.0, math.inf, math.nan):
        assert_rejected(problem, backend, ValueError, "temperature: expected a finite number", temperature=value)
    assert_rejected(problem, backend, TypeError, "temperature: expected a real number", temperature=torch.ones(2))
    assert_rejected(problem, backend, ValueError, "reduction: expected one of .*'avg'", reduction="avg")
    assert_rejected(problem, "gpu", ValueError, "backend: expected one of .*'gpu'")
    for name in ("similarity", "distance", "guide"):
        if name in setting.case.options:
            assert_rejected(problem, backend, ValueError, f"{name}: expected one of .*'other'", **{name: "other"})
    if "terms" in setting.case.options:
        assert_rejected(problem, backend, ValueError, "terms: expected one of .*'other'", terms={"other": 1.0})


def test_rejects_invalid_inputs(setting: Any) -> None:
    problem, backend = setting.case.problem(device=setting.place.device), setting.place.backend
    for index in range(len(problem.args)):
        side = "student" if index < problem.students else "teacher"
        bad = lambda change, index=index: changed(problem, index, change)
        assert_rejected(bad(lambda x: x.long()), backend, TypeError, rf"{side}\w*: expected a floating-point tensor")
        assert_rejected(
            bad(lambda x: x.to(torch.complex64)), backend, TypeError, rf"{side}\w*: expected a floating-point"
        )
        assert_rejected(bad(lambda x: x.tolist()), backend, TypeError, rf"{side}\w*: expected a tensor")
        assert_rejected(bad(lambda x: x[0, 0, 0]), backend, ValueError, rf"{side}\w*: expected shape")
        assert_rejected(bad(lambda x: x[:0]), backend, ValueError, rf"{side}\w*: is empty")
        assert_rejected(bad(lambda x: x[..., :0]), backend, ValueError, rf"{side}\w*: is empty")
        assert_rejected(bad(lambda x: x.to("meta")), backend, ValueError, r"is on meta|device")
        assert_rejected(bad(lambda x: torch.cat([x, x])), backend, ValueError, r"differ|expected shape")


def test_rejects_empty_batch(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device).mapped(lambda x: x[:0])
    assert_rejected(problem, setting.place.backend, ValueError, "is empty")


@pytest.mark.applies(lambda setting: setting.case.has_masks)
def test_rejects_invalid_masks(setting: Any) -> None:
    problem, backend = setting.case.problem(device=setting.place.device), setting.place.backend
    for name, mask in problem.masks.items():
        one = mask[0] if isinstance(mask, tuple) else mask
        put = lambda m, mask=mask: (m, mask[1]) if isinstance(mask, tuple) else m
        assert_rejected(problem, backend, TypeError, f"{name}.*: expected a bool tensor", **{name: put(one.float())})
        assert_rejected(problem, backend, ValueError, f"{name}.*: expected shape", **{name: put(torch.cat([one, one]))})
        assert_rejected(problem, backend, ValueError, f"{name}.*: is on meta", **{name: put(one.to("meta"))})
        if setting.place.device == "cpu":  # on a GPU the mask is not read: the loss is NaN
            assert_rejected(problem, backend, ValueError, f"{name}.*: no valid", **{name: put(torch.zeros_like(one))})


def test_rejects_unavailable_backend(basic_setting: Setting) -> None:
    """A backend that does not run on the device raises an error with the reason and the fix."""
    case, (_, device) = basic_setting
    problem = case.problem(device=device)
    for backend in dispatch.BACKENDS:
        if dispatch.BACKENDS[backend].device_type_reason(device) or dispatch.unavailable_reason(backend):
            assert_rejected(problem, backend, fastkd.BackendUnavailable, rf"{backend}.*(Use|use|reference)")


@pytest.mark.applies(lambda kernel_setting: not kernel_setting.supports(torch.float64))
def test_rejects_unsupported_dtype_unless_auto(kernel_setting: Any) -> None:
    """An explicit backend raises an error with the fix; "auto" selects a backend that supports the dtype."""
    case, (backend, device) = kernel_setting
    problem = case.problem(dtype=torch.float64, device=device)
    for double in (problem, problem.replaced(problem.args[0].float(), *problem.args[1:])):
        assert_rejected(
            double, backend, fastkd.BackendUnavailable, f"{backend}.*no float64.*convert.*'auto'", products=True
        )
        with Recorder() as recorder:
            got = double.loss("auto")
        assert all(call[1][-1] != backend for call in recorder.calls)
        torch.testing.assert_close(got, double.loss("reference"), rtol=1e-9, atol=1e-12)


def is_widened(case: Case) -> bool:
    """Return whether the loss converts its inputs to a wider dtype before it calls a kernel."""
    return case.multiplies_in_torch or bool(case.options.get("centered"))


@pytest.mark.applies(lambda kernel_setting: not is_widened(kernel_setting.case))
def test_kernels_reject_fp8(kernel_setting: Any) -> None:
    """Only the reference supports fp8."""
    problem = kernel_setting.case.problem(device=kernel_setting.place.device)
    problem = problem.mapped(lambda x: x.to(torch.float8_e4m3fn))
    assert_rejected(
        problem, kernel_setting.place.backend, fastkd.BackendUnavailable, "the kernels take .*convert", products=True
    )
