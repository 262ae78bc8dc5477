"""Test temperatures in pairs and pixel masks against the definitions in docs/maths.md, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_cases import DTYPES, PAIRED_AND_MASKED, SIMULATED_PAIRED_AND_MASKED
from contract_errors import compare_with_fp64

HALF = (torch.float16, torch.bfloat16)


@pytest.mark.simulated_cases(SIMULATED_PAIRED_AND_MASKED)
@pytest.mark.applies(
    lambda paired_setting, dtype: (
        paired_setting.covers(dtype)
        and (paired_setting.place.backend != "reference" or dtype not in HALF)  # promoted to fp32 before the formula
        and (not paired_setting.place.is_simulated or dtype == torch.float32)
    )
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_fp64(paired_setting: Any, dtype: torch.dtype) -> None:
    backend, device = paired_setting.place
    for size in ("small",) if paired_setting.place.is_simulated else paired_setting.case.sizes:
        problem = paired_setting.case.problem(size, dtype=dtype, device=device)
        weight = problem.weight()
        for output in compare_with_fp64(problem, backend, problem.run(backend, weight), weight):
            assert output.error <= output.allowed, (size, *output[:3])


def test_oracle_equals_reference() -> None:
    for case in PAIRED_AND_MASKED:
        for size in case.sizes:
            problem = case.problem(size, dtype=torch.float64)
            for got, want in zip(problem.run("reference"), problem.exact(), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
