"""What is particular to the pixel_word kernels in CUDA C++: numbers of words, steps and their edges, layouts, fp64.

On a GPU, or on CPU tensors where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulation import emulated
from pixel_word_tools import Masks, as_maps, check, make, make_masks, run
from torch import Tensor

import fastkd
from fastkd.ops import _backends
from fastkd.ops.pixel_word import pixel_word, pixel_word_from_logits
from fastkd.reference.pixel_word import TERMS
from fastkd.reference.pixel_word import pixel_word as reference
from fastkd.reference.pixel_word import pixel_word_from_logits as reference_from_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """The kernels, on the host where there is no GPU."""
    if DEVICE == "cuda":
        if reason := _backends.why_not("cuda", "pixel_word", DEVICE):
            pytest.skip(f"the cuda backend is not in use: {reason}")
        yield
        return
    try:
        with emulated():
            yield
    except RuntimeError as error:
        pytest.skip(f"the kernels are not built for the host: {error}")


def here(inputs: list[Tensor]) -> list[Tensor]:
    return [x.to(DEVICE) for x in inputs]


def masks_of(b: int, n: int, t: int) -> Masks:
    return {name: mask.to(DEVICE) for name, mask in make_masks(b, n, t).items()}


def cuda(*inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    return pixel_word(*inputs, backend="cuda", **options)


def from_logits(*inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    return pixel_word_from_logits(*inputs, backend="cuda", **options)


# 24, 32, 64 and 128 words are what the kernels are compiled for, with fewer too; steps are of 128 pixels (64, 32 where
# two, four warps share the words), tiles of 16; features come 32 (16-bit) or 16 at a time, and of the words as many as
# fit in shared memory.
SHAPES = [
    (2, 1, 1, 1, 2),
    (2, 33, 16, 3, 70),
    (2, 128, 24, 64, 40),
    (2, 129, 30, 72, 40),
    (1, 65, 33, 17, 5),
    (1, 64, 64, 32, 96),
    (1, 40, 128, 8, 8),
]


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(shape: tuple[int, ...], similarity: str) -> None:
    inputs = here(make(*shape))
    options = {"similarity": similarity, "temperature": 0.7}
    check(inputs, cuda, reference, **options, **masks_of(*shape[:3]))
    check(as_maps(inputs), cuda, reference, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], SHAPES[6]], ids=str)
def test_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = here(make(*shape, dtype=dtype))
    check(inputs, cuda, reference)
    check(as_maps(inputs), cuda, reference, similarity="cosine", **masks_of(*shape[:3]))


@pytest.mark.parametrize("shape", [(530, 130, 5, 4), (530, 65, 34, 2), (530, 33, 65, 2)], ids=str)
def test_several_steps_to_a_program(shape: tuple[int, ...]) -> None:
    """A batch that leaves one program to a sample: two steps of 128, 64, 32 pixels, the second a short one."""
    inputs, masks = here(make(*shape)), masks_of(*shape[:3])
    together = run(cuda, inputs, **masks)
    check([x[-2:] for x in inputs], cuda, reference, **{name: mask[-2:] for name, mask in masks.items()})
    weights = torch.linspace(1, 2, shape[0], device=DEVICE)[-2:] / torch.linspace(1, 2, 2, device=DEVICE)
    apart = run(cuda, [x[-2:] for x in inputs], **{name: mask[-2:] for name, mask in masks.items()})
    apart[1:] = [x * weights[:, None, None] for x in apart[1:]]  # a sample has a program to each step
    for got, want in zip(together, apart, strict=True):
        torch.testing.assert_close(got[-2:], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [20, 100])
def test_words_that_do_not_fit_in_shared_memory(words: int, dtype: torch.dtype) -> None:
    inputs = here(make(1, 150, words, 1100, 520, dtype=dtype))
    check(inputs, cuda, reference, similarity="cosine", temperature=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 47, 7, 21), (1, 50, 35, 30)], ids=str)
def test_any_alignment(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Where nothing can be read 16 bytes at a time, in rows and maps, from an odd address on."""
    inputs = here(make(*shape, dtype=dtype))
    odd = [torch.cat([x.new_full((1,), NAN), x.flatten()])[1:].view(x.shape) for x in inputs]
    for got, want in zip(run(cuda, odd), run(cuda, [x.clone() for x in inputs]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    check(as_maps(odd), cuda, reference)
    padded = [torch.nn.functional.pad(x, (0, 5))[..., : x.shape[2]] for x in inputs]
    check(padded, cuda, reference, similarity="cosine")


@pytest.mark.parametrize("words", [3, 40])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(term: str, words: int) -> None:
    inputs, masks = here(make(2, 40, words, 6)), masks_of(2, 40, words)
    check(inputs, cuda, reference, terms=(term,), **masks)
    together = cuda(*inputs, **masks)[term]
    torch.testing.assert_close(cuda(*inputs, terms=(term,), **masks)[term], together, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [5, 70])
def test_logits(words: int, dtype: torch.dtype) -> None:
    logits = here([2 * x for x in make(2, 45, words, words, dtype=dtype)[::2]])
    check(logits, from_logits, reference_from_logits, 1, temperature=1.3)
    turned = [x.mT.contiguous().mT for x in logits]
    check(turned, from_logits, reference_from_logits, 1, **masks_of(2, 45, words))


@pytest.mark.parametrize("words", [(5, 23), (40, 3)])
def test_other_tokens_in_the_teacher(words: tuple[int, int]) -> None:
    v_s, l_s, v_t, _ = make(2, 40, words[0], 16)
    inputs = here([v_s, l_s, v_t, make(2, 1, words[1], 16, seed=1)[3]])
    check(inputs, cuda, reference, terms=("pixel_pixel",))
    masks = masks_of(2, 40, words[0]) | {"teacher_word_mask": masks_of(2, 40, words[1])["student_word_mask"]}
    check(inputs, cuda, reference, terms=("pixel_pixel",), similarity="cosine", **masks)
    logits = [v @ w.mT for v, w in (inputs[:2], inputs[2:])]
    check(logits, from_logits, reference_from_logits, 1, terms=("pixel_pixel",), **masks)


@pytest.mark.parametrize("fill", [1e30, NAN, INF])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_what_masked_entries_hold_touches_nothing(similarity: str, fill: float) -> None:
    masks = masks_of(2, 40, 12)
    words, pixels = masks["student_word_mask"], masks["pixel_mask"]
    inputs = here(make(2, 40, 12, 20))
    filled = [x.masked_fill(~(words if i % 2 else pixels)[..., None], fill) for i, x in enumerate(inputs)]
    want = run(cuda, inputs, similarity=similarity, **masks)
    got = run(cuda, as_maps(filled), similarity=similarity, **masks)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)
    assert (got[1][~pixels] == 0).all()
    assert (got[2][~words] == 0).all()
    kept = pixels[..., None] & words[:, None]
    logits = here([x[..., :12] for x in make(2, 40, 12, 20, seed=1)[::2]])
    want = run(from_logits, logits, 1, **masks)
    got = run(from_logits, [x.masked_fill(~kept, fill) for x in logits], 1, **masks)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert (got[1][~kept] == 0).all()


def test_masked_entries_have_no_gradient_though_others_are_nan() -> None:
    inputs, masks = here(make(1, 40, 4, 16)), masks_of(1, 40, 4)
    words, pixels = masks["student_word_mask"], masks["pixel_mask"]
    inputs[1][0, 2] = NAN  # a valid word
    _, grad_pixels, grad_words = run(cuda, inputs, **masks)
    assert (grad_pixels[~pixels] == 0).all()
    assert grad_pixels[pixels].isnan().all()
    assert (grad_words[~words] == 0).all()
    assert grad_words[words].isnan().all()


def test_pixels_and_words_with_no_direction_get_no_gradient() -> None:
    inputs = here(make(2, 40, 6, 16))
    inputs[0][0, 3] = 0
    inputs[0][1, 5] *= 1e-14
    inputs[1][0, 2] *= 1e-14
    inputs[3][1, 1] = 0
    check(inputs, cuda, reference, similarity="cosine")
    _, grad_pixels, grad_words = run(cuda, inputs, similarity="cosine")
    assert not grad_pixels[[0, 1], [3, 5]].any()
    assert not grad_words[0, 2].any()


@pytest.mark.parametrize("words", [20, 70])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_student_equal_to_teacher_is_exactly_zero(similarity: str, words: int) -> None:
    v, w, *_ = here(make(2, 70, words, 24))
    loss, *grads = run(cuda, [v, w, v.clone(), w.clone()], similarity=similarity, temperature=0.05)
    assert loss.abs().max() == 0
    assert all(grad.abs().max() == 0 for grad in grads)


@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4])
def test_gradients_near_the_teacher_keep_their_digits(difference: float) -> None:
    """Differences of probabilities survive the products of 16 bits."""
    inputs = here(make(2, 70, 8, 32))
    for i in range(2):
        inputs[i] = inputs[i + 2] + difference * inputs[i]
    for term in TERMS:
        got = run(cuda, inputs, terms=(term,))
        exact = run(reference, [x.double() for x in inputs], terms=(term,))
        for g, e in zip(got[1:], exact[1:], strict=True):
            assert (g.double() - e).norm() / e.norm() < 1e-6 / difference


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_of_any_size_keep_their_digits(scale: float) -> None:
    """The slopes of the second order are multiplied in units of their own."""
    inputs = here(make(2, 40, 20, 16))
    one = run(cuda, inputs, terms=("pixel_pixel", "word_word"))
    scaled = lambda *x, **options: {name: scale * value for name, value in cuda(*x, **options).items()}
    other = run(scaled, inputs, terms=("pixel_pixel", "word_word"))
    for g, w in zip(other[1:], one[1:], strict=True):
        torch.testing.assert_close(g / scale, w, rtol=1e-4, atol=1e-6 * w.abs().max().item())


