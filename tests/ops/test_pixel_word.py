"""pixel_word on the CPU: accuracy, layouts, masks, workspace, instruction sets, and the operator contract."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pixel_word_tools as tools
import pytest
import torch
from pixel_word_tools import Masks, as_maps, make, make_masks, run
from torch import Tensor
from torch.autograd import gradcheck

from fastkd import _native
from fastkd.ops import dispatch
from fastkd.ops.pixel_word import pixel_word, pixel_word_from_logits
from fastkd.ops.pixel_word.reference import TERMS
from fastkd.ops.pixel_word.reference import pixel_word as reference
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as reference_from_logits

if (reason := dispatch.unavailable_reason("cpu", "pixel_word", "cpu")) is not None:
    pytest.skip(f"no compiled kernels: {reason}", allow_module_level=True)

INF, NAN = math.inf, math.nan


def cpu(*inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    return pixel_word(*inputs, backend="cpu", **options)


def cpu_from_logits(*inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    return pixel_word_from_logits(*inputs, backend="cpu", **options)


def check(inputs: Sequence[Tensor], ours: Any = cpu, plain: Any = reference, leaves: int = 2, **options: Any) -> None:
    tools.check(inputs, ours, plain, leaves, **options)


# --- accuracy ---------------------------------------------------------------------------------------------------------

SHAPES = [  # One pixel; partial and whole vectors, panels and chunks, and one more. Few and many words; odd widths.
    (2, 1, 1, 1, 1),
    (2, 37, 5, 3, 4),
    (1, 128, 20, 16, 32),
    (1, 129, 33, 100, 17),
    (2, 257, 64, 48, 128),
    (1, 900, 20, 512, 512),
    (3, 1025, 70, 8, 300),
    (1, 131, 3, 1025, 2),
]


@pytest.mark.parametrize("layout", ["rows", "maps"])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(shape: tuple[int, ...], similarity: str, layout: str) -> None:
    inputs = make(*shape)
    if layout == "maps":
        inputs = as_maps(inputs)
    options = {"similarity": similarity, "temperature": 0.7}
    check(inputs, **options)
    check(inputs, **options, **make_masks(*shape[:3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_dtypes(dtype: torch.dtype, similarity: str) -> None:
    for inputs in (make(2, 150, 7, 33, 48, dtype=dtype), as_maps(make(2, 150, 7, 33, 48, dtype=dtype))):
        check(inputs, similarity=similarity)
        check(inputs, similarity=similarity, **make_masks(2, 150, 7))


@pytest.mark.parametrize("layout", ["rows", "maps"])
@pytest.mark.parametrize("shape", [*SHAPES[:5], (2, 150, 21, 64, 96)], ids=str)
def test_bfloat16_without_widening(shape: tuple[int, ...], layout: str) -> None:
    """Include words or a network of another dtype, which are widened."""
    half, wide = make(*shape, dtype=torch.bfloat16), make(*shape)
    for inputs in (half, [half[0], wide[1], *half[2:]], [*wide[:2], *half[2:]], [*half[:3], wide[3]]):
        given = as_maps(inputs) if layout == "maps" else inputs
        check(given)
        check(given, **make_masks(*shape[:3]))


@pytest.mark.parametrize("layout", ["rows", "maps"])
@pytest.mark.parametrize("shape", [(2, 900, 20, 512), (2, 333, 7, 50)], ids=str)
def test_bfloat16_gradients_have_only_rounding_error(shape: tuple[int, ...], layout: str) -> None:
    inputs = make(*shape, dtype=torch.bfloat16)
    got = run(cpu, as_maps(inputs) if layout == "maps" else inputs)[1:]
    exact = run(reference, [x.double() for x in inputs])[1:]
    for g, e in zip(got, exact, strict=True):
        assert (g.double() - e).norm() <= 1.01 * (e.bfloat16().double() - e).norm()


@pytest.mark.parametrize("temperature", [0.05, 20.0])
def test_temperatures(temperature: float) -> None:
    for similarity in ("scaled_dot", "cosine"):
        check(make(2, 200, 9, 24), similarity=similarity, temperature=temperature)


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(term: str) -> None:
    inputs, masks = make(2, 300, 6, 20), make_masks(2, 300, 6)
    check(inputs, terms=(term,), **masks)
    together = cpu(*inputs, **masks)
    torch.testing.assert_close(cpu(*inputs, terms=(term,), **masks)[term], together[term], rtol=0, atol=0)
    logits = [torch.randn(2, 300, 6), torch.randn(2, 300, 6)]
    check(logits, cpu_from_logits, reference_from_logits, 1, terms=(term,), **masks)


@pytest.mark.parametrize("n", [5, 127, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_logits(n: int, dtype: torch.dtype) -> None:
    for t in (1, 20, 33):
        generator = torch.Generator().manual_seed(t)
        logits = [(2 * torch.randn(2, n, t, generator=generator)).to(dtype) for _ in range(2)]
        for given in (logits, [x.mT.contiguous().mT for x in logits]):
            check(given, cpu_from_logits, reference_from_logits, 1, temperature=1.3)
            check(given, cpu_from_logits, reference_from_logits, 1, **make_masks(2, n, t))


def test_networks_with_different_tokens() -> None:
    v_s, l_s, v_t, _ = make(2, 200, 5, 16)
    l_t = make(2, 1, 23, 16, seed=1)[3]
    masks = make_masks(2, 200, 5) | {"teacher_word_mask": make_masks(2, 200, 23)["student_word_mask"]}
    for similarity in ("scaled_dot", "cosine"):
        for options in ({}, masks):
            check([v_s, l_s, v_t, l_t], similarity=similarity, terms=("pixel_pixel",), **options)
            check([v_t, l_t, v_s, l_s], similarity=similarity, terms=("pixel_pixel",), **_swapped(options))
    m_s, m_t = v_s @ l_s.mT, v_t @ l_t.mT
    check([m_s, m_t], cpu_from_logits, reference_from_logits, 1, terms=("pixel_pixel",), **masks)


def _swapped(masks: Masks) -> Masks:
    swap = {"student_word_mask": "teacher_word_mask", "teacher_word_mask": "student_word_mask"}
    return {swap.get(name, name): mask for name, mask in masks.items()}


@pytest.mark.parametrize("fill", [1e30, NAN, INF])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_values_of_masked_entries_do_not_matter(similarity: str, fill: float) -> None:
    masks = make_masks(2, 300, 12)
    words, pixels = masks["student_word_mask"], masks["pixel_mask"]
    for lay_out in (list, as_maps):
        inputs = lay_out(make(2, 300, 12, 32))
        filled = lay_out([x.masked_fill(~(words if i % 2 else pixels)[..., None], fill) for i, x in enumerate(inputs)])
        want = run(cpu, inputs, similarity=similarity, **masks)
        got = run(cpu, filled, similarity=similarity, **masks)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
        assert (got[1][~pixels] == 0).all()
        assert (got[2][~words] == 0).all()
    logits = [torch.randn(2, 300, 12) for _ in range(2)]
    valid = pixels[..., None] & words[:, None]
    want = run(cpu_from_logits, logits, 1, **masks)
    got = run(cpu_from_logits, [x.masked_fill(~valid, fill) for x in logits], 1, **masks)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    assert (got[1][~valid] == 0).all()


def test_masked_pixels_get_a_zero_gradient_even_if_words_are_nan() -> None:
    inputs, masks = make(1, 40, 4, 16), make_masks(1, 40, 4)
    inputs[1][0, 2] = NAN  # a valid word
    for given in (inputs, as_maps(inputs)):
        _, grad, _ = run(cpu, given, **masks)
        assert (grad[~masks["pixel_mask"]] == 0).all()
        assert grad[masks["pixel_mask"]].isnan().all()


def test_pixels_and_words_of_norm_zero_get_a_zero_gradient() -> None:
    inputs = make(2, 40, 6, 16, dtype=torch.float64)
    inputs[0][0, 3] = 0
    inputs[0][1, 5] *= 1e-14
    inputs[1][0, 2] *= 1e-14
    inputs[3][1, 1] = 0
    for given in (inputs, as_maps(inputs)):
        got, want = run(cpu, given, similarity="cosine"), run(reference, given, similarity="cosine")
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        assert not got[1][[0, 1], [3, 5]].any()
        assert not got[2][0, 2].any()


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_equal_networks_give_exactly_zero(similarity: str) -> None:
    v, w, *_ = make(2, 500, 20, 64)
    loss, *grads = run(cpu, [v, w, v.clone(), w.clone()], similarity=similarity, temperature=0.05)
    assert loss.abs().max() == 0
    assert all(grad.abs().max() == 0 for grad in grads)


@pytest.mark.parametrize("difference", [1e-2, 1e-3])
def test_gradients_are_accurate_near_the_teacher(difference: float) -> None:
    inputs = make(2, 400, 8, 32)
    for i in range(2):
        inputs[i] = inputs[i + 2] + difference * inputs[i]
    for term in TERMS:
        got = run(cpu, inputs, terms=(term,))
        exact = run(reference, [x.double() for x in inputs], terms=(term,))
        for g, e in zip(got[1:], exact[1:], strict=True):
            assert (g.double() - e).norm() / e.norm() < 1e-6 / difference


def test_infinite_logits() -> None:
    m_s, m_t = torch.randn(2, 60, 5), torch.randn(2, 60, 5)
    m_s[0, 0, 1] = m_t[0, 0, 1] = -INF  # excluded by both networks
    m_t[0, 1, 2] = -INF  # by the teacher alone
    m_t[0, 2, :3] = -INF
    m_s[1] += 1e4
    m_t[1] -= 1e4
    got = run(cpu_from_logits, [m_s, m_t], 1)
    want = run(reference_from_logits, [m_s.double(), m_t.double()], 1)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-7)
    m_s[0, 3, 0] = -INF  # excluded by the student, allowed by the teacher
    assert cpu_from_logits(m_s, m_t)["pixel_to_word"][0] == INF


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_propagate(value: float) -> None:
    for which in range(4):
        inputs = make(2, 40, 6, 8)
        inputs[which][0, 1, 0] = value
        for similarity in ("scaled_dot", "cosine"):
            for term, got in cpu(*inputs, similarity=similarity).items():
                assert not got[0].isfinite(), term
                assert got[1].isfinite(), term


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("term", TERMS)
def test_gradcheck(term: str, similarity: str) -> None:
    v_s, l_s, v_t, l_t = make(2, 6, 4, 3, 5, dtype=torch.float64)
    masks = make_masks(2, 6, 4)
    leaves = (v_s.requires_grad_(), l_s.requires_grad_())
    f = lambda v, w: cpu(v, w, v_t, l_t, similarity=similarity, temperature=0.7, terms=(term,), **masks)[term]
    assert gradcheck(f, leaves)
    m_s, m_t = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    assert gradcheck(lambda m: cpu_from_logits(m, m_t, terms=(term,), **masks)[term], (m_s.requires_grad_(),))


# --- operator contract ------------------------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
