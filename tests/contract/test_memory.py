"""Test the operator contract for every loss on every backend: memory.

Points 1 (strided, offset, channels-last and expanded inputs), 2 (tensors saved for the backward), 3 (every output
element is written) and 4 (64-bit offsets).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import CASES, ONE_PER_LOSS, REPRESENTATIVE, Place
from contract_problems import Case, Problem
from contract_tools import assert_same, poisoned, saved_for_backward
from torch import Tensor

from fastkd.ops import dispatch


def spaced(x: Tensor) -> Tensor:
    """Return a view with stride 2 in every dimension, between NaNs."""
    wide = x.new_full([2 * size + 1 for size in x.shape], math.nan)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def offset(x: Tensor) -> Tensor:
    """Return a view with a storage offset of one and gaps of three NaNs between rows."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
    view = wide.flatten()[1 : 1 + wide.numel() - 3].as_strided(x.shape, wide.stride(), 1)
    return view.copy_(x)


def gaps(x: Tensor) -> Tensor:
    """Return a view of every other index of dimension 1, between NaNs: contiguous maps with gaps between them."""
    wide = x.new_full((x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:]), math.nan)
    return wide[:, 1::2].copy_(x)


def permuted(order: Callable[[int], tuple[int, ...]]) -> Callable[[Tensor], Tensor]:
    """Return a function that lays out the dimensions in another order in memory."""

    def change(x: Tensor) -> Tensor:
        dims = order(x.dim())
        back = [dims.index(i) for i in range(x.dim())]
        return x.permute(dims).contiguous().permute(back)

    return change


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "spaced": spaced,
    "offset": offset,
    "gaps": gaps,
    "channels last": permuted(lambda d: (0, *range(2, d), 1)),
    "last two swapped": permuted(lambda d: (*range(d - 2), d - 1, d - 2)),
    "batch innermost": permuted(lambda d: (*range(1, d), 0)),
    "reversed": permuted(lambda d: tuple(range(d))[::-1]),
}


CONTIGUOUS: dict[tuple[str, Place], list[Tensor]] = {}
"""Results of contiguous inputs, by case and place: the same for every layout."""


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(setting: Any, layout: str) -> None:
    """Student, teacher or both in another layout give the results of contiguous inputs.

    Simulated kernels run once, with the student in this layout and the teacher in the one before it.
    """
    problem = setting.case.problem(device=setting.place.device)
    weight = problem.weight()
    key = (setting.case.name, setting.place)
    if key not in CONTIGUOUS:
        CONTIGUOUS[key] = problem.run(setting.place.backend, weight)
    want = CONTIGUOUS[key]
    changed = problem.mapped(LAYOUTS[layout])
    assert_same(changed.args, problem.args)
    n = problem.students
    sides = [(changed, problem), (problem, changed), (changed, changed)]
    if setting.place.is_simulated:  # one slow run, with different strides on the two sides
        names = list(LAYOUTS)
        sides = [(changed, problem.mapped(LAYOUTS[names[names.index(layout) - 1]]))]
    for own, teachers in sides:
        mixed = problem.replaced(*own.args[:n], *teachers.args[n:])
        problem.assert_near(mixed.run(setting.place.backend, weight), want)


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda setting: setting.case.has_masks)
def test_masks_of_any_layout(setting: Any) -> None:
    problem = setting.case.problem(device=setting.place.device)
    want = problem.run(setting.place.backend)

    def strided(mask: Any) -> Any:
        if isinstance(mask, tuple):
            return tuple(strided(m) for m in mask)
        wide = torch.ones([2 * size for size in mask.shape], dtype=torch.bool, device=mask.device)
        view = wide.flip(0)[tuple(slice(None, None, 2) for _ in mask.shape)]
        return view.copy_(mask)

    for change in (
        strided,
        lambda m: tuple(x.mT.contiguous().mT for x in m) if isinstance(m, tuple) else m.mT.contiguous().mT,
    ):
        masks = {name: change(mask) for name, mask in problem.masks.items()}
        problem.assert_near(Problem(problem.case, problem.args, masks).run(setting.place.backend), want)