def test_infinite_and_large_logits() -> None:
    m_s, m_t = (x[..., :5].clone() for x in here(make(2, 60, 5, 5)[::2]))
    m_s[0, 0, 1] = m_t[0, 0, 1] = -INF  # excluded by both
    m_t[0, 1, 2] = -INF  # by the teacher alone
    m_t[0, 2, :3] = -INF
    m_s[0, :40, 3] = m_t[0, :40, 3] = -INF  # a whole block of a column, for both; then finite ones
    m_s[1] += 1e4
    m_t[1] -= 1e4
    got = run(from_logits, [m_s, m_t], 1)
    want = run(reference_from_logits, [m_s.double(), m_t.double()], 1)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-7)
    m_s[0, 3, 0] = -INF  # excluded by the student, possible to the teacher
    terms = from_logits(m_s, m_t)
    assert terms["pixel_to_word"][0] == INF
    assert terms["word_to_pixel"][0] == INF


@pytest.mark.parametrize("words", [6, 40])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_propagate(value: float, words: int) -> None:
    for which in range(4):
        inputs = here(make(2, 40, words, 8))
        inputs[which][0, 1, 0] = value
        for similarity in ("scaled_dot", "cosine"):
            for term, got in cuda(*inputs, similarity=similarity).items():
                assert not got[0].isfinite(), term
                assert got[1].isfinite(), term


