"""Test the operator contract for every family on every backend: random cases, shapes, layouts, dtypes, temperatures."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from contract_cases import CASES, DTYPES
from contract_problems import Case, Problem
from contract_tools import arithmetic, error, rounding, roundings
from hypothesis import given, settings
from hypothesis import strategies as st

DIMENSIONS = {"channel_distribution_kd": 4, "logit_kd": 4, "channel_kd": 6, "pixel_relation_kd": 5, "cross_modal_kd": 5,
              "cross_modal_kd_from_logits": 3, "attention_kd": 6, "channel_attention_kd": 4}  # fmt: skip


@st.composite
def sizes(draw: st.DrawFn, case: Case, longer: tuple[int, ...]) -> tuple[int, ...]:
    """Draw a size (batch, ...) with one dimension multiplied by one of ``longer``; even maps for patches."""
    batch = draw(st.integers(1, 3))
    others = [draw(st.integers(1, 9)) for _ in range(DIMENSIONS[case.loss.__name__] - 1)]
    others[draw(st.integers(0, len(others) - 1))] *= draw(st.sampled_from(longer))
    if case.options.get("patches"):
        others[1:] = [2 * n for n in others[1:]]
    if case.loss.__name__ == "pixel_relation_kd" and "unequal" not in case.name and "cross" not in case.name:
        others[1] = others[0]
    if "one channel" in case.name:
        others[0] = 1
    return (batch, *others)


def test_any_input(basic_setting: Any) -> None:
    @given(data=st.data())
    @settings(max_examples=15 if basic_setting.place.is_simulated else 30, deadline=None, derandomize=True)
    def check_examples(data: st.DataObject) -> None:
        check_random_input(basic_setting, data)

    check_examples()


def check_random_input(basic_setting: Any, data: st.DataObject) -> None:
    backend, device = basic_setting.place
    case = data.draw(st.sampled_from([c for c in CASES if c.family == basic_setting.case.family]))
    case = case.at(temperature=data.draw(st.sampled_from([0.05, 0.1, 0.33, 1.0, 4.0, 20.0]) | st.floats(0.05, 20.0)))
    dtype = data.draw(st.sampled_from([dtype for dtype in DTYPES if basic_setting.supports(dtype)]))
    scale = data.draw(st.sampled_from([0.1, 1.0, 4.0]))
    seed = data.draw(st.integers(0, 2**16))
    # Triton's interpreter takes minutes for relations of thousands of pixels.
    interpreted = basic_setting.place == ("triton", "cpu") and case.family != "softmax_kl"
    size = data.draw(sizes(case, (1, 1, 2) if interpreted else (1, 1, 5, 16, 31)))
    problem = case.problem_of(size, dtype=dtype, device=device, scale=scale, seed=seed)
    args = []
    for x in problem.args:
        order = data.draw(st.sampled_from(list(itertools.permutations(range(x.dim())))))
        step = data.draw(st.sampled_from([1, 1, 2, 3]))
        wide = x.permute(order).repeat_interleave(step, -1)[..., ::step]
        args.append(wide.permute([order.index(i) for i in range(x.dim())]))
    check(problem.replaced(*args), backend)


def check(problem: Problem, backend: str) -> None:
    dtype = problem.args[0].dtype
    work = arithmetic(dtype)
    weight = problem.weight()
    loss, *grads = problem.run(backend, weight)
    exact_loss, *exact = problem.exact(weight)
    assert error(loss, exact_loss) <= 32 * rounding(problem.magnitude(), work)
    plain = problem.mapped(lambda x: x.float())
    noise = [error(a, b) for a, b in zip(plain.plain(weight), plain.exact(weight), strict=True)][1:]
    smaller = torch.finfo(work).eps / torch.finfo(torch.float32).eps
    largest = max(1e-6, *(x.abs().max().item() for x in exact))
    if problem.case.family == "softmax_kl":  # τ (p_s − p_t), also where both are 1
        largest = max(largest, 0.1 * problem.case.temperature)
    # Gradients of directions have terms of size 1 / |row|, even where they cancel to 0, as in rows of one element.
    if problem.case.family == "relation" or problem.case.has_cosines:
        largest = max(largest, 1 / smallest_row(problem))
    for grad, want, one in zip(grads, exact, noise, strict=True):
        allowed = 64 * one + 32 * problem.condition() * rounding(largest, torch.float32)
        stored = 1.01 * roundings(problem.case.family, backend, dtype) * rounding(want, dtype)
        assert error(grad, want) <= stored + smaller * allowed


def smallest_row(problem: Problem) -> float:
    """Return the norm of the smallest row (channel, pixel or word) of all inputs."""
    if problem.case.family == "pixel_word":
        rows, dim = [x.double() for x in problem.args], -1  # (B, N or T, D)
    else:
        rows = [x.double().flatten(2) for x in problem.args]  # (B, C, H·W)
        dim = 1 if problem.case.loss.__name__ == "pixel_relation_kd" else 2
    return max(min(x.norm(dim=dim).min().item() for x in rows), 1e-6)
