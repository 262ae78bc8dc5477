"""What is particular to the pixel_word kernels in Triton: padded words, blocks and their edges, programs, layouts.

Under the interpreter on CPU tensors where there is no GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pixel_word_tools import Masks, as_maps, check, make, make_masks, run
from torch import Tensor

import fastkd
from fastkd.ops import _backends
from fastkd.ops._pixel_word_call import MOST_WORDS
from fastkd.ops.pixel_word import pixel_word, pixel_word_from_logits
from fastkd.reference.pixel_word import TERMS
from fastkd.reference.pixel_word import pixel_word as reference
from fastkd.reference.pixel_word import pixel_word_from_logits as reference_from_logits

if reason := _backends.why_not("triton"):
    pytest.skip(f"no Triton: {reason}", allow_module_level=True)

from fastkd.kernels import _pixel_word as shared

DEVICE = "cpu" if _backends._misplaced("triton", "cpu") is None else "cuda"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.usefixtures("interpreted")
INF, NAN = math.inf, math.nan


def here(inputs: list[Tensor]) -> list[Tensor]:
    return [x.to(DEVICE) for x in inputs]


def masks_of(b: int, n: int, t: int) -> Masks:
    return {name: mask.to(DEVICE) for name, mask in make_masks(b, n, t).items()}


def triton(*inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    return pixel_word(*inputs, backend="triton", **options)


def from_logits(*inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    return pixel_word_from_logits(*inputs, backend="triton", **options)


# One of each padded number of words, 16 to 128, with less than a block of pixels, whole blocks and one more, features
# within a block and beyond one. 33 words and more have their Grams by slabs, 65 and more the gradient too.
SHAPES = [(2, 1, 1, 1, 2), (2, 33, 16, 3, 70), (2, 64, 20, 65, 40), (1, 65, 33, 17, 5), (1, 40, 128, 8, 8)]


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(shape: tuple[int, ...], similarity: str) -> None:
    inputs = here(make(*shape))
    options = {"similarity": similarity, "temperature": 0.7}
    check(inputs, triton, reference, **options, **masks_of(*shape[:3]))
    check(as_maps(inputs), triton, reference, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = here(make(*shape, dtype=dtype))
    check(inputs, triton, reference)
    check(as_maps(inputs), triton, reference, similarity="cosine", **masks_of(*shape[:3]))


@pytest.mark.parametrize("words", [5, 40])
@pytest.mark.parametrize("programs", [1, 4])
def test_several_blocks_and_several_programs(monkeypatch: pytest.MonkeyPatch, programs: int, words: int) -> None:
    """One program for five blocks and more; a few, of unequal work; the same numbers but for the order of sums."""
    inputs, masks = here(make(2, 150, words, 8)), masks_of(2, 150, words)
    many = run(triton, inputs, **masks)
    monkeypatch.setattr(shared, "PROGRAMS", programs)
    few = run(triton, inputs, **masks)
    check(inputs, triton, reference, **masks)
    for got, want in zip(few, many, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_many_partial_sums_are_merged() -> None:
    """As many programs to a sample as there can be, each with its share of more than 64 blocks."""
    logits = here(make(1, 32 * 70, 2, 2)[::2])
    check(logits, from_logits, reference_from_logits, 1)


@pytest.mark.parametrize("words", [3, 40])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(term: str, words: int) -> None:
    inputs, masks = here(make(2, 40, words, 6)), masks_of(2, 40, words)
    check(inputs, triton, reference, terms=(term,), **masks)
    together = triton(*inputs, **masks)[term]
    torch.testing.assert_close(triton(*inputs, terms=(term,), **masks)[term], together, rtol=0, atol=0)


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
    check(inputs, triton, reference, terms=("pixel_pixel",))
    masks = masks_of(2, 40, words[0]) | {"teacher_word_mask": masks_of(2, 40, words[1])["student_word_mask"]}
    check(inputs, triton, reference, terms=("pixel_pixel",), similarity="cosine", **masks)
    logits = [v @ w.mT for v, w in (inputs[:2], inputs[2:])]
    check(logits, from_logits, reference_from_logits, 1, terms=("pixel_pixel",), **masks)


@pytest.mark.parametrize("fill", [1e30, NAN, INF])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_what_masked_entries_hold_touches_nothing(similarity: str, fill: float) -> None:
    masks = masks_of(2, 40, 12)
    words, pixels = masks["student_word_mask"], masks["pixel_mask"]
    inputs = here(make(2, 40, 12, 20))
    filled = [x.masked_fill(~(words if i % 2 else pixels)[..., None], fill) for i, x in enumerate(inputs)]
    want = run(triton, inputs, similarity=similarity, **masks)
    got = run(triton, as_maps(filled), similarity=similarity, **masks)
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
    _, grad_pixels, grad_words = run(triton, inputs, **masks)
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
    check(inputs, triton, reference, similarity="cosine")
    _, grad_pixels, grad_words = run(triton, inputs, similarity="cosine")
    assert not grad_pixels[[0, 1], [3, 5]].any()
    assert not grad_words[0, 2].any()


@pytest.mark.parametrize("words", [20, 70])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_student_equal_to_teacher_is_exactly_zero(similarity: str, words: int) -> None:
    v, w, *_ = here(make(2, 70, words, 24))
    loss, *grads = run(triton, [v, w, v.clone(), w.clone()], similarity=similarity, temperature=0.05)
    assert loss.abs().max() == 0
    assert all(grad.abs().max() == 0 for grad in grads)


@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4])
def test_gradients_near_the_teacher_keep_their_digits(difference: float) -> None:
    """Differences of probabilities survive the products of 16 bits."""
    inputs = here(make(2, 70, 8, 32))
    for i in range(2):
        inputs[i] = inputs[i + 2] + difference * inputs[i]
    for term in TERMS:
        got = run(triton, inputs, terms=(term,))
        exact = run(reference, [x.double() for x in inputs], terms=(term,))
        for g, e in zip(got[1:], exact[1:], strict=True):
            assert (g.double() - e).norm() / e.norm() < 1e-6 / difference


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_of_any_size_keep_their_digits(scale: float) -> None:
    """The slopes of the second order are multiplied in units of their own."""
    inputs = here(make(2, 40, 20, 16))
    one = run(triton, inputs, terms=("pixel_pixel", "word_word"))
    scaled = lambda *x, **options: {name: scale * value for name, value in triton(*x, **options).items()}
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
            for term, got in triton(*inputs, similarity=similarity).items():
                assert not got[0].isfinite(), term
                assert got[1].isfinite(), term


def test_words_of_any_strides() -> None:
    inputs = here(make(3, 20, 5, 12))
    want = run(triton, inputs, similarity="cosine")
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in inputs]  # the batch is innermost
    spaced = [x.repeat_interleave(3, 2)[..., ::3] for x in inputs]
    for given in (turned, spaced):
        for got, w in zip(run(triton, given, similarity="cosine"), want, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-7)
    one = [x[:1].expand(3, -1, -1) for x in inputs]
    for got, w in zip(run(triton, one), run(triton, [x.contiguous() for x in one]), strict=True):
        assert torch.equal(got, w)


def test_gradients_have_the_students_layout() -> None:
    for given in (here(make(2, 20, 5, 16)), as_maps(here(make(2, 20, 5, 16)))):
        _, grad, _ = run(triton, given)
        assert grad.stride() == given[0].stride()


def test_mixed_dtypes() -> None:
    v_s, l_s, v_t, l_t = here(make(2, 20, 4, 16, dtype=torch.bfloat16))
    want = run(triton, [v_s.float(), l_s.float(), v_t.float(), l_t.float()])
    got = run(triton, [v_s, l_s.float(), v_t.float(), l_t])
    assert torch.equal(got[0], want[0])
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(got[1].float(), want[1], rtol=2**-8, atol=1e-7)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-7)


def test_only_what_is_asked_for() -> None:
    inputs, arguments = here(make(2, 20, 4, 16)), (None, None, None, True, 1.0, 15)
    forward, backward = torch.ops.fastkd.pixel_word_forward, torch.ops.fastkd.pixel_word_backward
    loss, *kept = forward(*inputs, *arguments, False, "triton")
    assert all(x.numel() == 0 for x in kept)
    loss, *kept = forward(*inputs, *arguments, True, "triton")
    grad = torch.ones((), device=DEVICE).expand_as(loss)  # stride 0
    given = (grad, *inputs[:2], None, *arguments[:3], *kept, 16, *arguments[3:])
    both = backward(*given, True, True, "triton")
    for wish in ((True, False), (False, True)):
        for one, all_of_it, wanted in zip(backward(*given, *wish, "triton"), both, wish, strict=True):
            assert torch.equal(one, all_of_it) if wanted else one.numel() == 0
    # A term that was not asked for is 0, and its gradient is not read.
    loss, *kept = forward(*inputs, None, None, None, False, 1.0, 4, True, "triton")
    assert (loss != 0).tolist() == [[False, False, True, False]] * 2
    tail = (*inputs[:2], None, None, None, None, *kept, 16, False, 1.0, 4, True, True, "triton")
    nan = torch.full_like(loss, NAN)
    nan[:, 2] = 1.0
    assert all(torch.equal(a, b) for a, b in zip(backward(nan, *tail), backward(grad, *tail), strict=True))


def test_more_words_than_a_program_holds() -> None:
    inputs = here(make(1, 20, 129, 4))
    logits = [v @ w.mT for v, w in (inputs[:2], inputs[2:])]
    for call, given in ((triton, inputs), (from_logits, logits)):
        with pytest.raises(fastkd.BackendUnavailable, match=r"at most 128 words, got 129; use backend='auto'"):
            call(*given)
    for term, value in pixel_word(*inputs).items():  # auto goes on to another
        torch.testing.assert_close(value, reference(*inputs)[term], rtol=1e-4, atol=1e-6)


def test_blocks_exist_for_all_words() -> None:
    """Whatever the number of words, a power of two that the tables know, and no more programs than are merged."""
    assert MOST_WORDS["triton"] == shared.MOST_WORDS
    for words in range(1, shared.MOST_WORDS + 1):
        padded = shared.padded(words)
        assert words <= padded <= max(16, 2 * words)
        for blocks in (shared.logits_blocks(padded, True), shared.words_blocks(padded, False)):
            assert blocks.pixels >= 16
            assert blocks.columns >= 16
        assert padded % shared.gradient_blocks(padded).columns == 0
    for pixels in (1, 32, 14_400, 10_000_000):
        for batch in (1, 16, 10_000):
            each, programs = shared.cut(pixels, 32, batch, shared.MOST_SUMS)
            assert programs <= shared.MOST_SUMS
            assert (programs - 1) * each < -(-pixels // 32) <= programs * each
