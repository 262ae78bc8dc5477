"""The relation kernels in CUDA C++: edges of tiles, bands, layouts, workspace, arguments.

Without a GPU they run on CPU tensors, built for the host (``emulation.py``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

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
    loss_and_gradient,
    one_block_per_launch,
    rows,
    run_kernel,
)

from fastkd.ops.launch import dtype_name, native
from fastkd.ops.relation import plan as relation_plan
from fastkd.ops.relation import relation
from fastkd.ops.relation.reference import relation as reference

pytestmark = [*MARKS, pytest.mark.usefixtures("kernels")]


@pytest.fixture
def kernels() -> Iterator[None]:
    with require_gpu_kernels("cuda"):
        yield


kernel = functools.partial(run_kernel, "cuda")
check = functools.partial(check_kernel, "cuda")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_tiles(dtype: torch.dtype, method: str, form: str) -> None:
    """Rows and widths slightly above block sizes: an almost empty second row block, a k-tile of one column."""
    shape = (2 if form == "across samples" else 1, 67, 17 if dtype == torch.float32 else 33)
    student, teacher = drawn_for(method, shape, dtype)
    check(student, teacher, rows(shape[:2], 3).abs(), **METHODS[method], **FORMS[form])


@pytest.mark.parametrize(
    ("dtype", "method", "form"),
    [
        (torch.bfloat16, "kl", "streamed"),
        (torch.float16, "kl", "stored"),
    ],
    ids=str,
)
def test_edges_of_large_tiles(dtype: torch.dtype, method: str, form: str) -> None:
    """89 samples of three tiles each: enough for tiles of 128 x 128."""
    student, teacher = drawn_for(method, (89, 131, 9), dtype)
    weight = rows((89, 131), 3).abs()
    want = check(student, teacher, weight, **METHODS[method], **FORMS[form])
    if method == "kl" and dtype == torch.bfloat16:
        columns = [x.mT.contiguous().mT for x in (student, teacher)]
        assert_near(kernel(*columns, weight, **METHODS[method], **FORMS[form]), want)


@pytest.mark.parametrize("method", METHODS)
def test_single_row_and_single_column(method: str) -> None:
    for shape in ((2, 1, 7), (2, 5, 1)):
        check(rows(shape, 0), rows(shape, 1), rows(shape[:2], 3), min_size=4.0, **METHODS[method])


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_of_every_alignment(dtype: torch.dtype) -> None:
    """Copies of 16, 8 and 4 bytes, as widths, strides and addresses allow; a padded copy of other 16-bit rows."""
    weight = rows((2, 70), 2)
    for width in (40, 36, 34, 35):
        student, teacher = rows((2, 70, width), 0, dtype), rows((2, 70, width), 1, dtype)
        want = check(student, teacher, weight)
        for first in (1, 2, 4):  # offset of the address in elements
            shifted = torch.zeros(student.numel() + first, dtype=dtype, device=DEVICE)[first:].view_as(student)
            shifted.copy_(student)
            assert_near(kernel(shifted, teacher, weight), want)
        spaced = torch.full((2, 70, 2 * width), math.nan, dtype=dtype, device=DEVICE)[..., ::2].copy_(student)
        assert_near(kernel(spaced, teacher, weight), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_feature_maps_viewed_as_rows_of_pixels(dtype: torch.dtype, cross: bool) -> None:
    """Rows are contiguous, with any alignment, on one side or both; the gradient has the same layout."""
    for count, width in ((72, 6), (68, 37), (66, 5), (67, 8)) if not cross else ((11, 5), (72, 9)):
        student, teacher = rows((2, count, width), 0, dtype), rows((2, count, width + 2), 1, dtype)
        columns = [x.mT.contiguous().mT for x in (student, teacher)]
        weight = rows((2, count), 2)
        want = kernel(student, teacher, weight, cross=cross)
        for s, t in (columns, (student, columns[1]), (columns[0], teacher)):
            got = kernel(s, t, weight, cross=cross)
            assert got[1].stride() == s.stride()
            assert_near(got, want)


# --- workspace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_small_workspace_gives_the_same_results(
    monkeypatch: pytest.MonkeyPatch, cross: bool, dtype: torch.dtype
) -> None:
    """Bands of row blocks are computed one after another, without an N x N matrix in memory."""
    count = 70 if cross else 200  # four row blocks
    student, teacher = drawn_for("kl", (2, count, 20), dtype)
    weight = rows((2, count), 2)
    whole = kernel(student, teacher, weight, cross=cross)
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.01")
    with pytest.raises(ValueError, match=r"a workspace of 0\.01 MiB does not hold one block of rows") as error:
        relation(student, teacher, cross=cross, backend="cuda")
    minimum = float(str(error.value).split("at least ")[1].split(",")[0])
    for mib in (minimum, 1.6 * minimum):  # the size in the error is enough, also for the backward
        monkeypatch.setenv("FASTKD_WORKSPACE_MIB", str(mib))
        assert_near(kernel(student, teacher, weight, cross=cross), whole)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("method", ["kl", "kl maxima", "kl of means", "mse", "row_cosine"])
def test_launches_of_one_row_block_give_the_same_results(
    monkeypatch: pytest.MonkeyPatch, method: str, cross: bool
) -> None:
    """The smallest workspace, set by the backward, holds several row blocks of the forward."""
    student, teacher = drawn_for(method, (2, 70 if cross else 135, 20))  # three or four row blocks
    weight = rows(student.shape[:2], 2)
    options = {**METHODS[method], "cross": cross}
    whole = kernel(student, teacher, weight, **options)
    one_block_per_launch(monkeypatch, "native")
    assert_near(kernel(student, teacher, weight, **options), whole)


def test_stored_matrices_with_a_smaller_workspace_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, weight = rows((1, 200, 20), 0), rows((1, 200, 9), 1), rows((1, 200), 2)
    want = kernel(student, teacher, weight, keep=True)[1]
    leaf = student.detach().requires_grad_()
    loss = relation(leaf, teacher, keep=True, backend="cuda")
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.2")
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, weight)[0], want, rtol=1e-5, atol=1e-7)


SIZES = ((32, 512, 900, 900), (16, 512, 3600, 3600), (32, 1024, 225, 225), (8, 3600, 256, 256), (2, 14400, 128, 128),
         (8, 512, 900, 900), (1, 1, 3, 5), (300, 2000, 64, 32), (264, 65, 9, 9), (263, 65, 9, 9))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_workspace_and_stored_sizes(method: str, dtype: torch.dtype) -> None:
    """The workspace is within the limit, except for the fp32 sums of bands; Python computes the same stored size."""
    limit = 32 * 2**20
    options = {"similarity": "cosine", "distance": "kl", "temperature": 0.1, "negate": False} | METHODS[method]
    named = (options["similarity"], options["distance"], options["temperature"])
    for batch, count, *widths in SIZES:
        for cross in (False, True):
            if cross and batch * count > 40000:
                continue
            call = native("cuda").Relation(
                batch, count, *widths, *named, options["negate"], cross, dtype_name(dtype),
                "streamed" if cross else "stored", 0, limit,
            )  # fmt: skip
            for backward in (False, True):
                needed, minimum = call.workspace_bytes(backward)
                own = batch * (count + 127) * (widths[0] + 127) * 4 if backward else 0
                assert minimum <= limit
                assert needed <= limit + own
            if not cross:
                assert call.stored_elements() == relation_plan.stored_elements(batch, count, dtype, *named)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equal_student_and_teacher_give_exact_zeros(form: str, dtype: torch.dtype) -> None:
    count = 20 if form == "across samples" else 70
    student, weight = rows((2, count, 30), 0, dtype), rows((2, count), 1)
    for options in METHODS.values():
        loss, grad = kernel(student, student.clone(), weight, **options, **FORMS[form])
        assert loss.abs().max() == grad.abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_are_rounded(dtype: torch.dtype) -> None:
    """Tensor cores truncate their sums: 3600 positive products in one chain give 7 times the error of fp32."""
    student, teacher = (rows((1, 66, 3600), seed, dtype).abs() for seed in (0, 1))
    got = relation(student, teacher, backend="cuda", **METHODS["mse"])
    plain = reference(student.float(), teacher.float(), **METHODS["mse"])
    exact = reference(student.double(), teacher.double(), **METHODS["mse"])
    assert (got - exact).abs().max() <= 4 * (plain - exact).abs().max()


def test_gradients_stay_precise_near_the_teacher() -> None:
    """H is computed from differences, so its error shrinks with it."""
    teacher, direction, weight = rows((1, 66, 30), 0), rows((1, 66, 30), 1), rows((1, 66), 2).abs()
    for distance in (1e-2, 1e-4):
        student = teacher + distance * direction
        for options in (METHODS["kl"], METHODS["kl maxima"], METHODS["mse"], METHODS["row_cosine"]):
            grad = kernel(student, teacher, weight, **options)[1].double()
            exact = loss_and_gradient(reference, student.double(), teacher.double(), weight.double(), **options)[1]
            # Rounding the similarities costs 1e-7, relative to their differences.
            assert (grad - exact).abs().max() <= 1e-6 / distance * exact.abs().max()


@pytest.mark.parametrize("distance", ["kl", "mse", "row_cosine"])
def test_rows_of_zeros_and_tiny_rows(distance: str) -> None:
    student, teacher = rows((2, 66, 30), 0), rows((2, 66, 30), 1)
    student[0, 3] = teacher[0, 5] = 0
    student[1, 65] = 1e-14
    for keep in (False, True):
        loss, grad = check(student, teacher, torch.ones(2, 66, device=DEVICE), distance=distance, keep=keep)
        assert grad[0, 3].abs().max() == grad[1, 65].abs().max() == 0
        assert loss.isfinite().all()


def test_rows_of_very_different_norms_in_fp16() -> None:
    """H times the rows' scales has the range of fp32, so tiny rows do not degrade the gradients of others."""
    student, teacher = rows((1, 66, 30), 0, torch.float16), rows((1, 66, 30), 1, torch.float16)
    student[0, 7] *= 1e-4
    student[0, 9] *= 1e3
    exact = loss_and_gradient(reference, student.double(), teacher.double(), torch.ones(1, 66).double().to(DEVICE))[1]
    grad = kernel(student, teacher, torch.ones(1, 66, device=DEVICE))[1]
    for row in range(66):
        size = exact[0, row].abs().max().item()
        if size < 6e4:  # otherwise it overflows fp16
            assert (grad[0, row].double() - exact[0, row]).abs().max() <= 6e-4 * size + 6e-8


