"""The pixel_word kernels in Triton and CUDA C++: terms, masks, layouts, limits.

Tests that apply to only one of them are in ``test_pixel_word_triton.py`` and ``test_pixel_word_cuda.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gpu_kernels import DEVICE, MARKS, require_gpu_kernels
from pixel_word_tools import Kernels, as_maps, check, here, make, masks_of, run

import fastkd
from fastkd.ops.pixel_word import pixel_word
from fastkd.ops.pixel_word.reference import TERMS
from fastkd.ops.pixel_word.reference import pixel_word as reference
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as reference_from_logits

pytestmark = MARKS
INF, NAN = math.inf, math.nan


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    with require_gpu_kernels(request.param):
        yield Kernels(request.param)


@pytest.mark.parametrize("words", [3, 40])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(kernels: Kernels, term: str, words: int) -> None:
    inputs, masks = here(make(2, 40, words, 6)), masks_of(2, 40, words)
    check(inputs, kernels.features, reference, terms=(term,), **masks)
    with_others = kernels.features(*inputs, **masks)[term]
    torch.testing.assert_close(kernels.features(*inputs, terms=(term,), **masks)[term], with_others, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("words", [5, 70])
def test_from_logits(kernels: Kernels, words: int, dtype: torch.dtype) -> None:
    logits = here([2 * x for x in make(2, 45, words, words, dtype=dtype)[::2]])
    check(logits, kernels.logits, reference_from_logits, 1, temperature=1.3)
    transposed = [x.mT.contiguous().mT for x in logits]
    check(transposed, kernels.logits, reference_from_logits, 1, **masks_of(2, 45, words))


@pytest.mark.parametrize("words", [(5, 23), (40, 3)])
def test_teacher_with_other_tokens(kernels: Kernels, words: tuple[int, int]) -> None:
    v_s, l_s, v_t, _ = make(2, 40, words[0], 16)
    inputs = here([v_s, l_s, v_t, make(2, 1, words[1], 16, seed=1)[3]])
    check(inputs, kernels.features, reference, terms=("pixel_pixel",))
    masks = masks_of(2, 40, words[0]) | {"teacher_word_mask": masks_of(2, 40, words[1])["student_word_mask"]}
    check(inputs, kernels.features, reference, terms=("pixel_pixel",), similarity="cosine", **masks)
    logits = [v @ w.mT for v, w in (inputs[:2], inputs[2:])]
    check(logits, kernels.logits, reference_from_logits, 1, terms=("pixel_pixel",), **masks)


@pytest.mark.parametrize("fill", [1e30, NAN, INF])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_masked_values_have_no_effect(kernels: Kernels, similarity: str, fill: float) -> None:
    masks = masks_of(2, 40, 12)
    words, pixels = masks["student_word_mask"], masks["pixel_mask"]
    inputs = here(make(2, 40, 12, 20))
    filled = [x.masked_fill(~(words if i % 2 else pixels)[..., None], fill) for i, x in enumerate(inputs)]
    want = run(kernels.features, inputs, similarity=similarity, **masks)
    got = run(kernels.features, as_maps(filled), similarity=similarity, **masks)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)
    assert (got[1][~pixels] == 0).all()
    assert (got[2][~words] == 0).all()
    kept = pixels[..., None] & words[:, None]
    logits = here([x[..., :12] for x in make(2, 40, 12, 20, seed=1)[::2]])
    want = run(kernels.logits, logits, 1, **masks)
    got = run(kernels.logits, [x.masked_fill(~kept, fill) for x in logits], 1, **masks)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert (got[1][~kept] == 0).all()


def test_masked_entries_have_zero_gradient_next_to_nan(kernels: Kernels) -> None:
    inputs, masks = here(make(1, 40, 4, 16)), masks_of(1, 40, 4)
    words, pixels = masks["student_word_mask"], masks["pixel_mask"]
    inputs[1][0, 2] = NAN  # a valid word
    _, grad_pixels, grad_words = run(kernels.features, inputs, **masks)
    assert (grad_pixels[~pixels] == 0).all()
    assert grad_pixels[pixels].isnan().all()
    assert (grad_words[~words] == 0).all()
    assert grad_words[words].isnan().all()


def test_pixels_and_words_of_norm_zero_have_zero_gradient(kernels: Kernels) -> None:
    inputs = here(make(2, 40, 6, 16))
    inputs[0][0, 3] = 0
    inputs[0][1, 5] *= 1e-14
    inputs[1][0, 2] *= 1e-14
    inputs[3][1, 1] = 0
    check(inputs, kernels.features, reference, similarity="cosine")
    _, grad_pixels, grad_words = run(kernels.features, inputs, similarity="cosine")
    assert not grad_pixels[[0, 1], [3, 5]].any()
    assert not grad_words[0, 2].any()


@pytest.mark.parametrize("words", [20, 70])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_student_equal_to_teacher_is_exactly_zero(kernels: Kernels, similarity: str, words: int) -> None:
    v, w, *_ = here(make(2, 70, words, 24))
    loss, *grads = run(kernels.features, [v, w, v.clone(), w.clone()], similarity=similarity, temperature=0.05)
    assert loss.abs().max() == 0
    assert all(grad.abs().max() == 0 for grad in grads)


@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4])
def test_gradients_stay_precise_near_the_teacher(kernels: Kernels, difference: float) -> None:
    """Split 16-bit products keep the precision of differences of probabilities."""
    inputs = here(make(2, 70, 8, 32))
    for i in range(2):
        inputs[i] = inputs[i + 2] + difference * inputs[i]
    for term in TERMS:
        got = run(kernels.features, inputs, terms=(term,))
        exact = run(reference, [x.double() for x in inputs], terms=(term,))
        for g, e in zip(got[1:], exact[1:], strict=True):
            assert (g.double() - e).norm() / e.norm() < 1e-6 / difference


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_of_any_magnitude_stay_precise(kernels: Kernels, scale: float) -> None:
    """The slopes of the second-order terms are scaled before they are multiplied."""
    inputs = here(make(2, 40, 20, 16))
    one = run(kernels.features, inputs, terms=("pixel_pixel", "word_word"))
    scaled = lambda *x, **options: {name: scale * value for name, value in kernels.features(*x, **options).items()}
    other = run(scaled, inputs, terms=("pixel_pixel", "word_word"))
    for g, w in zip(other[1:], one[1:], strict=True):
        torch.testing.assert_close(g / scale, w, rtol=1e-4, atol=1e-6 * w.abs().max().item())


def test_infinite_and_large_logits(kernels: Kernels) -> None:
    m_s, m_t = (x[..., :5].clone() for x in here(make(2, 60, 5, 5)[::2]))
    m_s[0, 0, 1] = m_t[0, 0, 1] = -INF  # excluded by both
    m_t[0, 1, 2] = -INF  # excluded by the teacher only
    m_t[0, 2, :3] = -INF
    m_s[0, :40, 3] = m_t[0, :40, 3] = -INF  # excluded by both: a column that starts with more than one block of −inf
    m_s[1] += 1e4
    m_t[1] -= 1e4
    got = run(kernels.logits, [m_s, m_t], 1)
    want = run(reference_from_logits, [m_s.double(), m_t.double()], 1)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-7)
    m_s[0, 3, 0] = -INF  # excluded by the student only
    terms = kernels.logits(m_s, m_t)
    assert terms["pixel_to_word"][0] == INF
    assert terms["word_to_pixel"][0] == INF


@pytest.mark.parametrize("words", [6, 40])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_propagate(kernels: Kernels, value: float, words: int) -> None:
    for which in range(4):
        inputs = here(make(2, 40, words, 8))
        inputs[which][0, 1, 0] = value
        for similarity in ("scaled_dot", "cosine"):
            for term, got in kernels.features(*inputs, similarity=similarity).items():
                assert not got[0].isfinite(), term
                assert got[1].isfinite(), term


def test_words_of_any_strides(kernels: Kernels) -> None:
    inputs = here(make(3, 20, 5, 12))
    want = run(kernels.features, inputs, similarity="cosine")
    transposed = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in inputs]  # the batch is innermost
    spaced = [x.repeat_interleave(3, 2)[..., ::3] for x in inputs]
    for given in (transposed, spaced):
        for got, w in zip(run(kernels.features, given, similarity="cosine"), want, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-7)
    one = [x[:1].expand(3, -1, -1) for x in inputs]
    for got, w in zip(run(kernels.features, one), run(kernels.features, [x.contiguous() for x in one]), strict=True):
        assert torch.equal(got, w)


def test_gradients_have_the_students_layout(kernels: Kernels) -> None:
    for given in (here(make(2, 20, 5, 16)), as_maps(here(make(2, 20, 5, 16)))):
        _, grad, _ = run(kernels.features, given)
        assert grad.stride() == given[0].stride()


def test_mixed_dtypes(kernels: Kernels) -> None:
    v_s, l_s, v_t, l_t = here(make(2, 20, 4, 16, dtype=torch.bfloat16))
    want = run(kernels.features, [v_s.float(), l_s.float(), v_t.float(), l_t.float()])
    got = run(kernels.features, [v_s, l_s.float(), v_t.float(), l_t])
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(got[1].float(), want[1], rtol=2**-8, atol=1e-7)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-7)


def test_computes_only_requested_gradients_and_terms(kernels: Kernels) -> None:
    inputs, arguments = here(make(2, 20, 4, 16)), (None, None, None, True, 1.0, 15)
    forward, backward = torch.ops.fastkd.pixel_word_forward, torch.ops.fastkd.pixel_word_backward
    loss, *kept = forward(*inputs, *arguments, False, kernels.backend)
    assert all(x.numel() == 0 for x in kept)
    loss, *kept = forward(*inputs, *arguments, True, kernels.backend)
    grad = torch.ones((), device=DEVICE).expand_as(loss)  # stride 0
    given = (grad, *inputs[:2], None, *arguments[:3], *kept, 16, *arguments[3:])
    both = backward(*given, True, True, kernels.backend)
    for requested in ((True, False), (False, True)):
        for grad_x, expected, needed in zip(
            backward(*given, *requested, kernels.backend), both, requested, strict=True
        ):
            assert torch.equal(grad_x, expected) if needed else grad_x.numel() == 0
    # A term that is not requested is 0, and its gradient is not read.
    loss, *kept = forward(*inputs, None, None, None, False, 1.0, 4, True, kernels.backend)
    assert (loss != 0).tolist() == [[False, False, True, False]] * 2
    tail = (*inputs[:2], None, None, None, None, *kept, 16, False, 1.0, 4, True, True, kernels.backend)
    nan = torch.full_like(loss, NAN)
    nan[:, 2] = 1.0
    assert all(torch.equal(a, b) for a, b in zip(backward(nan, *tail), backward(grad, *tail), strict=True))


def test_rejects_more_words_than_a_block_holds(kernels: Kernels) -> None:
    inputs = here(make(1, 20, 129, 4))
    logits = [v @ w.mT for v, w in (inputs[:2], inputs[2:])]
    for call, given in ((kernels.features, inputs), (kernels.logits, logits)):
        with pytest.raises(fastkd.BackendUnavailable, match=r"at most 128 words, got 129; use backend='auto'"):
            call(*given)
    for term, value in pixel_word(*inputs).items():  # "auto" uses another backend
        torch.testing.assert_close(value, reference(*inputs)[term], rtol=1e-4, atol=1e-6)
