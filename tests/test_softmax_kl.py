"""softmax_kl on every backend: the operator contract, point by point, against an fp64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd.ops.softmax_kl import softmax_kl
from fastkd.reference.softmax_kl import softmax_kl as reference

# One shape per regime of the kernels: a single column, a partial vector, several rows in one block, one block exactly,
# a loop with a tail. Small, because the interpreter runs them too.
SHAPES = [(2, 3, 1), (1, 2, 7), (2, 11, 49), (1, 2, 512), (1, 2, 2 * 1024 + 37)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = math.inf, math.nan


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype) for _ in range(2)]


def run(
    student: Tensor, teacher: Tensor, temperature: float, backend: str, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-row losses, and the gradient of their weighted sum with respect to the student."""
    student = student.detach().requires_grad_()
    loss = softmax_kl(student, teacher, temperature=temperature, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum() if weight is None else (loss * weight).sum(), student)
    return loss.detach(), grad


def oracle(student: Tensor, teacher: Tensor, temperature: float, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in fp64, from the definition."""
    s, t = student.detach().cpu().double(), teacher.detach().cpu().double()
    loss = reference(s, t, temperature)
    g = torch.ones_like(loss) if weight is None else weight.cpu().double()
    grad = g[..., None] * ((s / temperature).softmax(-1) - (t / temperature).softmax(-1)) / temperature
    return loss, grad


def eager(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What a user writes without fastkd, in the inputs' own dtype."""
    student = student.detach().requires_grad_()
    log_p = torch.log_softmax(student / temperature, -1)
    p_t = torch.softmax(teacher / temperature, -1)
    loss = torch.nn.functional.kl_div(log_p, p_t, reduction="none").sum(-1)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad


def error(got: Tensor, exact: Tensor) -> float:
    return (got.cpu().double() - exact).abs().max().item()


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest entry: what storing the exact answer in ``dtype`` may cost."""
    return max(exact.abs().max().item(), torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps / 2


# --- right answers ----------------------------------------------------------------------------------------------------


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
    # An entry or two can make eager exact by luck: storing the answer is always allowed to cost its rounding.
    magnitude = torch.tensor(10.0 / temperature + math.log(shape[-1]))  # of the terms that cancel in the loss
    assert error(loss, exact_loss) <= 2 * error(plain_loss, exact_loss) + 2 * rounding(magnitude, torch.float32)
    assert error(grad, exact_grad) <= 2 * error(plain_grad, exact_grad) + rounding(exact_grad, dtype)
    # Ceilings that don't depend on how good or bad eager is.
    assert error(loss, exact_loss) <= 16 * rounding(magnitude, torch.float32)
    statistics = 8 * rounding(magnitude, torch.float32) * exact_grad.abs().max().item()
    assert error(grad, exact_grad) <= rounding(exact_grad, dtype) + statistics + rounding(exact_grad, torch.float32)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_large_logits(place: Any, temperature: float) -> None:
    student, teacher = make((1, 4, 70), torch.float32, place.device, scale=3.0)
    student += torch.tensor([1e4, -1e4, 9e3, 0.0], device=place.device)[:, None]
    teacher += torch.tensor([1e4, -1e4, -1e4, 1e4], device=place.device)[:, None]
    exact_loss, exact_grad = oracle(student, teacher, temperature)
    plain_loss, plain_grad = eager(student, teacher, temperature)
    loss, grad = run(student, teacher, temperature, place.backend)
    ulp = 1e4 / temperature * torch.finfo(torch.float32).eps  # of the logits / τ themselves
    assert error(loss, exact_loss) <= 2 * error(plain_loss, exact_loss) + ulp
    assert error(grad, exact_grad) <= 2 * error(plain_grad, exact_grad) + ulp * exact_grad.abs().max().item()


def test_student_equal_to_teacher_is_exactly_zero(place: Any) -> None:
    student, _ = make((2, 3, 130), torch.float32, place.device, scale=5.0)
    loss, grad = run(student, student.clone(), 0.5, place.backend)
    assert loss.abs().max() <= 1e-6
    assert grad.abs().max() <= (1e-6 if place.backend == "reference" else 0)


def test_one_hot_teachers(place: Any) -> None:
    student, teacher = make((1, 3, 40), torch.float32, place.device)
    teacher[0, 0] = -1e4
    teacher[0, 0, 7] = 1e4
    teacher[0, 1] = -INF
    teacher[0, 1, 7] = 0.0
    loss, grad = run(student, teacher, 2.0, place.backend)
    exact_loss, exact_grad = oracle(student, teacher, 2.0)
    torch.testing.assert_close(loss.cpu().double(), exact_loss, rtol=1e-5, atol=2e-3)  # of terms near 1e4
    torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cols", [5, 2500])
def test_infinities_and_nan(place: Any, cols: int) -> None:
    """Row by row: what goes in, and that the loss is the same finite number, inf or NaN as the oracle's."""
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
def test_extremes_of_low_precision(place: Any, dtype: torch.dtype) -> None:
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
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(
    place: Any, batch: int, rows: int, cols: int, temperature: float, scale: float, dtype: torch.dtype, seed: int
) -> None:
    student, teacher = make((batch, rows, cols), dtype, place.device, scale=scale, seed=seed)
    weight = torch.linspace(-1, 1, batch * rows, device=place.device).reshape(batch, rows)
    loss, grad = run(student, teacher, temperature, place.backend, weight)
    exact_loss, exact_grad = oracle(student, teacher, temperature, weight)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    magnitude = torch.tensor(8 * scale / temperature + math.log(cols) + 1)
    assert error(loss, exact_loss) <= 16 * rounding(magnitude, accumulate)
    statistics = 16 * rounding(magnitude, accumulate) / temperature
    assert error(grad, exact_grad) <= 1.01 * rounding(exact_grad, dtype) + statistics + 1e-7 * (dtype == torch.float16)


def test_fp64_is_computed_in_fp64(place: Any) -> None:
    student, teacher = make((2, 2, 1100), torch.float64, place.device)
    loss, grad = run(student, teacher, 0.3, place.backend)
    exact_loss, exact_grad = oracle(student, teacher, 0.3)
    assert loss.dtype == grad.dtype == torch.float64
    assert error(loss, exact_loss) < 1e-13
    assert error(grad, exact_grad) < 1e-14


def test_mixed_dtypes_are_promoted(place: Any) -> None:
    student, teacher = make((2, 3, 50), torch.float32, place.device)
    half = student.half()
    loss, grad = run(half, teacher, 1.0, place.backend)
    exact_loss, exact_grad = oracle(half, teacher, 1.0)
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.float16
    assert error(loss, exact_loss) < 1e-6
    assert error(grad, exact_grad) < 1e-4


# --- gradients, as autograd may ask for them --------------------------------------------------------------------------


def test_gradcheck(place: Any) -> None:
    student, teacher = make((2, 2, 6), torch.float64, place.device)
    for temperature in (0.3, 1.0, 4.0):
        assert torch.autograd.gradcheck(
            lambda s, tau=temperature: softmax_kl(s, teacher, temperature=tau, backend=place.backend),
            (student.detach().requires_grad_(),),
        )


def test_gradient_is_per_row_and_may_be_expanded(place: Any) -> None:
    student, teacher = make((2, 3, 20), torch.float32, place.device)
    weight = torch.randn(3, generator=torch.Generator().manual_seed(1)).to(place.device).expand(2, 3)  # stride 0
    transposed = torch.randn(3, 2, generator=torch.Generator().manual_seed(2)).to(place.device).T
    for g in (weight, transposed, torch.ones((), device=place.device).expand(2, 3), torch.zeros_like(transposed)):
        leaf = student.detach().requires_grad_()
        loss = softmax_kl(leaf, teacher, temperature=1.5, backend=place.backend)
        (grad,) = torch.autograd.grad(loss, leaf, g)
        assert error(grad, oracle(student, teacher, 1.5, g)[1]) < 1e-6


def test_second_backward_gives_the_same_gradient(place: Any) -> None:
    student, teacher = make((2, 3, 200), torch.float32, place.device)
    student.requires_grad_()
    loss = softmax_kl(student, teacher, temperature=1.0, backend=place.backend).sum()
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)