def test_words_of_any_strides() -> None:
    inputs = here(make(3, 20, 5, 12))
    want = run(cuda, inputs, similarity="cosine")
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in inputs]  # the batch is innermost
    spaced = [x.repeat_interleave(3, 2)[..., ::3] for x in inputs]
    for given in (turned, spaced):
        for got, w in zip(run(cuda, given, similarity="cosine"), want, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-7)
    one = [x[:1].expand(3, -1, -1) for x in inputs]
    for got, w in zip(run(cuda, one), run(cuda, [x.contiguous() for x in one]), strict=True):
        assert torch.equal(got, w)


def test_gradients_have_the_students_layout() -> None:
    for given in (here(make(2, 20, 5, 16)), as_maps(here(make(2, 20, 5, 16)))):
        _, grad, _ = run(cuda, given)
        assert grad.stride() == given[0].stride()


def test_mixed_dtypes() -> None:
    v_s, l_s, v_t, l_t = here(make(2, 20, 4, 16, dtype=torch.bfloat16))
    want = run(cuda, [v_s.float(), l_s.float(), v_t.float(), l_t.float()])
    got = run(cuda, [v_s, l_s.float(), v_t.float(), l_t])
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(got[1].float(), want[1], rtol=2**-8, atol=1e-7)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-7)


