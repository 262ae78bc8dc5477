"""The CPU kernels of relation: forms, block edges, bfloat16, threads and special values."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import relation_tools
import torch
from relation_tools import FORMS, distance, loss_and_gradient, run_kernel
from torch import Tensor

from fastkd import _native
from fastkd.ops.relation.reference import relation as reference

try:
    cpu = _native.load("cpu")
except ImportError as error:
    pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)

# Widths and rows at the edges of blocks (96 and 48 rows), panels (48, 32, 24, ...) and chunks (64 and 256 columns).
SHAPES = [(2, 3, 5, 4), (1, 1, 1, 1), (1, 100, 33, 33), (2, 97, 64, 80), (1, 193, 70, 300), (1, 48, 257, 257)]
DISTANCES = ["kl", "mse", "row_cosine"]


rows = functools.partial(relation_tools.rows, device="cpu")
kernel = functools.partial(run_kernel, "cpu")


def without_keep(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "keep"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference_for_every_form_layout_and_distance(shape: tuple[int, int, int, int], form: str) -> None:
    batch, count, width_s, width_t = shape
    weight = rows((batch, count), 3)
    for name, similarity, by_columns in itertools.product(DISTANCES, ("cosine", "mean"), (False, True)):
        student, teacher = rows((batch, count, width_s), 0), rows((batch, count, width_t), 1)
        if by_columns:  # as a map (B, K, H, W) seen as rows of pixels
            student, teacher = student.mT.contiguous().mT, teacher.mT.contiguous().mT
        options = {"similarity": similarity, "distance": name, "temperature": 0.5, **FORMS[form]}
        loss, grad = kernel(student, teacher, weight, **options)
        exact = loss_and_gradient(
            reference, student.double(), teacher.double(), weight.double(), **without_keep(options)
        )
        plain = loss_and_gradient(reference, student, teacher, weight, **without_keep(options))
        assert grad.stride() == student.stride() or count == 1
        if count == 1 and name != "mse":
            assert loss.abs().max() <= 1e-6  # a single row has only its relation to itself
            assert grad.abs().max() <= 1e-6
            continue
        for got, eager, expected in zip((loss, grad), plain, exact, strict=True):
            assert distance(got, expected) <= 2 * distance(eager, expected) + 4e-7, (name, similarity, by_columns)


@pytest.mark.parametrize("temperature", [0.005, 0.05, 20.0])
@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_cosine_kl_with_shared_and_per_row_shifts(form: str, negate: bool, temperature: float) -> None:
    """Below τ = 0.02 each row has its own maximum. Rows are similar so that softmax at 0.005 is not one-hot."""
    base = rows((2, 1, 20), 5)
    student, teacher = (base + 0.1 * rows((2, 110, 20), seed) for seed in (6, 7))
    weight = rows((2, 110), 3)
    options = {"temperature": temperature, "negate": negate, **FORMS[form]}
    loss, grad = kernel(student, teacher, weight, **options)
    exact = loss_and_gradient(reference, student.double(), teacher.double(), weight.double(), **without_keep(options))
    plain = loss_and_gradient(reference, student, teacher, weight, **without_keep(options))
    for got, eager, expected in zip((loss, grad), plain, exact, strict=True):
        assert distance(got, expected) <= 2 * distance(eager, expected) + 4e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("widths", [(20, 20), (20, 13)], ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_gram_form_matches_reference(cross: bool, widths: tuple[int, int], dtype: torch.dtype) -> None:
    """Per-row weights and a uniform weight take different branches of the backward."""
    student, teacher = rows((2, 300, widths[0]), 0, dtype), rows((2, 300, widths[1]), 1, dtype)
    for similarity in ("cosine", "mean", "dot"):
        for weight in (rows((2, 300), 3), torch.ones(()).expand(2, 300), torch.full((2, 300), 0.5)):
            options = {"similarity": similarity, "distance": "mse", "cross": cross}
            loss, grad = kernel(student, teacher, weight, **options)
            exact = loss_and_gradient(reference, student.double(), teacher.double(), weight.double(), **options)
            assert grad.dtype == dtype
            assert distance(loss, exact[0]) <= (1e-13 if dtype == torch.float64 else 1e-6)
            # Storing the gradient costs half a unit in the last place, and more in fp16's subnormals.
            assert distance(grad, exact[1]) <= {torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 4e-3}[dtype]


def correlated_inputs(kind: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return student and teacher in bfloat16 whose gradients cancel in different ways."""
    student, teacher = rows(shape, 0, torch.float64), rows(shape, 1, torch.float64)
    common = rows((shape[0], 4, shape[2]), 2, torch.float64)
    if kind == "near the teacher":
        teacher = student + 0.05 * teacher
    elif kind == "one direction":
        student, teacher = common[:, :1] + 0.1 * student, common[:, :1] + 0.1 * teacher
    elif kind == "four directions":
        common = common[:, torch.arange(shape[1]) % 4]
        student, teacher = common + 0.1 * student, common + 0.1 * teacher
    elif kind == "positive":
        student, teacher = student.relu(), teacher.relu()
    elif kind == "mixed magnitudes":
        student = student * torch.logspace(-3, 3, shape[1], dtype=torch.float64)[:, None]
    return student.bfloat16(), teacher.bfloat16()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind", ["independent", "near the teacher", "one direction", "four directions", "positive", "mixed magnitudes"]
)
def test_bfloat16_gradient_error_is_at_most_two_roundings(kind: str, form: str) -> None:
    """The gradient is rounded, and H may be before its product with the rows: √2 roundings without cancellation."""
    student, teacher = correlated_inputs(kind, (2, 203, 150))
    weight = rows((2, 203), 3).abs()
    for by_columns, name, temperature in itertools.product((False, True), ("kl", "row_cosine"), (0.1, 1.0)):
        if by_columns:
            student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
        options = {"distance": name, "temperature": temperature, **FORMS[form]}
        grad = kernel(student, teacher, weight, **options)[1]
        exact = loss_and_gradient(
            reference, student.double(), teacher.double(), weight.double(), **without_keep(options)
        )[1]
        assert distance(grad, exact) <= 1.6 * distance(exact.bfloat16(), exact), (by_columns, name, temperature)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_gradient_for_every_shape(shape: tuple[int, int, int, int], form: str) -> None:
    batch, count, width_s, width_t = shape
    student, teacher = rows((batch, count, width_s), 0, torch.bfloat16), rows((batch, count, width_t), 1).bfloat16()
    weight = rows((batch, count), 3)
    for similarity, name, by_columns in itertools.product(("cosine", "mean"), DISTANCES, (False, True)):
        if by_columns:
            student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
        options = {"similarity": similarity, "distance": name, "temperature": 0.5, **FORMS[form]}
        grad = kernel(student, teacher, weight, **options)[1]
        exact = loss_and_gradient(
            reference, student.double(), teacher.double(), weight.double(), **without_keep(options)
        )[1]
        assert (grad.double() - exact).norm() <= 4e-3 * exact.norm() + 1e-6, (similarity, name, by_columns)