def test_inputs_are_never_written(place: Any) -> None:
    student, teacher = make((2, 3, 200), torch.float32, place.device)
    student.requires_grad_()
    before = [(x, x._version, x.detach().clone()) for x in (student, teacher)]
    softmax_kl(student, teacher, temperature=1.0, backend=place.backend).sum().backward()
    for x, version, copy in before:
        assert x._version == version
        assert torch.equal(x, copy)


def test_saves_inputs_and_row_statistics_only(kernel_place: Any) -> None:
    student, teacher = make((2, 3, 200), torch.float32, kernel_place.device)
    student.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        softmax_kl(student, teacher, temperature=1.0, backend=kernel_place.backend)
    own = [x for x in saved if x.data_ptr() not in (student.data_ptr(), teacher.data_ptr())]
    assert sum(x.nbytes for x in own) <= 2 * 3 * 16


def test_no_grad_saves_nothing(place: Any) -> None:
    student, teacher = make((2, 3, 200), torch.float32, place.device)
    student.requires_grad_()
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        loss = softmax_kl(student, teacher, temperature=1.0, backend=place.backend)
    assert loss.grad_fn is None
    assert not saved
    with torch.inference_mode():
        assert torch.equal(softmax_kl(student, teacher, temperature=1.0, backend=place.backend), loss)