def test_only_what_is_asked_for() -> None:
    inputs, arguments = here(make(2, 20, 4, 16)), (None, None, None, True, 1.0, 15)
    forward, backward = torch.ops.fastkd.pixel_word_forward, torch.ops.fastkd.pixel_word_backward
    loss, *kept = forward(*inputs, *arguments, False, "cuda")
    assert all(x.numel() == 0 for x in kept)
    loss, *kept = forward(*inputs, *arguments, True, "cuda")
    grad = torch.ones((), device=DEVICE).expand_as(loss)  # stride 0
    given = (grad, *inputs[:2], None, *arguments[:3], *kept, 16, *arguments[3:])
    both = backward(*given, True, True, "cuda")
    for wish in ((True, False), (False, True)):
        for one, all_of_it, wanted in zip(backward(*given, *wish, "cuda"), both, wish, strict=True):
            assert torch.equal(one, all_of_it) if wanted else one.numel() == 0
    # A term that was not asked for is 0, and its gradient is not read.
    loss, *kept = forward(*inputs, None, None, None, False, 1.0, 4, True, "cuda")
    assert (loss != 0).tolist() == [[False, False, True, False]] * 2
    tail = (*inputs[:2], None, None, None, None, *kept, 16, False, 1.0, 4, True, True, "cuda")
    nan = torch.full_like(loss, NAN)
    nan[:, 2] = 1.0
    assert all(torch.equal(a, b) for a, b in zip(backward(nan, *tail), backward(grad, *tail), strict=True))


def test_more_words_than_a_block_holds() -> None:
    inputs = here(make(1, 20, 129, 4))
    logits = [v @ w.mT for v, w in (inputs[:2], inputs[2:])]
    for call, given in ((cuda, inputs), (from_logits, logits)):
        with pytest.raises(fastkd.BackendUnavailable, match=r"at most 128 words, got 129; use backend='auto'"):
            call(*given)
    for term, value in pixel_word(*inputs).items():  # auto goes on to another
        torch.testing.assert_close(value, reference(*inputs)[term], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 2), (3, 70, 20, 33, 17), (1, 41, 128, 9, 9)], ids=str)
def test_fp64(shape: tuple[int, ...], similarity: str) -> None:
    inputs = here(make(*shape, dtype=torch.float64))
    masks = masks_of(*shape[:3])
    check(inputs, cuda, reference, similarity=similarity, temperature=0.7, **masks)
    check(as_maps(inputs), cuda, reference, similarity=similarity)
    logits = [v @ w.mT for v, w in (inputs[:2], inputs[2:])]
    check(logits, from_logits, reference_from_logits, 1, **masks)
    mixed = [x.float() if i == 0 else x for i, x in enumerate(inputs)]  # its gradient is of its dtype, not fp64
    got = run(cuda, mixed, similarity=similarity)
    want = run(reference, [x.double() for x in mixed], similarity=similarity)
    assert [x.dtype for x in got] == [torch.float64, torch.float32, torch.float64]
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)


def test_problems_the_kernels_do_not_index_are_refused() -> None:
    """An error before any launch, with nothing read or written."""
    from fastkd.ops._launch import native

    module = native("cuda")
    memory = torch.zeros(64, device=DEVICE)
    network = ((memory.data_ptr(), "float32", (0, 0, 1)), memory.data_ptr(), 0, 4, 8, 1.0, False)

    def problem(words: int = 4, width: int = 8, batch: int = 1, pixels: int = 4, address: int = 0) -> Any:
        own = ((address or memory.data_ptr(), "float32", (0, 0, 1)), *network[1:3], words, width, 1.0, False)
        return module.PixelWord((own, own, 0, batch, pixels, "float32", False, 15), 0, 2**25)

    problem()
    for beyond in ({"words": 129}, {"width": 2**28 + 1}, {"pixels": 2**28 + 1}, {"batch": 2**31}):
        with pytest.raises(ValueError, match="than the kernels index"):
            problem(**beyond)
    with pytest.raises(ValueError, match="multiple of the element size 4"):
        problem(address=memory.data_ptr() + 2)
    with pytest.raises(ValueError, match="loss: a null pointer"):
        problem().forward([0, 0, 0, 0], 0, memory.data_ptr())
    with pytest.raises(RuntimeError, match="pixel_word_forward: cudaErrorInvalidValue"):  # nowhere to put the logits
        problem().forward([0, 0, 0, 0], memory.data_ptr(), memory.data_ptr())