@pytest.mark.parametrize("form", FORMS)
def test_large_bfloat16_rows_are_scaled_before_multiplication(form: str) -> None:
    """The gradient is the same except for the rounding of H."""
    student, teacher, weight = (
        rows((1, 110, 40), 0, torch.bfloat16),
        rows((1, 110, 40), 1).bfloat16(),
        rows((1, 110), 2),
    )
    grad = kernel(student, teacher, weight, **FORMS[form])[1]
    far = kernel(student * 2.0**60, teacher, weight * 2.0**60, **FORMS[form])[1]
    assert distance(far, grad.double()) <= 4e-3


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_zero_rows_and_nan(form: str) -> None:
    student, teacher = rows((2, 110, 30), 0, torch.bfloat16), rows((2, 110, 30), 1).bfloat16()
    student[0, 3] = 0
    student[0, 50, 7] = math.nan
    loss, grad = kernel(student, teacher, torch.ones(2, 110), **FORMS[form])
    assert grad[0, 3].abs().max() == 0
    others = [r for r in range(110) if r != 3]
    assert loss[0].isnan().all()
    assert grad[0, others].isnan().all()
    assert form == "across samples" or (loss[1].isfinite().all() and grad[1].isfinite().all())


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3])
def test_gram_form_is_accurate_near_the_teacher(difference: float) -> None:
    teacher = rows((1, 400, 16), 0)
    student = teacher + difference * rows((1, 400, 16), 1)
    wide = torch.cat([teacher, torch.zeros(1, 400, 1)], 2)  # equal relations, but widths differ
    weight = torch.ones(1, 400)
    for target in (teacher, wide):
        loss, grad = kernel(student, target, weight, distance="mse")
        exact = loss_and_gradient(reference, student.double(), target.double(), weight.double(), distance="mse")
        plain = loss_and_gradient(reference, student, target, weight, distance="mse")
        for got, eager, expected in zip((loss, grad), plain, exact, strict=True):
            assert distance(got, expected) <= 2 * distance(eager, expected) + 4e-7