def test_infinite_similarities_match_plain_torch() -> None:
    """Products with infinities are those of plain arithmetic; the sum of three tf32 products would be NaN."""
    student, teacher = rows((1, 70, 30), 0).abs(), rows((1, 70, 30), 1).abs()
    for value in (math.inf, -math.inf):
        bad = teacher.clone()
        bad[0, 4, 7] = value
        options = {"similarity": "dot", "temperature": 2.0}
        got = relation(student, bad, backend="cuda", **options)
        want = reference(student, bad, **options)
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_rejects_unsupported_arguments() -> None:
    """Errors are raised before any launch."""
    make = native("cuda").Relation
    named = ("cosine", "kl", 0.1, False, False)
    for wrong, message in (
        ({"dtype": "float64"}, "dtype: expected float32, float16 or bfloat16"),
        ({"form": "gram"}, "form: "),
        ({"rows": 0}, "expected at least 1"),
    ):
        given = {"rows": 3, "dtype": "float32", "form": "streamed"} | wrong
        with pytest.raises(ValueError, match=message):
            make(1, given["rows"], 4, 4, *named, given["dtype"], given["form"], 0, 2**25)
    x, out = torch.zeros(1, 3, 4, device=DEVICE), torch.zeros(64, dtype=torch.float64, device=DEVICE)
    call = make(1, 3, 4, 4, *named, "float32", "streamed", 0, 2**25)
    at = (x.data_ptr(), 4, *x.stride(), False)
    space = torch.empty(call.workspace_bytes(False)[0], dtype=torch.uint8, device=DEVICE).data_ptr()
    for student, loss, message in (
        ((0, *at[1:]), out.data_ptr(), "student: expected an address, got 0"),
        ((at[0] + 2, *at[1:]), out.data_ptr(), "student: expected an address that is a multiple"),
        (at, 0, "loss: expected an address, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call.forward(student, at, loss, out.data_ptr(), 0, space)
    odd = make(1, 3, 3, 3, *named, "bfloat16", "streamed", 0, 2**25)
    with pytest.raises(RuntimeError, match="relation_forward: cudaErrorInvalidValue"):  # neither aligned nor padded
        odd.forward((at[0], 3, 9, 3, 1, False), (at[0], 3, 9, 3, 1, False), out.data_ptr(), out.data_ptr(), 0, space)
    for sizes in ((2**31, 3, 4, 4), (2**16, 2**16, 4, 4), (1, 3, 2**31, 4)):
        huge = make(*sizes, *named, "float32", "streamed", 0, 2**25)
        with pytest.raises(RuntimeError, match="relation_forward: cudaErrorInvalidValue"):
            huge.forward((at[0], sizes[2], *at[2:]), at, out.data_ptr(), out.data_ptr(), 0, space)
