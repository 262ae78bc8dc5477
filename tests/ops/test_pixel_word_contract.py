"""pixel_word on the CPU: the operator contract, the workspace and invalid arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract_tools import threads
from pixel_word_tools import Kernels, as_maps, make, make_masks, run

from fastkd import _native
from fastkd.ops import dispatch
from fastkd.ops.pixel_word import pixel_word, pixel_word_from_logits

if (reason := dispatch.unavailable_reason("cpu", "pixel_word", "cpu")) is not None:
    pytest.skip(f"no compiled kernels: {reason}", allow_module_level=True)

INF, NAN = math.inf, math.nan
cpu, cpu_from_logits = Kernels("cpu").features, Kernels("cpu").logits


@pytest.mark.parametrize("layout", ["rows", "maps"])
def test_results_are_identical_for_any_number_of_threads(layout: str) -> None:
    inputs = make(3, 1300, 20, 40)
    inputs = as_maps(inputs) if layout == "maps" else inputs
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(run(cpu, inputs, **make_masks(3, 1300, 20)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_samples_are_independent() -> None:
    inputs = make(2, 300, 5, 16)
    spoiled = [x.clone() for x in inputs]
    for x in spoiled:
        x[1] = NAN
    for got, want in zip(run(cpu, spoiled), run(cpu, inputs), strict=True):
        assert torch.equal(got[0], want[0])


def test_gradient_has_the_students_layout() -> None:
    for given in (make(2, 60, 5, 16), as_maps(make(2, 60, 5, 16))):
        _, grad, _ = run(cpu, given)
        assert grad.stride() == given[0].stride()


def test_strided_and_expanded_inputs() -> None:
    inputs = make(3, 70, 5, 12)
    want = run(cpu, inputs)
    wide = []
    for x in inputs:
        holder = torch.full((3, x.shape[1] * 2, x.shape[2] * 3), NAN)
        holder[:, ::2, 1::3] = x
        wide.append(holder[:, ::2, 1::3])
    for got, w in zip(run(cpu, wide), want, strict=True):
        torch.testing.assert_close(got, w)
    batch_inner = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in inputs]
    for got, w in zip(run(cpu, batch_inner), want, strict=True):
        torch.testing.assert_close(got, w)
    one = [x[:1].expand(3, -1, -1) for x in inputs]
    for got, w in zip(run(cpu, one), run(cpu, [x.contiguous() for x in one]), strict=True):
        torch.testing.assert_close(got, w)
    columns = [x[:, :, :8] for x in inputs]  # rows with gaps
    for got, w in zip(run(cpu, columns), run(cpu, [x.contiguous() for x in columns]), strict=True):
        torch.testing.assert_close(got, w)


def test_mixed_dtypes() -> None:
    v_s, l_s, v_t, l_t = make(2, 50, 4, 16, dtype=torch.bfloat16)
    want = run(cpu, [v_s.float(), l_s.float(), v_t.float(), l_t.float()])
    got = run(cpu, [v_s, l_s.float(), v_t.float(), l_t])
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1].bfloat16())
    assert torch.equal(got[2], want[2])
    in_double = run(cpu, [v_s, l_s, v_t.double(), l_t])
    assert [x.dtype for x in in_double] == [torch.float64, torch.bfloat16, torch.bfloat16]


def test_computes_only_requested_outputs() -> None:
    inputs, arguments = make(2, 50, 4, 16), (None, None, None, True, 1.0, 15)
    forward, backward = torch.ops.fastkd.pixel_word_forward, torch.ops.fastkd.pixel_word_backward
    loss, *saved = forward(*inputs, *arguments, False, "cpu")
    assert all(x.numel() == 0 for x in saved)
    loss, *saved = forward(*inputs, *arguments, True, "cpu")
    grad = torch.ones(()).expand_as(loss)  # stride 0
    both = backward(grad, *inputs[:2], None, *arguments[:3], *saved, 16, *arguments[3:], True, True, "cpu")
    for requested in ((True, False), (False, True)):
        got = backward(grad, *inputs[:2], None, *arguments[:3], *saved, 16, *arguments[3:], *requested, "cpu")
        for one, full, wanted in zip(got, both, requested, strict=True):
            assert torch.equal(one, full) if wanted else one.numel() == 0
    for leaf in (0, 1):
        given = [x.detach().requires_grad_(i == leaf) for i, x in enumerate(inputs)]
        sum(v.sum() for v in cpu(*given, similarity="cosine").values()).backward()
        torch.testing.assert_close(given[leaf].grad, both[leaf], rtol=0, atol=0)


def test_second_backward_is_equal_and_inputs_are_unchanged() -> None:
    inputs = make(2, 50, 4, 16)
    before = [x.clone() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs[:2]]
    total = sum(v.sum() for v in cpu(*inputs).values())
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) and a._version == 0 for a, b in zip(inputs, before, strict=True))


def test_every_output_element_is_written() -> None:
    """Uninitialised tensors, workspaces included, hold NaN here."""
    cases = [(make(2, 150, 5, 17), {}), (make(2, 150, 5, 17), make_masks(2, 150, 5))]
    want = [run(cpu, x, similarity="cosine", **masks) for x, masks in cases]
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        got = [run(cpu, x, similarity="cosine", **masks) for x, masks in cases]
        for x, masks in cases:
            outputs = torch.ops.fastkd.pixel_word_forward(*x, *(masks or _none()).values(), True, 1.0, 15, True, "cpu")
            assert all(y.isfinite().all() for y in outputs)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    for g, w in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(g, w, strict=True))


def _none() -> dict[str, None]:
    return dict.fromkeys(("student_word_mask", "teacher_word_mask", "pixel_mask"))


@pytest.mark.parametrize("kind", ["features", "maps", "logits"])
def test_opcheck(kind: str) -> None:
    inputs: list[Any] = make(2, 20, 4, 6, 5)
    if kind == "maps":
        inputs = as_maps([x.bfloat16() for x in inputs])
    if kind == "logits":
        inputs = [inputs[0], None, make(2, 20, 4, 6)[2], None]
    masks = tuple(make_masks(2, 20, 4 if kind != "logits" else 6).values())
    options = (kind == "features", 0.5, 15)
    arguments = (*inputs, *masks, *options, True, "cpu")
    torch.library.opcheck(torch.ops.fastkd.pixel_word_forward.default, arguments)
    loss, *saved = torch.ops.fastkd.pixel_word_forward(*arguments)
    teacher, width = (inputs[2], 0) if kind == "logits" else (None, 5)
    outputs = (True, kind != "logits", "cpu")
    arguments = (torch.ones_like(loss), *inputs[:2], teacher, *masks, *saved, width, *options, *outputs)
    torch.library.opcheck(torch.ops.fastkd.pixel_word_backward.default, arguments)


def test_double_backward_names_the_reference() -> None:
    inputs = make(1, 20, 3, 4)
    leaf = inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(cpu(*inputs)["word_word"].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r'pixel_word.*once.*backend="reference"'):
        torch.autograd.grad(grad.sum(), leaf)


def test_compiled_once_for_all_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = lambda *x: sum(v.sum() for v in cpu(*x).values())
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for batch in (2, 3, 4):
        inputs = make(batch, 40, 5, 8)
        leaves = [x.requires_grad_() for x in inputs[:2]]
        got = torch.autograd.grad(compiled(*inputs), leaves)
        want = torch.autograd.grad(step(*inputs), leaves)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def problem(b: int, n: int, t: int, d: int, **change: Any) -> tuple[Any, ...]:
    """Return a problem for the compiled module, with addresses that are never read."""
    array = (4096, "float32", (n * d, d, 1))
    side = {
        "pixels": array,
        "words": 4096,
        "word_mask": 0,
        "word_count": t,
        "width": d,
        "scale": 1.0,
        "bf16_words": False,
    }
    given: dict[str, Any] = {"student": side, "teacher": side, "pixel_mask": 0, "batch": b, "pixels": n}
    given |= {"dtype": "float32", "cosine": False, "terms": 15}
    for name, value in change.items():
        if name in side:
            given["student"] = side | {name: value}
        else:
            given[name] = value
    return tuple(tuple(x.values()) if isinstance(x, dict) else x for x in given.values())


@pytest.mark.parametrize("backward", [False, True])
def test_workspace_is_bounded_for_any_number_of_pixels(backward: bool) -> None:
    mib = 2**20
    for b, t, d in ((4, 20, 128), (8, 20, 512), (32, 77, 256), (1, 20, 4096), (10_000, 77, 1024)):
        for n in (900, 14_400, 10_000_000):
            size, minimum = _native.load("cpu").PixelWord(problem(b, n, t, d), 16, 32 * mib).workspace_bytes(backward)
            assert minimum <= 4 * mib
            assert size <= 32 * mib


@pytest.mark.parametrize("kind", ["rows", "maps", "logits", "cosine"])
def test_small_workspace_gives_the_same_results(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A small workspace holds few samples at a time, with one chunk each."""
    inputs, options = make(5, 300, 6, 40, 24), {**make_masks(5, 300, 6), "backend": "cpu"}
    function: Any = pixel_word
    if kind == "maps":
        inputs = as_maps(inputs)
    if kind == "cosine":
        options["similarity"] = "cosine"
    leaves = 2
    if kind == "logits":
        function, inputs, leaves = pixel_word_from_logits, [make(5, 300, 6, 6)[i] for i in (0, 2)], 1
    whole = run(function, inputs, leaves, **options)
    monkeypatch.setenv("FASTKD_WORKSPACE_MIB", "0.01")
    with pytest.raises(ValueError, match=r"a workspace of 0\.01 MiB does not hold") as error:
        function(*inputs, **options)
    minimum = str(error.value).split("at least ")[1].split(",")[0]
    for mib in (minimum, "0.5", "2"):  # the size in the error suffices, also for the backward
        monkeypatch.setenv("FASTKD_WORKSPACE_MIB", mib)
        for got, want in zip(run(function, inputs, leaves, **options), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": (4096, "float64", (8, 2, 1))}, "student: .*float64"),
        (
            {"pixels": (4098, "float32", (8, 2, 1))},
            "student: expected an address that is a multiple of 4 bytes, got 4098",
        ),
        ({"pixels": (4096, "float32", (8, 4, 2))}, "student: expected a stride of 1 .* got 4 and 2"),
        ({"scale": 0.0}, "finite number above 0"),
        ({"word_count": 0}, "at least 1 word"),
        ({"word_count": 7}, "terms: expected pixel_pixel alone"),
        ({"batch": 0}, "batch, pixels: expected at least 1 each, got 0, 4"),
        ({"terms": 16}, "terms"),
        ({"dtype": "float16"}, "dtype: expected float32 or float64"),
    ],
)
def test_native_call_rejects_invalid_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.load("cpu").PixelWord(problem(1, 4, 3, 2, **change), 1, 2**20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 9, 4, dtype=torch.int64)}, "student_pixels: expected a floating-point tensor"),
        ({1: torch.zeros(2, 3, 5)}, "student_pixels and student_words"),
        ({2: torch.zeros(2, 8, 4)}, r"same samples and pixels"),
        ({3: torch.zeros(2, 5, 4)}, "only 'pixel_pixel' is defined"),
        ({2: torch.zeros(2, 9, 4, requires_grad=True)}, r"teacher_pixels.*detach\(\)"),
        ({0: torch.zeros(2, 0, 4)}, "student_pixels: is empty"),
        ({"temperature": 0.0}, "temperature"),
        ({"similarity": "dot"}, "similarity"),
        ({"terms": ("pixels",)}, "terms"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_rejects_invalid_input(change: dict[Any, Any], message: str) -> None:
    inputs = [torch.zeros(2, 9, 4), torch.zeros(2, 3, 4), torch.zeros(2, 9, 4), torch.zeros(2, 3, 4)]
    for index in list(change):
        if isinstance(index, int):
            inputs[index] = change.pop(index)
    with pytest.raises((TypeError, ValueError), match=message):
        pixel_word(*inputs, **change)