def test_double_backward(place: Any) -> None:
    student, teacher = make((1, 2, 9), torch.float64, place.device)
    student.requires_grad_()
    loss = softmax_kl(student, teacher, temperature=1.0, backend=place.backend).sum()
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    if place.backend == "reference":
        grad.square().sum().backward()
        assert student.grad is not None
    else:
        with pytest.raises(RuntimeError, match='backend="reference"'):
            grad.square().sum().backward()


# --- memory layouts ---------------------------------------------------------------------------------------------------


def layouts(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    student, teacher = make((4, 6, 30), torch.float32, device)
    base_s, base_t = make((4, 6, 64), torch.float32, device)
    map_s, map_t = make((4, 6, 5, 6), torch.float32, device)
    return {
        "sliced columns": (base_s[:, :, 3:33], base_t[:, :, 1:31]),
        "every other column": (base_s[:, :, ::2], base_t[:, :, 1::2]),
        "every other row": (student[::2, ::3], teacher[::2, ::3]),
        "transposed rows": (student.transpose(0, 1), teacher.transpose(0, 1)),
        "transposed columns": (student.transpose(1, 2), teacher.transpose(1, 2)),
        "channels last": tuple(x.contiguous(memory_format=torch.channels_last).flatten(2) for x in (map_s, map_t)),
        "expanded batch": (student, teacher[:1].expand(4, 6, 30)),
        "expanded columns": (student, teacher[:, :, :1].expand(4, 6, 30)),
        "different layouts": (student.transpose(0, 1).contiguous().transpose(0, 1), teacher),
    }


@pytest.mark.parametrize("layout", list(layouts("cpu")))
def test_layouts(place: Any, layout: str) -> None:
    student, teacher = layouts(place.device)[layout]
    loss, grad = run(student, teacher, 1.0, place.backend)
    exact_loss, exact_grad = oracle(student, teacher, 1.0)
    assert error(loss, exact_loss) < 2e-6
    assert error(grad, exact_grad) < 1e-6


def test_offsets_beyond_32_bits(kernel_place: Any) -> None:
    """Two rows more than 2³¹ elements apart; on the CPU the pages between them are never touched."""
    apart = 2**31 + 8
    if kernel_place.device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * 2 * apart:
        pytest.skip("needs 13 GB of GPU memory")
    small, teacher = make((2, 1, 40), torch.float16, kernel_place.device)
    far = torch.empty(apart + 40, dtype=torch.float16, device=kernel_place.device)
    student = far.as_strided((2, 1, 40), (apart, 40, 1))
    student.copy_(small)
    loss, grad = run(student, teacher, 1.0, kernel_place.backend)
    same_loss, same_grad = run(small, teacher, 1.0, kernel_place.backend)
    assert torch.equal(loss, same_loss)
    assert torch.equal(grad, same_grad)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=str)
def test_no_rows(place: Any, shape: tuple[int, ...]) -> None:
    student, teacher = make(shape, torch.float32, place.device)
    loss, grad = run(student, teacher, 1.0, place.backend)
    assert loss.shape == shape[:2]
    assert grad.shape == shape


# --- promises of the operator -----------------------------------------------------------------------------------------


def test_same_bits_every_time(place: Any) -> None:
    student, teacher = make((3, 5, 700), torch.float32, place.device)
    first = run(student, teacher, 0.7, place.backend)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(student, teacher, 0.7, place.backend), strict=True))


def test_same_bits_whatever_the_threads(kernel_place: Any) -> None:
    if kernel_place.backend != "cpu":
        pytest.skip("threads are the CPU's")
    student, teacher = make((3, 50, 700), torch.float32, "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(student, teacher, 0.7, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_every_output_element_is_written(place: Any) -> None:
    """torch.empty hands out NaN here."""
    student, teacher = make((2, 7, 1030), torch.float32, place.device)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=place.device).isnan().all()
        loss, grad = run(student, teacher, 1.0, place.backend)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    assert error(loss, oracle(student, teacher, 1.0)[0]) < 2e-6
    assert grad.isfinite().all()


