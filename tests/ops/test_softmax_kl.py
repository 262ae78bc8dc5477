"""softmax_kl on every backend. The checks common to all families are in ``tests/contract``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd.ops.softmax_kl import softmax_kl
from fastkd.ops.softmax_kl.reference import softmax_kl as reference

# One shape per code path of the kernels: a single column, a partial vector, several rows per block, exactly one block,
# a loop with a tail, few rows split over several programs. Small, as they also run in Triton's interpreter.
SHAPES = [(2, 3, 1), (1, 2, 7), (2, 11, 49), (1, 2, 512), (1, 2, 2 * 1024 + 37), (1, 2, 3 * 4096 + 5)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = math.inf, math.nan


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype) for _ in range(2)]


def run(
    student: Tensor, teacher: Tensor, temperature: float, backend: str, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return per-row losses (B, R) and the student's gradient of their weighted sum."""
    student = student.detach().requires_grad_()
    loss = softmax_kl(student, teacher, temperature=temperature, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum() if weight is None else (loss * weight).sum(), student)
    return loss.detach(), grad


def oracle(student: Tensor, teacher: Tensor, temperature: float, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return losses and gradient in fp64, from the definition."""
    s, t = student.detach().cpu().double(), teacher.detach().cpu().double()
    loss = reference(s, t, temperature)
    g = torch.ones_like(loss) if weight is None else weight.cpu().double()
    grad = g[..., None] * ((s / temperature).softmax(-1) - (t / temperature).softmax(-1)) / temperature
    return loss, grad


def eager(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return losses and gradient of the plain torch formula, in the inputs' dtype."""
    student = student.detach().requires_grad_()
    log_p = torch.log_softmax(student / temperature, -1)
    p_t = torch.softmax(teacher / temperature, -1)
    loss = torch.nn.functional.kl_div(log_p, p_t, reduction="none").sum(-1)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad


def error(got: Tensor, exact: Tensor) -> float:
    return (got.cpu().double() - exact).abs().max().item()


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Return half a unit in the last place of the largest entry, the error of storing the exact result in ``dtype``."""
    return max(exact.abs().max().item(), torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps / 2


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0, 20.0])
def test_error_against_fp64(place: Any, shape: tuple[int, ...], dtype: torch.dtype, temperature: float) -> None:
    student, teacher = make(shape, dtype, place.device, scale=2.0)
    exact_loss, exact_grad = oracle(student, teacher, temperature)
    loss, grad = run(student, teacher, temperature, place.backend)
    plain_loss, plain_grad = eager(student, teacher, temperature)

    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    # With one or two entries eager may be exact by chance, so the rounding of the stored result is always allowed.
    magnitude = torch.tensor(10.0 / temperature + math.log(shape[-1]))  # of the summands that cancel in the loss
    assert error(loss, exact_loss) <= 2 * error(plain_loss, exact_loss) + 2 * rounding(magnitude, torch.float32)
    assert error(grad, exact_grad) <= 2 * error(plain_grad, exact_grad) + rounding(exact_grad, dtype)
    # Hard ceilings, independent of eager's error.
    assert error(loss, exact_loss) <= 16 * rounding(magnitude, torch.float32)
    statistics = 8 * rounding(magnitude, torch.float32) * exact_grad.abs().max().item()
    assert error(grad, exact_grad) <= rounding(exact_grad, dtype) + statistics + rounding(exact_grad, torch.float32)


def test_student_equal_to_teacher_is_exactly_zero(place: Any) -> None:
    student, _ = make((2, 3, 130), torch.float32, place.device, scale=5.0)
    loss, grad = run(student, student.clone(), 0.5, place.backend)
    assert loss.abs().max() <= 1e-6
    assert grad.abs().max() <= (1e-6 if place.backend == "reference" else 0)


@pytest.mark.parametrize("cols", [5, 2500, 9000])
def test_infinities_and_nan(place: Any, cols: int) -> None:
    """Each row has a different special value; its loss must be finite, inf or NaN where the oracle's is."""
    student, teacher = make((1, 12, cols), torch.float32, place.device)
    last = cols - 1
    student[0, 0, 3] = NAN
    teacher[0, 1, last] = NAN
    student[0, 2, last] = INF
    teacher[0, 3, 0] = INF
    student[0, 4, 1] = teacher[0, 4, 1] = -INF  # 0·log(0/0) = 0
    teacher[0, 5, 2] = -INF  # 0·log 0 = 0
    student[0, 6, 2] = -INF  # p·log(p/0) = inf
    student[0, 7] = -INF
    teacher[0, 8] = -INF
    student[0, 9] = teacher[0, 9] = -INF
    student[0, 10, : last - 1] = teacher[0, 10, : last - 1] = -INF
    loss, grad = run(student, teacher, 0.7, place.backend)
    exact_loss, exact_grad = oracle(student, teacher, 0.7)
    torch.testing.assert_close(loss.cpu().double(), exact_loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    finite = exact_loss[0].isfinite()
    assert finite.sum() == 4  # rows 4, 5, 10, 11
    torch.testing.assert_close(grad.cpu().double()[0, finite], exact_grad[0, finite], rtol=1e-5, atol=1e-6)
    assert grad.cpu()[0, [0, 1]].isnan().any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_largest_fp16_values(place: Any, dtype: torch.dtype) -> None:
    student, teacher = make((1, 2, 33), torch.float32, place.device)
    student, teacher = student.to(dtype), teacher.to(dtype)
    student[0, 0, 0] = teacher[0, 0, 5] = torch.finfo(torch.float16).max
    student[0, 1, 0] = teacher[0, 1, 5] = torch.finfo(torch.float16).min
    loss, grad = run(student, teacher, 4.0, place.backend)
    exact_loss, exact_grad = oracle(student, teacher, 4.0)
    torch.testing.assert_close(loss.cpu().double(), exact_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=1e-2, atol=1e-6)


@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 20),
    cols=st.integers(1, 300),
    temperature=st.floats(0.05, 20.0),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    seed=st.integers(0, 2**16),
)
@example(batch=1, rows=1, cols=1025, temperature=1.0, scale=1.0, dtype=torch.float32, seed=0)
@example(batch=3, rows=13, cols=299, temperature=0.296875, scale=30.0, dtype=torch.float32, seed=665)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes_and_options(
    place: Any, batch: int, rows: int, cols: int, temperature: float, scale: float, dtype: torch.dtype, seed: int
) -> None:
    student, teacher = make((batch, rows, cols), dtype, place.device, scale=scale, seed=seed)
    weight = torch.linspace(-1, 1, batch * rows, device=place.device).reshape(batch, rows)
    loss, grad = run(student, teacher, temperature, place.backend, weight)
    exact_loss, exact_grad = oracle(student, teacher, temperature, weight)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    magnitude = torch.tensor(8 * scale / temperature + math.log(cols) + 1)
    allowed = 16 * rounding(magnitude, accumulate)
    if place.backend == "reference":  # unlike the kernels', the plain formula's error grows with the loss
        plain = error(eager(student.to(accumulate), teacher.to(accumulate), temperature)[0], exact_loss)
        allowed = max(allowed, 2 * plain)
    assert error(loss, exact_loss) <= allowed
    statistics = 16 * rounding(magnitude, accumulate) / temperature
    assert error(grad, exact_grad) <= 1.01 * rounding(exact_grad, dtype) + statistics + 1e-7 * (dtype == torch.float16)