def plain_formula(student: Tensor, teacher: Tensor, similarity: str) -> Tensor:
    """Return the mse computed in the inputs' dtype throughout, the baseline for the kernels' errors."""

    def matrix(x: Tensor) -> Tensor:
        if similarity == "cosine":
            x = torch.nn.functional.normalize(x, dim=-1)
        return x @ x.mT / (x.shape[-1] if similarity == "mean" else 1)

    return (matrix(student) - matrix(teacher)).square().mean(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(24, 12), (12, 24), (20, 17)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_unequal_widths_are_accurate_near_the_teacher(
    noise: float, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    """Relations nearly agree although channels do not correspond (orthogonal map) or only partly (padding)."""
    width, exactness = min(widths), torch.finfo(torch.float64).eps
    for offset, similarity in ((0.0, "cosine"), (2.0, "cosine"), (0.0, "mean")):
        base = rows((1, 300, width), 0, torch.float64) + offset * rows((1, 1, width), 1, torch.float64)
        rotated = base @ torch.linalg.qr(rows((widths[0], widths[0]), 2, torch.float64))[0][:width]
        padded, teacher = (torch.nn.functional.pad(base, (0, size - width)) for size in widths)
        for mapped in (rotated, padded):
            student = (mapped + noise * rows((1, 300, widths[0]), 3, torch.float64)).to(dtype)
            teacher, weight = teacher.to(dtype), rows((1, 300), 4)
            loss, grad = kernel(student, teacher, weight, similarity=similarity, distance="mse")
            doubles = (student.double(), teacher.double(), weight.double())
            exact = loss_and_gradient(plain_formula, *doubles, similarity=similarity)
            plain = loss_and_gradient(plain_formula, student, teacher, weight.to(dtype), similarity=similarity)
            for got, eager, expected in zip((loss, grad), plain, exact, strict=True):
                stored = torch.finfo(got.dtype).eps * expected.abs().max() + torch.finfo(got.dtype).smallest_normal
                allowed = 2 * (eager.double() - expected).abs().max() + stored + 32 * exactness
                assert (got.double() - expected).abs().max() <= allowed, (similarity, offset)
            size = plain_formula(doubles[0], 0 * doubles[1], similarity).max()  # mean E²
            arithmetic = torch.float32 if dtype == torch.bfloat16 else torch.float64
            assert loss.min() >= -32 * torch.finfo(arithmetic).eps * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [*FORMS, "gram"])
@pytest.mark.parametrize("batch", [1, 3])
def test_results_are_identical_for_any_number_of_threads(form: str, batch: int, dtype: torch.dtype) -> None:
    """With one sample, threads share a problem; with three, each thread computes whole problems."""
    student, teacher = rows((batch, 330, 30), 0, dtype), rows((batch, 330, 30), 1, dtype)
    weight = rows((batch, 330), 2)
    options = {"distance": "mse"} if form == "gram" else FORMS[form]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernel(student, teacher, weight, **options))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DISTANCES)
def test_zero_and_tiny_rows_get_a_zero_gradient(name: str, form: str) -> None:
    student, teacher, weight = rows((2, 110, 30), 0), rows((2, 110, 30), 1), torch.ones(2, 110)
    student[0, 3] = teacher[0, 5] = 0
    student[1, 7] = 1e-14
    options = {"distance": name, **FORMS[form]}
    loss, grad = kernel(student, teacher, weight, **options)
    want = loss_and_gradient(reference, student, teacher, weight, **without_keep(options))
    torch.testing.assert_close(loss, want[0], rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(grad, want[1], rtol=1e-4, atol=5e-6)
    assert grad[0, 3].abs().max() == grad[1, 7].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_norms_whose_squares_overflow_or_underflow(scale: float) -> None:
    student, teacher, weight = rows((1, 60, 30), 0) * scale, rows((1, 60, 30), 1), torch.ones(1, 60)
    if scale > 1:
        loss, _ = kernel(student, teacher, weight)
        exact, _ = loss_and_gradient(reference, student.double(), teacher.double(), weight.double())
        assert distance(loss, exact) <= 1e-5
    else:  # norms below NORM_FLOOR: zero gradient
        assert kernel(student, teacher, weight)[1].abs().max() == 0


def test_equal_networks_give_exactly_zero() -> None:
    student, weight = rows((2, 110, 30), 0), rows((2, 110), 1)
    for form, name in itertools.product(FORMS, ("kl", "mse")):
        loss, grad = kernel(student, student.clone(), weight, distance=name, **FORMS[form])
        assert loss.abs().max() == grad.abs().max() == 0


def test_native_call_rejects_invalid_arguments() -> None:
    good = [1, 4, 5, 5, "cosine", "kl", 0.1, False, False, "float32", "streamed", 1, 2**25]
    for index, bad, message in (
        (0, 0, "expected at least 1"),
        (4, "cos", "similarity: expected cosine, mean or dot, got 'cos'"),
        (5, "l2", "distance: expected kl, mse or row_cosine, got 'l2'"),
        (6, 0.0, "temperature"),
        (9, "int8", "dtype"),
        (10, "gram", "form: expected streamed or stored unless distance is mse, got 'gram'"),
        (10, "all", "form: expected streamed, stored or gram, got 'all'"),
        (11, 0, "threads: expected 1 to 4096, got 0"),
    ):
        arguments = [*good]
        arguments[index] = bad
        with pytest.raises(ValueError, match=message):
            cpu.Relation(*arguments)
    call = cpu.Relation(*good)
    with pytest.raises(ValueError, match="student: expected an address, got 0"):
        call.forward((0, 5, 20, 5, 1, False), (64, 5, 20, 5, 1, False), 64, 64, 64, 64)
