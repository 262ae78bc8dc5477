"""Triton kernels of ``relation``: block shapes and their edges, launches, layouts and workspace limits.

Without a GPU the kernels run under the interpreter on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_kernels import DEVICE, MARKS, require_gpu_kernels
from relation_tools import (
    DTYPES,
    FORMS,
    METHODS,
    assert_near,
    check_kernel,
    drawn_for,
    one_block_per_launch,
    rows,
    run_kernel,
)

from fastkd._integers import ceil_div
from fastkd.ops import dispatch
from fastkd.ops.relation import relation
from fastkd.ops.relation.reference import relation as reference

if reason := dispatch.unavailable_reason("triton"):
    pytest.skip(f"Triton is unavailable: {reason}", allow_module_level=True)

from fastkd.kernels.relation import plan as plans

operator = importlib.import_module("fastkd.ops.relation")
triton_calls = importlib.import_module("fastkd.ops.relation.triton")

pytestmark = [*MARKS, pytest.mark.usefixtures("kernels")]


@pytest.fixture
def kernels() -> Iterator[None]:
    with require_gpu_kernels("triton"):
        yield


kernel = functools.partial(run_kernel, "triton")
check = functools.partial(check_kernel, "triton")


def all_regimes() -> list[Any]:
    return [
        pytest.param(dtype, choice, id=f"{name}-{'x'.join(map(str, regime.tiles[:3]))}-{regime.product[1]}")
        for dtype, name in zip(DTYPES, ("fp32", "bf16", "fp16"), strict=True)
        for choice, regime in enumerate(plans.REGIMES[name])
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "choice"), all_regimes())
def test_every_block_shape_and_its_edges(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, choice: int, form: str
) -> None:
    """Rows and widths slightly exceed a block, so the last blocks are partial."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    regime = plans.REGIMES[name][choice]
    monkeypatch.setitem(plans.REGIMES, name, (regime,))
    monkeypatch.setattr(plans, "MIN_PROGRAMS", 1)  # also select wide blocks
    count, width = regime.tiles.rows + 3, regime.tiles.depth + 1
    methods = METHODS if form == "streamed" and dtype != torch.float16 else {"kl": METHODS["kl"]}
    for method, options in methods.items():
        batch = 2 if form == "across samples" else 1
        student, teacher = drawn_for(method, (batch, count, width), dtype)
        check(student, teacher, rows((batch, count), 3).abs(), **options, **FORMS[form])


@pytest.mark.parametrize("method", METHODS)
def test_one_row_and_one_column(method: str) -> None:
    for shape in ((2, 1, 7), (2, 5, 1)):
        check(rows(shape, 0), rows(shape, 1), rows(shape[:2], 3), min_size=4.0, **METHODS[method])


@pytest.mark.parametrize("cross", [False, True])
def test_minimum_workspace_of_the_error_suffices(monkeypatch: pytest.MonkeyPatch, cross: bool) -> None:
    monkeypatch.setitem(plans.REGIMES, "fp32", plans.REGIMES["fp32"][-1:])
    student, teacher = drawn_for("kl", (2, 70, 20))
    weight = rows((2, 70), 2)
    whole = kernel(student, teacher, weight, cross=cross)
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.01")
    with pytest.raises(ValueError, match=r"a workspace of 0\.01 MiB does not hold one block of rows") as error:
        relation(student, teacher, cross=cross, backend="triton")
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", str(error.value).split("at least ")[1].split(",")[0])
    assert_near(kernel(student, teacher, weight, cross=cross), whole)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("method", ["kl", "kl maxima", "kl of means", "mse", "row_cosine"])
def test_launches_of_one_row_block_change_nothing(monkeypatch: pytest.MonkeyPatch, method: str, cross: bool) -> None:
    """The forward adds to the sums of earlier launches; the smallest workspace holds several of its row blocks."""
    student, teacher = drawn_for(method, (2, 70 if cross else 135, 20))  # three or four row blocks
    weight = rows(student.shape[:2], 2)
    options = {**METHODS[method], "cross": cross}
    whole = kernel(student, teacher, weight, **options)
    one_block_per_launch(monkeypatch, "triton")
    assert_near(kernel(student, teacher, weight, **options), whole)


def test_backward_with_less_workspace_recomputes_stored_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """H for some row blocks needs tiles below the diagonal, which are not stored."""
    student, teacher, weight = rows((1, 135, 20), 0), rows((1, 135, 9), 1), rows((1, 135), 2)
    want = kernel(student, teacher, weight, keep=True)[1]
    leaf = student.detach().requires_grad_()
    loss = relation(leaf, teacher, keep=True, backend="triton")
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.2")
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, weight)[0], want, rtol=1e-5, atol=1e-7)


def test_launches_cover_each_row_block_once_within_the_workspace() -> None:
    for batch, count, cross in ((32, 512, False), (16, 1024, False), (8, 3600, False), (2, 14400, False),
                                (8, 900, True), (1, 1, False), (300, 2000, False)):  # fmt: skip
        for dtype, capability in itertools.product(plans.REGIMES, (9, 10)):
            plan = plans.Plan(batch, count, cross, "kl", dtype, False, capability)
            for grid, size in ((plan.forward, plan.forward_bytes()), (plan.backward, plan.backward_bytes())):
                for limit in (size, 3 * size, 32 * 2**20):
                    seen = []
                    for launch in grid.launches(size, limit):
                        assert launch.problems * launch.band * size <= max(limit, size)
                        problems = range(launch.first_problem, launch.first_problem + launch.problems)
                        seen += [(p, b) for p in problems for b in range(launch.first, launch.last)]
                    assert seen == [(p, b) for p in range(grid.problems) for b in range(grid.blocks)]
    # The largest training step needs far less than 32 MiB for one row block.
    plan = plans.Plan(2, 14400, False, "kl", "bf16", False, 9)
    assert plan.min_bytes() < 8 * 2**20


