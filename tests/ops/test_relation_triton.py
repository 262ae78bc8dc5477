"""What is particular to the relation kernels in Triton: block shapes and their edges, launches, layouts, workspace.

Under the interpreter on CPU tensors where there is no GPU.
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
from relation_tools import DTYPES, FORMS, METHODS, check_kernel, rows, run_kernel

from fastkd.ops import dispatch
from fastkd.ops.relation import relation
from fastkd.ops.relation.reference import relation as reference

if reason := dispatch.unavailable_reason("triton"):
    pytest.skip(f"no Triton: {reason}", allow_module_level=True)

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
    """Rows and widths a little more than blocks: two row blocks, of which the last has a block of columns too few."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    regime = plans.REGIMES[name][choice]
    monkeypatch.setitem(plans.REGIMES, name, (regime,))
    monkeypatch.setattr(plans, "ENOUGH_PROGRAMS", 1)  # and the wide blocks where there are some
    count, width = regime.tiles.rows + 3, regime.tiles.depth + 1
    methods = METHODS if form == "streamed" and dtype != torch.float16 else {"kl": METHODS["kl"]}
    for method, options in methods.items():
        batch = 2 if form == "across samples" else 1
        student, teacher = rows((batch, count, width), 0, dtype), rows((batch, count, width + 5), 1, dtype)
        if "maxima" in method:  # close rows, or a softmax at 0.03 would leave nothing to compare
            student, teacher = (0.05 * x + rows((batch, 1, x.shape[2]), 2, dtype) for x in (student, teacher))
        check(student, teacher, rows((batch, count), 3).abs(), **options, **FORMS[form])


@pytest.mark.parametrize("method", METHODS)
def test_one_row_and_one_column(method: str) -> None:
    for shape in ((2, 1, 7), (2, 5, 1)):
        check(rows(shape, 0), rows(shape, 1), rows(shape[:2], 3), least=4.0, **METHODS[method])


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("method", ["kl", "kl maxima", "row_cosine"])
def test_a_small_workspace_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch, method: str, cross: bool) -> None:
    """Sums of some row blocks after others, and H by stripes: nothing of the rows' number is held at once."""
    monkeypatch.setitem(plans.REGIMES, "fp32", plans.REGIMES["fp32"][-1:])
    count = 70 if cross else 135
    student, teacher, weight = rows((2, count, 20), 0), rows((2, count, 9), 1), rows((2, count), 2)
    options = {**METHODS[method], "cross": cross}
    whole = kernel(student, teacher, weight, **options)
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.01")
    with pytest.raises(ValueError, match=r"a workspace of 0\.01 MiB does not hold one block of rows") as error:
        relation(student, teacher, backend="triton", **options)
    least = str(error.value).split("at least ")[1].split(",")[0]
    for mib in (least, "0.15"):  # what the error asks for is enough, for the backward too
        monkeypatch.setenv("FASTKD_WORKSPACE_MIB", mib)
        for got, want in zip(kernel(student, teacher, weight, **options), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=3e-6 * want.abs().max().item())


def test_matrices_kept_for_a_backward_with_less_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """H by stripes needs tiles below the diagonal, which are not kept: they are computed again."""
    student, teacher, weight = rows((1, 135, 20), 0), rows((1, 135, 9), 1), rows((1, 135), 2)
    want = kernel(student, teacher, weight, keep=True)[1]
    leaf = student.detach().requires_grad_()
    loss = relation(leaf, teacher, keep=True, backend="triton")
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.2")
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, weight)[0], want, rtol=1e-5, atol=1e-7)


def test_launches_cover_everything_once_within_the_workspace() -> None:
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
    # What a training step of the sizes needs at once stays below 32 MiB, one row block well below it.
    plan = plans.Plan(2, 14400, False, "kl", "bf16", False, 9)
    assert plan.least_bytes() < 8 * 2**20


def test_enough_programs_for_a_large_gpu() -> None:
    """(8, 512, 900): more tiles than an H100 has processors, forward and backward."""
    for kept in (False, True):
        plan = plans.Plan(8, 512, False, "kl", "bf16", kept, 9)
        assert min(plan.forward.programs, plan.backward.programs) >= 132
        assert 8 * plan.backward.blocks * plans.cdiv(900, plan.product.cols) >= 132


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_maps_seen_as_rows_of_pixels(dtype: torch.dtype, cross: bool) -> None:
    """Rows are then the inner dimension, of any alignment, on one side or on both; the gradient is laid out alike."""
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
def test_equal_networks_give_exactly_nothing(form: str) -> None:
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
def test_norms_near_the_ends_of_squares(scale: float) -> None:
    student, teacher = rows((1, 20, 30), 0), rows((1, 20, 30), 1)
    loss, grad = kernel(student * scale, teacher * scale, torch.ones(1, 20, device=DEVICE))
    want = kernel(student, teacher, torch.ones(1, 20, device=DEVICE))
    torch.testing.assert_close(loss, want[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad * scale, want[1], rtol=1e-3, atol=1e-6)


def test_row_cosine_near_and_at_norms_of_nothing() -> None:
    """|u − v|² of relations near each other keeps its digits; a network of zero rows has relations of norm 0."""
    teacher = rows((1, 40, 12), 0)
    for difference in (1e-1, 1e-3):
        check(teacher + difference * rows((1, 40, 12), 1), teacher, torch.ones(1, 40, device=DEVICE),
              distance="row_cosine", similarity="mean")  # fmt: skip
    for student, other in ((teacher, torch.zeros_like(teacher)), (torch.zeros_like(teacher), teacher)):
        for similarity in ("cosine", "dot"):
            check(student, other, torch.ones(1, 40, device=DEVICE), distance="row_cosine", similarity=similarity)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends whose kernels are called, Triton being what "auto" prefers."""
    monkeypatch.setitem(dispatch.AUTO_ORDER, DEVICE, ("triton", "reference"))
    relation(rows((1, 9, 4), 0), rows((1, 9, 4), 1))  # a backend's first call tests it
    names: list[str] = []
    forward = triton_calls.forward
    monkeypatch.setattr(triton_calls, "forward", lambda *a: names.append("triton") or forward(*a))
    return names


def test_auto_takes_gram_matrices_for_the_mse_of_narrow_rows(called: list[str]) -> None:
    for width, expected in ((20, []), (21, ["triton"])):  # up to half of the 40 columns
        student, teacher = rows((1, 40, width), 0), rows((1, 40, width), 1)
        got = relation(student, teacher, distance="mse")
        assert called == expected
        torch.testing.assert_close(got, reference(student, teacher, distance="mse"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("wish", "expected"), [("triton", ["triton"]), ("reference", []), ("", [])])
def test_a_backend_asked_for_by_the_environment_computes_narrow_rows_too(
    monkeypatch: pytest.MonkeyPatch, called: list[str], wish: str, expected: list[str], compiled: bool
) -> None:
    """No Gram matrices then."""
    monkeypatch.setenv("FASTKD_BACKEND", wish)
    gram: list[None] = []
    made = operator.relation_mse_gram
    monkeypatch.setattr(operator, "relation_mse_gram", lambda *a, **k: gram.append(None) or made(*a, **k))
    student, teacher = rows((1, 40, 5), 0), rows((1, 40, 5), 1)
    call = lambda: relation(student, teacher, distance="mse")
    torch._dynamo.reset()
    got = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)()
    assert called == expected
    assert len(gram) == (wish == "")
    torch.testing.assert_close(got, reference(student, teacher, distance="mse"))
