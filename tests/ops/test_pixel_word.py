"""pixel_word on the CPU: accuracy for all layouts, masks, dtypes and special values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pixel_word_tools as tools
import pytest
import torch
from pixel_word_tools import Kernels, Masks, as_maps, make, make_masks, run
from torch import Tensor
from torch.autograd import gradcheck

from fastkd.ops import dispatch
from fastkd.ops.pixel_word.reference import TERMS
from fastkd.ops.pixel_word.reference import pixel_word as reference
from fastkd.ops.pixel_word.reference import pixel_word_from_logits as reference_from_logits

if (reason := dispatch.unavailable_reason("cpu", "pixel_word", "cpu")) is not None:
    pytest.skip(f"no compiled kernels: {reason}", allow_module_level=True)

INF, NAN = math.inf, math.nan
cpu, cpu_from_logits = Kernels("cpu").features, Kernels("cpu").logits


def check(inputs: Sequence[Tensor], ours: Any = cpu, plain: Any = reference, leaves: int = 2, **options: Any) -> None:
    tools.check(inputs, ours, plain, leaves, **options)


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


def test_sizes_of_1_may_have_any_stride() -> None:
    """``contiguous()`` returns such a tensor unchanged."""
    tensors = [x.as_strided(x.shape, (2, 2, 2)) for x in make(1, 1, 1, 1)]
    for backend in (cpu, reference):
        loss, *grads = run(backend, tensors)
        assert not loss.any()
        assert not any(grad.any() for grad in grads)
    loss, grad = run(cpu_from_logits, tensors[::2], 1)
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("strides", [(8, 1, 0), (0, 1, 4), (8, 0, 1), (1, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("pixels", [1, 3])
def test_gradients_of_expanded_pixels(pixels: int, strides: tuple[int, ...]) -> None:
    inputs = make(2, pixels, 3, 4)
    inputs[0] = torch.randn(40).as_strided((2, pixels, 4), strides)
    for got, want in zip(run(cpu, inputs), run(reference, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


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