def test_fp64_is_computed_in_fp64(place: Any) -> None:
    student, teacher = make((2, 2, 1100), torch.float64, place.device)
    loss, grad = run(student, teacher, 0.3, place.backend)
    exact_loss, exact_grad = oracle(student, teacher, 0.3)
    assert loss.dtype == grad.dtype == torch.float64
    assert error(loss, exact_loss) < 1e-13
    assert error(grad, exact_grad) < 1e-14


# --- operator contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=str)
def test_empty_inputs_give_empty_results(place: Any, shape: tuple[int, ...]) -> None:
    student, teacher = make(shape, torch.float32, place.device)
    loss, grad = run(student, teacher, 1.0, place.backend)
    assert loss.shape == shape[:2]
    assert grad.shape == shape


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_compiled_once_for_all_batch_sizes(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    from fastkd.ops import dispatch

    if dispatch.unavailable_reason(backend if backend != "auto" else "reference") is not None:
        pytest.skip(f"the {backend} backend is unavailable")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t: softmax_kl(s, t, temperature=1.0, backend=backend).sum(),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    for batch in (2, 3, 5, 8):
        student, teacher = make((batch, 4, 600), torch.float32, "cpu")  # all large enough for the kernel
        student.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(student, teacher), student)
        assert error(grad, oracle(student, teacher, 1.0)[1]) < 1e-6
    assert counter.frame_count == 1


# --- invalid input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"student": torch.zeros(2, 3)}, ValueError, r"\(B, R, N\).*\(2, 3\)"),
        ({"teacher": torch.zeros(2, 3, 5)}, ValueError, r"shapes differ, \(2, 3, 4\) and \(2, 3, 5\)"),
        ({"student": torch.zeros(2, 3, 0), "teacher": torch.zeros(2, 3, 0)}, ValueError, "empty row"),
        ({"student": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "floating.*int64"),
        ({"teacher": torch.zeros(2, 3, 4, device="meta")}, ValueError, "teacher: is on meta, but student is on cpu"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number above 0"),
        ({"temperature": NAN}, ValueError, "temperature: expected a finite number above 0"),
        ({"teacher": torch.zeros(2, 3, 4, requires_grad=True)}, ValueError, r"teacher.*detach\(\)"),
        ({"backend": "gpu"}, ValueError, "backend.*auto, reference, cpu, triton, cuda.*'gpu'"),
    ],
)
def test_rejects_invalid_input(change: dict[str, Any], exception: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "student": torch.zeros(2, 3, 4),
        "teacher": torch.zeros(2, 3, 4),
        "temperature": 1.0,
        "backend": "auto",
    } | change
    student, teacher = arguments.pop("student"), arguments.pop("teacher")
    with pytest.raises(exception, match=message):
        softmax_kl(student, teacher, **arguments)
