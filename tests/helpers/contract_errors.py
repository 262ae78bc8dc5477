"""Point 9 of the operator contract: how far a backend's losses and gradients are from fp64, and how far they may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from contract_cases import Problem
from contract_tools import arithmetic, error, rounding, roundings
from torch import Tensor


class Output(NamedTuple):
    """The losses of the rows, or the gradient of one input."""

    name: str
    error: float
    allowed: float
    exact: Tensor


def against_fp64(problem: Problem, backend: str, got: Sequence[Tensor], weight: Tensor) -> list[Output]:
    """Compare what ``problem.run(backend, weight)`` returned with the oracle.

    Allowed are twice the plain formula's error in the inputs' dtype and a hard ceiling, whichever is less.
    """
    dtype = problem.args[0].dtype
    assert [x.dtype for x in got] == [arithmetic(dtype)] + [dtype] * problem.students
    assert [x.shape for x in got[1:]] == [x.shape for x in problem.args[: problem.students]]
    exact = problem.exact(weight)
    errors = [error(a, b) for a, b in zip(got, exact, strict=True)]
    stored = [1.01 * rounding(b, a.dtype) for a, b in zip(got, exact, strict=True)]
    noise = fp32_noise(problem, weight, exact)
    # The hard ceiling. fp16 and bf16 inputs too are computed in fp32, so theirs is fp32's, and the gradient's rounding
    # with that of what it is made from.
    ceilings = [stored[0]] + [roundings(problem.case.family, backend, dtype) * one for one in stored[1:]]
    smaller = torch.finfo(arithmetic(dtype)).eps / torch.finfo(torch.float32).eps
    # In fp64 a log-sum-exp is one number, in fp32 it is kept in more digits: the exponential of a large one shows it.
    saturated = 4 * problem.condition() * rounding(problem.slope(), dtype) if dtype == torch.float64 else 0.0
    allowed = [storing + 8 * smaller * one + saturated for storing, one in zip(ceilings, noise, strict=True)]
    if dtype != torch.float64:  # there the plain formula is the oracle
        # An entry or two can make the plain formula exact by luck, hence the noise.
        plain = [error(a, b) for a, b in zip(problem.plain(weight), exact, strict=True)]
        bounds = [2 * users + storing + 2 * one for users, storing, one in zip(plain, stored, noise, strict=True)]
        allowed = [min(pair) for pair in zip(allowed, bounds, strict=True)]
    names = ["losses", *(f"gradient of input {i}" for i in range(problem.students))]
    return [Output(*one) for one in zip(names, errors, allowed, exact, strict=True)]


def fp32_noise(problem: Problem, weight: Tensor, exact: Sequence[Tensor]) -> list[float]:
    """How far fp32 arithmetic may be expected to be from the losses and gradients: the plain formula's error in it."""
    if problem.args[0].dtype == torch.float64:
        problem = problem.mapped(lambda x: x.float())
        exact = problem.exact(weight)
    plain = problem.mapped(lambda x: x.float()).plain(weight)
    largest = max(1e-6, *(b.abs().max().item() for b in exact[1:]))  # where one gradient is 0, what cancels is not
    sizes = [problem.magnitude()] + [problem.condition() * largest] * problem.students
    noise = [error(a, b) for a, b in zip(plain, exact, strict=True)]
    assert all(one <= 1e-4 * size + 1e-6 for one, size in zip(noise, sizes, strict=True))  # a case that means something
    return [max(one, rounding(size, torch.float32)) for one, size in zip(noise, sizes, strict=True)]
