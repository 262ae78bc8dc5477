"""Test the operator contract for every loss on every backend: results are bit-identical (point 3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_cases import DTYPES, REPRESENTATIVE
from contract_problems import Case, Problem
from contract_tools import assert_same, threads


def sliced(problem: Problem, samples: slice | list[int]) -> Problem:
    """Return the problem of some samples of the batch."""
    cut = lambda m: tuple(x[samples] for x in m) if isinstance(m, tuple) else m[samples]
    return Problem(problem.case, [x[samples] for x in problem.args], {k: cut(m) for k, m in problem.masks.items()})


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting, dtype: setting.covers(dtype))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(setting: Any, dtype: torch.dtype) -> None:
    for size in setting.case.sizes:
        problem = setting.case.problem(size, dtype=dtype, device=setting.place.device)
        weight = problem.weight()
        first = problem.run(setting.place.backend, weight)
        for _ in range(1 if setting.place.is_simulated else 2):
            moved = problem.mapped(lambda x: x.clone())  # the same numbers at other addresses
            assert_same(moved.run(setting.place.backend, weight), first)


@pytest.mark.applies(lambda kernel_setting: kernel_setting.place.backend == "cpu")
def test_same_bits_for_any_number_of_threads(kernel_setting: Any) -> None:
    """Small sizes, which one thread computes, and one that occupies three threads."""
    case = kernel_setting.case
    sizes = [*case.sizes.values(), parallel_size(case)]
    for size in sizes:
        problem = case.problem_of(size, dtype=torch.float32, device="cpu")
        weight = problem.weight() if size is not sizes[-1] else None
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(problem.run("cpu", weight))
        for other in results[1:]:
            if case.multiplies_in_torch:
                problem.assert_near(other, results[0])
            else:
                assert_same(other, results[0])


def parallel_size(case: Any) -> tuple[int, ...]:
    """Return a size that occupies three threads unequally."""
    if case.family == "softmax_kl":
        return (3, 50, 20, 35)
    if case.family == "attention_kl":  # two or three heads: one per thread, or shared by the threads
        return (1, 1, 1, 150, 20, 8) if "causal" in case.name else (1, 3, 150, 130, 16, 16)
    if case.loss.__name__ == "channel_kd":
        return (3, 75, 20, 20, 14, 14)
    if case.loss.__name__ == "pixel_relation_kd":
        width = 24
        return (3, width, width if "unequal" not in case.name else 17, 17, 19)
    if case.name.endswith("other tokens"):
        return (3, 1100, 9, 14, 16)
    return (3, 1100, 13) if "from_logits" in case.name else (3, 1100, 13, 24, 24)


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting: not setting.case.pools_the_batch)
def test_samples_are_independent(setting: Any) -> None:
    """A sample gives the same numbers alone and in a batch, up to the summation order of torch's products."""
    problem = setting.case.problem(device=setting.place.device)
    whole = problem.run(setting.place.backend)
    batch = problem.args[0].shape[0]
    for sample in range(batch):
        alone = sliced(problem, slice(sample, sample + 1)).run(setting.place.backend)
        per = whole[0].shape[0] // batch  # rows of a sample: more than one with patches
        mine = [whole[0][sample * per : (sample + 1) * per], *(x[sample : sample + 1] for x in whole[1:])]
        exact = setting.case.family == "softmax_kl" and setting.case.options.get("guide") is None
        if exact:
            assert_same(alone, mine)
        else:
            problem.assert_near(alone, mine)


def has_a_loss_per_sample(case: Case) -> bool:
    pooled = case.options.get("across_batch") or case.options.get("distance") == "cka"
    return not pooled and "patches" not in case.options


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting: has_a_loss_per_sample(setting.case))
def test_sample_order_does_not_matter(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device)
    rows, *grads = problem.run(setting.place.backend)
    turned = sliced(problem, [1, 0]).run(setting.place.backend)
    want = [x.flip(0) for x in (rows, *grads)]
    if setting.case.pools_the_batch:
        problem.assert_near(turned, want)
    else:
        assert_same(turned, want)


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(
    lambda setting, value: not setting.case.pools_the_batch and not (setting.place.is_simulated and value < 0)
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_sample_does_not_affect_others(setting: Any, value: float) -> None:
    """The other samples keep every bit."""
    problem = setting.case.problem(device=setting.place.device)
    weight = problem.weight()
    want = problem.run(setting.place.backend, weight)
    rows = want[0].shape[0] // 2
    for index in range(len(problem.args)):
        args = [x.clone() for x in problem.args]
        args[index][0] = value
        loss, *grads = problem.replaced(*args).run(setting.place.backend, weight)
        assert_same([loss[rows:], *(x[1:] for x in grads)], [want[0][rows:], *(x[1:] for x in want[1:])])