def test_plan_fills_a_large_gpu() -> None:
    """(8, 512, 900) has more tiles than an H100 has multiprocessors, forward and backward."""
    for kept in (False, True):
        plan = plans.Plan(8, 512, False, "kl", "bf16", kept, 9)
        assert min(plan.forward.programs, plan.backward.programs) >= 132
        assert 8 * plan.backward.blocks * ceil_div(900, plan.product.cols) >= 132


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_maps_viewed_as_rows_of_pixels(dtype: torch.dtype, cross: bool) -> None:
    """Rows are the inner dimension, at any alignment, on one side or both; the gradient has the student's strides."""
    for count, width in ((24, 6), (67, 5)) if not cross else ((11, 5),):
        student, teacher = rows((2, count, width), 0, dtype), rows((2, count, width + 2), 1, dtype)
        columns = [x.mT.contiguous().mT for x in (student, teacher)]
        weight = rows((2, count), 2)
        want = kernel(student, teacher, weight, cross=cross)
        for s, t in (columns, (student, columns[1]), (columns[0], teacher)):
            got = kernel(s, t, weight, cross=cross)
            assert got[1].stride() == s.stride()
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_equal_networks_have_exactly_zero_loss_and_gradient(form: str) -> None:
    count = 20 if form == "across samples" else 70
    student, weight = rows((2, count, 30), 0, torch.bfloat16), rows((2, count), 1)
    for options in METHODS.values():
        loss, grad = kernel(student, student.clone(), weight, **options, **FORMS[form])
        assert loss.abs().max() == grad.abs().max() == 0


@pytest.mark.parametrize("distance", ["kl", "mse", "row_cosine"])
def test_rows_of_zeros_and_tiny_rows(distance: str) -> None:
    student, teacher = rows((2, 66, 30), 0), rows((2, 66, 30), 1)
    student[0, 3] = teacher[0, 5] = 0
    student[1, 65] = 1e-14
    for keep in (False, True):
        loss, grad = check(student, teacher, torch.ones(2, 66, device=DEVICE), distance=distance, keep=keep)
        assert grad[0, 3].abs().max() == grad[1, 65].abs().max() == 0
        assert loss.isfinite().all()


@pytest.mark.parametrize("scale", [1e-5, 1e17])
def test_norms_with_extreme_squares(scale: float) -> None:
    student, teacher = rows((1, 20, 30), 0), rows((1, 20, 30), 1)
    loss, grad = kernel(student * scale, teacher * scale, torch.ones(1, 20, device=DEVICE))
    want = kernel(student, teacher, torch.ones(1, 20, device=DEVICE))
    torch.testing.assert_close(loss, want[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad * scale, want[1], rtol=1e-3, atol=1e-6)


def test_row_cosine_of_close_and_of_zero_relations() -> None:
    """|u − v|² keeps its precision for close relations; zero rows have relations of norm 0."""
    teacher = rows((1, 40, 12), 0)
    for difference in (1e-1, 1e-3):
        check(teacher + difference * rows((1, 40, 12), 1), teacher, torch.ones(1, 40, device=DEVICE),
              distance="row_cosine", similarity="mean")  # fmt: skip
    for student, other in ((teacher, torch.zeros_like(teacher)), (torch.zeros_like(teacher), teacher)):
        for similarity in ("cosine", "dot"):
            check(student, other, torch.ones(1, 40, device=DEVICE), distance="row_cosine", similarity=similarity)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets "triton" for each forward of its kernels, with Triton first in the "auto" order."""
    monkeypatch.setitem(dispatch.FAMILY_ORDER, ("relation", DEVICE), ("triton", "reference"))
    relation(rows((1, 9, 4), 0), rows((1, 9, 4), 1))  # run the self-test
    names: list[str] = []
    forward = triton_calls.forward
    monkeypatch.setattr(triton_calls, "forward", lambda *a: names.append("triton") or forward(*a))
    return names


def test_auto_uses_gram_matrices_for_mse_of_narrow_rows(called: list[str]) -> None:
    for width, expected in ((20, []), (21, ["triton"])):  # Gram matrices up to width 20, half of the 40 columns
        student, teacher = rows((1, 40, width), 0), rows((1, 40, width), 1)
        got = relation(student, teacher, distance="mse")
        assert called == expected
        torch.testing.assert_close(got, reference(student, teacher, distance="mse"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("requested", "expected"), [("triton", ["triton"]), ("reference", []), ("", [])])
def test_backend_from_the_environment_computes_narrow_rows(
    monkeypatch: pytest.MonkeyPatch, called: list[str], requested: str, expected: list[str], compiled: bool
) -> None:
    """Gram matrices are used only without a requested backend."""
    monkeypatch.setenv("FASTKD_BACKEND", requested)
    gram: list[None] = []
    original = operator.relation_mse_gram
    monkeypatch.setattr(operator, "relation_mse_gram", lambda *a, **k: gram.append(None) or original(*a, **k))
    student, teacher = rows((1, 40, 5), 0), rows((1, 40, 5), 1)
    call = lambda: relation(student, teacher, distance="mse")
    torch._dynamo.reset()
    got = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)()
    assert called == expected
    assert len(gram) == (requested == "")
    torch.testing.assert_close(got, reference(student, teacher, distance="mse"))