@pytest.mark.simulated_cases(ONE_PER_LOSS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_expanded_inputs(setting: Any, dim: int) -> None:
    """Stride 0 in the teacher, and in the student, where gradients add up over the expanded dimension."""
    problem = setting.case.problem(device=setting.place.device)
    n = problem.students
    expand = lambda x: x.narrow(dim, 0, 1).expand(x.shape)
    for args in (
        [*problem.args[:n], *map(expand, problem.args[n:])],
        [*map(expand, problem.args[:n]), *problem.args[n:]],
    ):
        expanded = problem.replaced(*args)
        want = expanded.mapped(lambda x: x.contiguous()).run(setting.place.backend)
        problem.assert_near(expanded.run(setting.place.backend), want, min_size=1.0)
    base = [x.narrow(dim, 0, 1).detach().requires_grad_() for x in problem.args[:n]]
    args = [b.expand(x.shape) for b, x in zip(base, problem.args, strict=False)]
    loss = problem.replaced(*args, *problem.args[n:]).loss(setting.place.backend).sum()
    got = torch.autograd.grad(loss, base)
    whole = problem.replaced(*(x.detach() for x in args), *problem.args[n:]).run(setting.place.backend)[1:]
    problem.assert_near(list(got), [x.sum(dim, keepdim=True) for x in whole], ulps=32, min_size=1.0)


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_offsets_beyond_32_bits(kernel_setting: Any, side: str) -> None:
    """Strides above 2³¹ elements between samples or rows. On the CPU the pages in between are never touched."""
    device = kernel_setting.place.device
    distance = 2**31 + 8
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 5 * 2 * distance:
        pytest.skip("needs 22 GB of GPU memory")
    problem = kernel_setting.case.problem(dtype=torch.float16, device=device)
    want = problem.run(kernel_setting.place.backend)
    n = problem.students
    indices = range(n) if side == "student" else range(n, 2 * n)
    for dim in (0, 1):
        for index in indices:
            x = problem.args[index]
            if x.shape[dim] < 2:
                continue
            # The last index of `dim` is beyond 2³¹: in two steps where it has more than two entries.
            step = distance if x.shape[dim] == 2 else distance // 2
            strides = list(x.transpose(0, dim).contiguous().stride())
            strides[0], strides[dim] = strides[dim], strides[0]
            strides[dim] = step
            storage = torch.empty(step * (x.shape[dim] - 1) + x.numel(), dtype=x.dtype, device=device)
            args = list(problem.args)
            args[index] = storage.as_strided(x.shape, strides).copy_(x)
            problem.assert_near(problem.replaced(*args).run(kernel_setting.place.backend), want)
            del storage, args


@pytest.mark.simulated_cases(REPRESENTATIVE)
@pytest.mark.applies(lambda kernel_setting: not kernel_setting.case.options.get("across_batch"))
def test_row_gradient_offsets_beyond_32_bits(kernel_setting: Any) -> None:
    """A row gradient with a stride of 2³¹ elements."""
    problem = kernel_setting.case.problem(device=kernel_setting.place.device).leaves()
    if kernel_setting.place.device == "cuda" and torch.cuda.mem_get_info()[0] < 5 * 4 * 2**31:
        pytest.skip("needs 43 GB of GPU memory")
    rows = problem.loss(kernel_setting.place.backend)
    weight = problem.weight().to(rows.dtype)
    storage = torch.empty(2**31 + rows.numel(), device=rows.device)
    far = storage.as_strided(rows.shape, (2**31 // (rows.shape[0] - 1), *rows.stride()[1:])).copy_(weight)
    inputs = problem.args[: problem.students]
    assert_same(
        list(torch.autograd.grad(rows, inputs, far, retain_graph=True)), list(torch.autograd.grad(rows, inputs, weight))
    )


@pytest.mark.applies(
    lambda setting, value: (
        not setting.place.is_simulated or (setting.case.name in REPRESENTATIVE and (value != value or value > 0))
    )
)
@pytest.mark.parametrize("value", [math.nan, 1e30, -3.0])
def test_every_output_element_is_written(setting: Any, value: float) -> None:
    """Results have the same bits when allocated memory is filled with NaN or large numbers."""
    for size in setting.case.sizes:
        problem = setting.case.problem(size, device=setting.place.device)
        weight = problem.weight()
        want = problem.run(setting.place.backend, weight)
        with poisoned(value):
            assert torch.empty(3, device=setting.place.device).eq(value).all() or value != value
            got = problem.run(setting.place.backend, weight)
        assert_same(got, want)
        assert all(x.isfinite().all() for x in got)


def test_every_output_element_is_written_under_torch_fill(basic_setting: Any) -> None:
    """Repeat the check with torch's own switch, which also fills tensors allocated by C++ operators."""
    problem = basic_setting.case.problem(device=basic_setting.place.device)
    want = problem.run(basic_setting.place.backend)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=basic_setting.place.device).isnan().all()
        got = problem.run(basic_setting.place.backend)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    assert_same(got, want)


DIGEST = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
import torch
from contract_cases import CASES, PLAIN
digest = hashlib.sha256()
for case in [case for case in CASES if case.family != PLAIN]:
    for size in case.sizes:
        for x in case.problem(size).run("cpu"):
            digest.update(x.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MALLOC_PERTURB_ is glibc's")
def test_cpu_workspaces_are_written_before_read() -> None:
    """Results have the same bits for any byte with which glibc fills memory from malloc."""
    if dispatch.unavailable_reason("cpu"):
        pytest.skip("the C++ kernels are unavailable here")
    helpers = str(Path(__file__).parents[1] / "helpers")
    digests = set()
    for byte in ("85", "255"):  # floats of 255 are NaN, of 85 about −1e13
        environment = os.environ | {"MALLOC_PERTURB_": byte}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST, helpers], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def large_size(case: Case) -> tuple[int, ...]:
    """Return a size at which an N×N matrix is larger than all other tensors that may be saved."""
    if case.family == "softmax_kl":
        return (2, 3, 20, 20)
    if case.family == "attention_kl":
        return (1, 1, 1, 399, 1, 4) if "causal" in case.name else (1, 1, 400, 400, 4, 4)
    if case.loss.__name__ == "channel_kd":
        return (1, 8, 24, 24, 20, 20)
    if case.loss.__name__ == "pixel_relation_kd":
        return (1, 4, 4, 20, 20)
    if case.name.endswith("other tokens"):
        return (1, 400, 5, 6, 4)
    return (1, 400, 5) if "from_logits" in case.name else (1, 400, 5, 4, 4)


@pytest.mark.simulated_cases(REPRESENTATIVE)
def test_no_pixel_matrix_is_saved_for_backward(kernel_setting: Any) -> None:
    case = kernel_setting.case
    problem = case.problem_of(large_size(case), dtype=torch.float32, device=kernel_setting.place.device).leaves()
    with saved_for_backward() as saved:
        problem.loss(kernel_setting.place.backend)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    for x in problem.args:
        storages.pop(x.untyped_storage().data_ptr(), None)
    # Row statistics, a copy of each input, and for each of up to four patches two small matrices (C×C, T×T or N×T, in
    # whole tiles): far fewer than 400² numbers.
    allowed = 2 * sum(x.nbytes for x in problem.args) + 32 * 400 * 2 + 4 * 2 * 64 * 64 * 4
    assert sum(storages.values()) <= allowed < 400 * 400 * 4


def test_softmax_kl_saves_inputs_and_row_statistics_only(kernel_place: Any) -> None:
    case = next(c for c in CASES if c.name == "channel_distribution_kd plain")
    problem = case.problem_of((2, 3, 10, 20), dtype=torch.float32, device=kernel_place.device).leaves()
    with saved_for_backward() as saved:
        problem.loss(kernel_place.backend)
    inputs = {x.data_ptr() for x in problem.args}
    assert sum(x.nbytes for x in saved if x.data_ptr() not in inputs) <= 2 * 3 * 16