@pytest.mark.parametrize("mixed", [False, True])
def test_opcheck(kernel_place: Any, mixed: bool) -> None:
    student, teacher = make((2, 3, 20), torch.float32, kernel_place.device)
    if mixed:
        student = student.half().transpose(1, 2)
        teacher = teacher.transpose(1, 2)
    args = (1.5, kernel_place.backend)
    torch.library.opcheck(torch.ops.fastkd.softmax_kl_forward.default, (student, teacher, *args))
    loss, statistics = torch.ops.fastkd.softmax_kl_forward(student, teacher, *args)
    grad = torch.ones((), device=loss.device).expand_as(loss)
    torch.library.opcheck(torch.ops.fastkd.softmax_kl_backward.default, (grad, student, teacher, statistics, *args))


def test_compiled_equals_eager(place: Any) -> None:
    def step(student: Tensor, teacher: Tensor) -> Tensor:
        return softmax_kl(student * 2, teacher, temperature=1.5, backend=place.backend).square().mean()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    student, teacher = make((2, 3, 40), torch.float32, place.device)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(step(student, teacher), student)
    loss = compiled(student, teacher)
    torch.testing.assert_close(loss, step(student, teacher), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_compiled_once_for_all_batch_sizes(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    from fastkd.ops import _backends

    if _backends.why_not(backend if backend != "auto" else "reference") is not None:
        pytest.skip(f"the {backend} backend is not in use here")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t: softmax_kl(s, t, temperature=1.0, backend=backend).sum(),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    for batch in (2, 3, 5, 8):
        student, teacher = make((batch, 4, 300), torch.float32, "cpu")
        student.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(student, teacher), student)
        assert error(grad, oracle(student, teacher, 1.0)[1]) < 1e-6
    assert counter.frame_count == 1


def test_under_autocast(place: Any) -> None:
    student, teacher = make((2, 3, 40), torch.bfloat16, place.device)
    plain = run(student, teacher, 1.0, place.backend)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        under = run(student, teacher, 1.0, place.backend)
    assert under[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_in_a_cuda_graph(backend: str) -> None:
    from fastkd.ops import _backends

    if (reason := _backends.why_not(backend)) is not None:
        pytest.skip(f"the {backend} backend is not in use here: {reason}")
    student, teacher = make((2, 3, 400), torch.float32, "cuda")
    expected = run(student, teacher, 1.0, backend)  # also compiles what is compiled on first use
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        leaf = student.detach().requires_grad_()
        graph = torch.cuda.CUDAGraph()
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            loss = softmax_kl(leaf, teacher, temperature=1.0, backend=backend)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.gpu
def test_on_the_current_stream_of_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    student, teacher = make((2, 3, 400), torch.float32, "cuda:1")
    for backend in ("triton", "cuda"):
        with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream(1)):
            loss, _ = run(student, teacher, 1.0, backend)
        torch.cuda.synchronize(1)
        assert error(loss, oracle(student, teacher, 1.0)[0]) < 2e-6


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"student": torch.zeros(2, 3)}, ValueError, r"\(B, R, N\).*\(2, 3\)"),
        ({"teacher": torch.zeros(2, 3, 5)}, ValueError, r"same shape.*\(2, 3, 4\).*\(2, 3, 5\)"),
        ({"student": torch.zeros(2, 3, 0), "teacher": torch.zeros(2, 3, 0)}, ValueError, "empty row"),
        ({"student": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "floating.*int64"),
        ({"teacher": torch.zeros(2, 3, 4, device="meta")}, ValueError, "device cpu, got meta"),
        ({"temperature": 0.0}, ValueError, "temperature.*> 0"),
        ({"temperature": -1.0}, ValueError, "temperature.*> 0"),
        ({"temperature": NAN}, ValueError, "temperature.*> 0"),
        ({"teacher": torch.zeros(2, 3, 4, requires_grad=True)}, ValueError, r"teacher.*detach\(\)"),
        ({"backend": "gpu"}, ValueError, "backend.*auto, reference, cpu, triton, cuda.*'gpu'"),
    ],
)
def test_bad_input(change: dict[str, Any], exception: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "student": torch.zeros(2, 3, 4),
        "teacher": torch.zeros(2, 3, 4),
        "temperature": 1.0,
        "backend": "auto",
    } | change
    student, teacher = arguments.pop("student"), arguments.pop("teacher")
    with pytest.raises(exception, match=message):
        softmax_kl(student, teacher, **arguments)
