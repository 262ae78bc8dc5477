"""The compiled CPU kernels, called directly: instruction sets, block boundaries, dtypes and row tails."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import _native

try:
    cpu = _native.load("cpu")
except ImportError as error:
    pytest.skip(f"no compiled kernels: {error}", allow_module_level=True)

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BLOCK = 2048  # fp32 columns of a forward block


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 12345.0, dtype=dtype)


def forward(student: Tensor, teacher: Tensor, temperature: float, threads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    b, r, n = student.shape
    loss = poison(b, r, dtype=accumulator(student.dtype))
    lse_student, lse_teacher = poison(b, r, dtype=torch.float64), poison(b, r, dtype=torch.float64)
    outputs = [x.data_ptr() for x in (loss, lse_student, lse_teacher)]
    strides = student.stride()[:2], teacher.stride()[:2]
    inputs = student.data_ptr(), teacher.data_ptr()
    cpu.softmax_kl_forward(*inputs, *outputs, b, r, n, *strides, name(student.dtype), temperature, threads)
    return loss, lse_student, lse_teacher


def backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    lse: tuple[Tensor, Tensor],
    temperature: float,
    threads: int = 2,
    offset: int = 0,
) -> Tensor:
    """Return the gradient, written ``offset`` elements into a larger buffer that must not change elsewhere."""
    b, r, n = student.shape
    guard = 64
    buffer = poison(guard + offset + b * r * n + guard, dtype=student.dtype)
    untouched = buffer[0].item()
    out = buffer[guard + offset : guard + offset + b * r * n]
    strides = student.stride()[:2], teacher.stride()[:2]
    cpu.softmax_kl_backward(
        grad_loss.data_ptr(),
        grad_loss.stride(),
        *(x.data_ptr() for x in (student, teacher, *lse, out)),
        *(b, r, n),
        *strides,
        name(student.dtype),
        temperature,
        threads,
    )
    assert (buffer[: guard + offset] == untouched).all()
    assert (buffer[-guard:] == untouched).all()
    return out.view(b, r, n)


def both(student: Tensor, teacher: Tensor, temperature: float, threads: int = 2, offset: int = 0) -> list[Tensor]:
    loss, *lse = forward(student, teacher, temperature, threads)
    ones = torch.ones((), dtype=loss.dtype).expand(loss.shape)
    return [loss, backward(ones, student, teacher, tuple(lse), temperature, threads, offset)]


def formula(student: Tensor, teacher: Tensor, temperature: float) -> list[Tensor]:
    """Return loss and gradient of the plain torch formula, in the dtype of the inputs."""
    student = student.detach().requires_grad_()
    log_p_s, p_t = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    loss = torch.nn.functional.kl_div(log_p_s, p_t, reduction="none").sum(-1)
    return [loss.detach(), torch.autograd.grad(loss.sum(), student)[0]]


def pair(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 2.0, difference: float = 0.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])
    student = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    teacher = student + torch.randn(shape, generator=generator, dtype=torch.float64) * difference
    return [student.to(dtype), teacher.to(dtype)]


def test_exp_is_within_one_ulp() -> None:
    x = torch.cat([torch.linspace(-87.25, 0, 1_000_003), -torch.logspace(-30, 1, 100_003)])
    y = torch.full_like(x, NAN)
    cpu.exp(x.data_ptr(), y.data_ptr(), x.numel(), "float32")
    exact = x.double().exp()
    ulp = torch.exp2(torch.frexp(exact.float()).exponent.double() - 24)
    assert ((y.double() - exact).abs() / ulp).max() <= 1.0

    x = torch.linspace(-708, 0, 1_000_003, dtype=torch.float64)
    y = torch.full_like(x, NAN)
    cpu.exp(x.data_ptr(), y.data_ptr(), x.numel(), "float64")
    assert ((y - x.exp()) / x.exp()).abs().max() <= 3e-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_at_the_ends_of_its_range(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, -INF, -1e30, -800.0, NAN, -NAN], dtype=dtype)
    y = torch.full_like(x, 7.0)
    cpu.exp(x.data_ptr(), y.data_ptr(), x.numel(), name(dtype))
    assert y[:5].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert y[5:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 3, 15, 16, 17, 225, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_error_is_at_most_twice_torchs(dtype: torch.dtype, cols: int, temperature: float) -> None:
    student, teacher = pair(4, max(4, 8192 // cols), cols, dtype=dtype)
    exact = formula(student.double(), teacher.double(), temperature)
    eager = formula(student, teacher, temperature)
    minimum = 2e-14 if dtype == torch.float64 else 0.0  # in fp64 the oracle is rounded too
    for got, plain, want in zip(both(student, teacher, temperature), eager, exact, strict=True):
        error, eager_error = (x.double() - want for x in (got, plain))
        assert error.square().mean().sqrt() <= 2 * eager_error.square().mean().sqrt() + minimum
        assert error.abs().max() <= 3 * eager_error.abs().max() + minimum


@pytest.mark.parametrize("level", [1e4, -1e4])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_large_logits_do_not_reduce_accuracy(level: float, temperature: float) -> None:
    student, teacher = ((x * 512).round() / 512 + level for x in pair(2, 3, 900))  # exact in fp32 at both levels
    loss, grad = both(student, teacher, temperature)
    exact_loss, exact_grad = formula(student.double(), teacher.double(), temperature)
    assert (loss - exact_loss).abs().max() <= 1e-6 * exact_loss.max() + 1e-6
    assert (grad - exact_grad).abs().max() <= 4e-6 * exact_grad.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [5, 900, 5000])
def test_student_equal_to_teacher_is_exactly_zero(dtype: torch.dtype, cols: int) -> None:
    student, _ = pair(2, 3, cols, dtype=dtype, spread=10.0)
    loss, grad = both(student, student.clone(), 0.7)
    assert not loss.any()
    assert not grad.any()


def test_gradient_near_the_teacher_is_relatively_exact() -> None:
    teacher, _ = pair(1, 4, 900)
    student = teacher + 1e-4 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0))
    _, grad = both(student, teacher, 1.0)
    _, exact = formula(student.double(), teacher.double(), 1.0)
    _, plain = formula(student, teacher, 1.0)
    assert (grad - exact).norm() <= 2 * (plain - exact).norm()
    assert (grad - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("cols", [4, 33, 3 * BLOCK])
def test_minus_infinity_has_probability_zero(cols: int) -> None:
    student, teacher = pair(1, 1, cols)
    for excluded in (slice(0, cols // 2), slice(cols // 2, cols)):  # includes whole blocks, at either end
        s, t = student.clone(), teacher.clone()
        t[..., excluded] = -INF
        s[..., excluded][..., ::2] = -INF
        loss, grad = both(s, t, 1.3)
        log_p_s, log_p_t = ((x.double() / 1.3).log_softmax(-1) for x in (s, t))
        kept = t > -INF
        exact = (log_p_t.exp() * (log_p_t - log_p_s))[kept].sum()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        assert (grad - (log_p_s.exp() - log_p_t.exp()) / 1.3).abs().max() <= 1e-6


@pytest.mark.parametrize("cols", [4, 33, 3 * BLOCK])
@pytest.mark.parametrize("place", ["first", "last"])
def test_infinities_and_nan_propagate(cols: int, place: str) -> None:
    at = 0 if place == "first" else cols - 1
    for whose, value, loss_is in (
        ("student", -INF, lambda x: x == INF),  # the teacher's probability there is not 0
        ("student", INF, math.isnan),
        ("student", NAN, math.isnan),
        ("teacher", INF, math.isnan),
        ("teacher", NAN, math.isnan),
    ):
        both_rows = dict(zip(("student", "teacher"), pair(1, 2, cols), strict=True))
        both_rows[whose][0, 1, at] = value
        loss, grad = both(**both_rows, temperature=2.0)
        assert loss_is(loss[0, 1].item()), (whose, value)
        assert grad[0, 1].isnan().all() or value == -INF
        assert loss[0, 0].isfinite()  # other rows are unaffected
        assert grad[0, 0].isfinite().all()
    for whose in (0, 1):
        rows = pair(1, 1, cols)
        rows[whose].fill_(-INF)
        loss, grad = both(*rows, temperature=2.0)
        assert loss.isnan().all()
        assert grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_low_precision_is_read_exactly(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(1, -1, 1)  # rows of one column: the log-sum-exp is the value itself
    _, lse, _ = forward(x, x.clone(), 1.0)
    finite = x[..., 0].isfinite()
    assert (lse[finite] == x[..., 0].double()[finite]).all()
    assert (lse[~finite].isnan() | (x[~finite][:, 0] == -INF)).all()
    wide = x.expand(1, -1, 64).contiguous()  # whole vectors
    _, lse, _ = forward(wide, wide.clone(), 1.0)
    assert (lse[finite] == x[..., 0].double()[finite] + math.log(64)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [1.0, 3e-6, 7e4, NAN])  # normal, subnormal, overflowing, not a number
def test_gradient_is_rounded_once_to_nearest(dtype: torch.dtype, weight: float) -> None:
    student, teacher = pair(2, 5, 77, dtype=dtype, difference=4.0)
    wide = student.float(), teacher.float()
    results = []
    for s, t in ((student, teacher), wide):
        loss, *lse = forward(s, t, 0.5)
        results.append(backward(torch.full_like(loss, weight), s, t, tuple(lse), 0.5))
    torch.testing.assert_close(results[0], results[1].to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_addresses(dtype: torch.dtype) -> None:
    plain = pair(3, 5, 70, dtype=dtype)
    want = both(*plain, 1.5)
    for offset in (0, 1, 3):
        spaced = []
        for x, gap in zip(plain, (9, 2), strict=True):
            buffer = torch.full((offset + 5 * 3 * (70 + gap),), NAN, dtype=dtype)
            view = buffer[offset:].view(5, 3, 70 + gap)[..., :70].transpose(0, 1)  # rows before batch
            spaced.append(view.copy_(x))
        for got, expected in zip(both(*spaced, 1.5, offset=offset), want, strict=True):
            assert torch.equal(got, expected)
    expanded = [plain[0], plain[1][:1].expand(3, 5, 70)]
    for got, expected in zip(both(*expanded, 1.5), both(plain[0], expanded[1].contiguous(), 1.5), strict=True):
        assert torch.equal(got, expected)


def test_gradient_is_weighted_per_row() -> None:
    student, teacher = pair(3, 4, 50)
    loss, *lse = forward(student, teacher, 1.0)
    ones = backward(torch.ones_like(loss), student, teacher, tuple(lse), 1.0)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).t()  # strided
    got = backward(weights, student, teacher, tuple(lse), 1.0)
    torch.testing.assert_close(got, ones * weights[..., None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [225, 14400])
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, cols: int) -> None:
    student, teacher = pair(
        2, 5_000_000 // cols // 2, cols, dtype=dtype
    )  # large enough for stores that bypass the caches
    first = both(student, teacher, 4.0, threads=1)
    for threads in (1, 2, 5):
        for got, want in zip(both(student, teacher, 4.0, threads=threads), first, strict=True):
            assert torch.equal(got, want)


def test_rows_of_a_million_columns() -> None:
    student, teacher = pair(1, 2, 1_000_003)
    loss, grad = both(student, teacher, 4.0)
    exact_loss, exact_grad = formula(student.double(), teacher.double(), 4.0)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=0)
    assert (grad - exact_grad).abs().max() <= 4e-6 * exact_grad.abs().max()


def test_releases_the_gil() -> None:
    student, teacher = pair(8, 128, 14400, dtype=torch.float64)
    during: list[float] = []

    def compute() -> None:
        during.append(time.perf_counter())
        forward(student, teacher, 1.0, threads=1)
        during.append(time.perf_counter())

    worker = threading.Thread(target=compute)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0)
    begin, end = during
    third = (end - begin) / 3
    assert any(begin + third < tick < end - third for tick in ticks)


ARGUMENTS: dict[str, Any] = {
    "student": 4096,
    "teacher": 4096,
    "loss": 4096,
    "lse_student": 4096,
    "lse_teacher": 4096,
    "batch": 1,
    "rows": 1,
    "cols": 1,
    "student_strides": (1, 1),
    "teacher_strides": (1, 1),
    "dtype": "float32",
    "temperature": 1.0,
    "threads": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": 0}, "student: expected an address, got 0"),
        ({"lse_teacher": 4100}, "lse_teacher: expected an address that is a multiple of 8 bytes, got 4100"),
        ({"cols": 0}, "at least 1 each, got 1, 1, 0"),
        ({"dtype": "int8"}, "dtype: expected float32, float16, bfloat16 or float64, got 'int8'"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
        ({"temperature": NAN}, "temperature"),
        ({"threads": 0}, "threads: expected 1 to"),
    ],
)
def test_rejects_invalid_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.softmax_kl_forward(**(ARGUMENTS | change))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_runs_without_torch_on_the_given_number_of_threads() -> None:
    if not _native.build_info().get("cpu", {}).get("openmp", False):
        pytest.skip("built without OpenMP")
    code = """
import ctypes, os, sys
sys.modules["torch"] = None  # importing it would fail
from fastkd import _native
n = 1 << 20
x, y = (ctypes.c_float * n)(), (ctypes.c_double * n)()
address = ctypes.addressof
_native.load("cpu").softmax_kl_forward(
    address(x), address(x), address(x), address(y), address(y), 1, 1 << 10, 1 << 10, (n, 1 << 10), (n, 1 << 10),
    "float32", 1.0, 3)
print(len(os.listdir("/proc/self/task")), y[5])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    threads, lse = done.stdout.split()
    assert (int(threads), float(lse)) == (3, pytest.approx(math.log(1024)))


def test_rejects_an_unknown_instruction_set() -> None:
    done = python("import fastkd._cpu as m; m.isa()", FASTKD_CPU_ISA="avx1024")
    assert "FASTKD_CPU_ISA: expected an instruction set of this machine (baseline" in done.stderr
    assert "'avx1024'" in done.stderr
