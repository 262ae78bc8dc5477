"""Measure and bound the errors of losses and gradients against fp64 (point 6 of the operator contract)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from contract_problems import Problem
from contract_tools import arithmetic, error, rounding, roundings
from torch import Tensor


class Output(NamedTuple):
    """The error of the per-row losses or of the gradient of one input."""

    name: str
    error: float
    allowed: float
    exact: Tensor


def compare_with_fp64(problem: Problem, backend: str, got: Sequence[Tensor], weight: Tensor) -> list[Output]:
    """Compare the results ``got`` of ``problem.run(backend, weight)`` with the oracle.

    The bound is twice the error of the eager formula in the dtype of the inputs, or a fixed ceiling if that is less.
    """
    dtype = problem.args[0].dtype
    assert [x.dtype for x in got] == [arithmetic(dtype)] + [dtype] * problem.students
    assert [x.shape for x in got[1:]] == [x.shape for x in problem.args[: problem.students]]
    exact = problem.exact(weight)
    errors = [error(a, b) for a, b in zip(got, exact, strict=True)]
    stored = [1.01 * rounding(b, a.dtype) for a, b in zip(got, exact, strict=True)]
    noise = fp32_noise(problem, weight, exact)
    # The ceiling: the rounding of the stored gradient, and fp32 noise, since kernels compute fp16 and bf16 in fp32.
    ceilings = [stored[0]] + [roundings(problem.case.family, backend, dtype) * one for one in stored[1:]]
    smaller = torch.finfo(arithmetic(dtype)).eps / torch.finfo(torch.float32).eps
    # For fp64 inputs a log-sum-exp has no extra digits, unlike for fp32; exponentials amplify its rounding.
    saturated = 4 * problem.condition() * rounding(problem.slope(), dtype) if dtype == torch.float64 else 0.0
    allowed = [storing + 8 * smaller * one + saturated for storing, one in zip(ceilings, noise, strict=True)]
    if dtype != torch.float64:  # in fp64 the eager formula is the oracle
        # The eager formula may be exact by chance for one or two entries, hence the noise.
        plain = [error(a, b) for a, b in zip(problem.plain(weight), exact, strict=True)]
        bounds = [2 * eager + storing + 2 * one for eager, storing, one in zip(plain, stored, noise, strict=True)]
        allowed = [min(pair) for pair in zip(allowed, bounds, strict=True)]
    names = ["losses", *(f"gradient of input {i}" for i in range(problem.students))]
    return [Output(*one) for one in zip(names, errors, allowed, exact, strict=True)]


def fp32_noise(problem: Problem, weight: Tensor, exact: Sequence[Tensor]) -> list[float]:
    """Return the expected errors of fp32 arithmetic: those of the eager formula, and at least one rounding."""
    if problem.args[0].dtype == torch.float64:
        problem = problem.mapped(lambda x: x.float())
        exact = problem.exact(weight)
    plain = problem.mapped(lambda x: x.float()).plain(weight)
    largest = max(1e-6, *(b.abs().max().item() for b in exact[1:]))  # a gradient of 0 is a sum of nonzero terms
    sizes = [problem.magnitude()] + [problem.condition() * largest] * problem.students
    noise = [error(a, b) for a, b in zip(plain, exact, strict=True)]
    assert all(
        one <= 1e-4 * size + 1e-6 for one, size in zip(noise, sizes, strict=True)
    )  # else the case is ill-conditioned
    return [max(one, rounding(size, torch.float32)) for one, size in zip(noise, sizes, strict=True)]
