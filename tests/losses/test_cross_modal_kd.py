"""cross_modal_kd and cross_modal_kd_from_logits against loops written from their definition, with full N×N matrices."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from loss_oracle import kl, log_softmax
from torch.autograd import gradcheck, gradgradcheck

from fastkd.losses import DEFAULT_TERMS, CrossModalKD, cross_modal_kd, cross_modal_kd_from_logits

TERMS = ["pixel_to_word", "word_to_pixel", "pixel_pixel", "word_word"]
ALL = dict.fromkeys(TERMS, 1.0)


# --- the oracle: Python floats, one loop per sum ----------------------------------------------------------------------


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def logits_of(pixels, words, similarity):
    """Return M[i][j] of one sample."""
    if similarity == "scaled_dot":
        return [[dot(v, w) / math.sqrt(len(v)) for w in words] for v in pixels]
    norm = lambda x: max(math.sqrt(dot(x, x)), 1e-12)
    return [[dot(v, w) / norm(v) / norm(w) for w in words] for v in pixels]


def attention(m, valid_pixels, valid_words, tau):
    """Return A with only the valid rows and columns; the others are 0."""
    return [[math.exp(v) for v in log_softmax([m[i][j] / tau for j in valid_words])] for i in valid_pixels]


def gram_distance(rows_s, rows_t):
    return sum(
        (dot(rows_s[i], rows_s[j]) - dot(rows_t[i], rows_t[j])) ** 2
        for i in range(len(rows_s))
        for j in range(len(rows_s))
    )


def sample_terms(m_s, m_t, pixels, words_s, words_t, tau):
    """Return all terms of one sample from lists of valid indices; terms over words need words_s == words_t."""
    n = len(pixels)
    a_s, a_t = attention(m_s, pixels, words_s, tau), attention(m_t, pixels, words_t, tau)
    terms = {"pixel_pixel": gram_distance(a_s, a_t) / n**2}
    if words_s == words_t:
        columns_s, columns_t = list(zip(*a_s, strict=True)), list(zip(*a_t, strict=True))
        terms["word_word"] = gram_distance(columns_s, columns_t) / n**2
        terms["pixel_to_word"] = (
            tau**2 * sum(kl([m_t[i][j] / tau for j in words_t], [m_s[i][j] / tau for j in words_s]) for i in pixels) / n
        )
        terms["word_to_pixel"] = (
            tau**2
            * sum(kl([m_t[i][j] / tau for i in pixels], [m_s[i][j] / tau for i in pixels]) for j in words_s)
            / len(words_s)
        )
    return terms


def oracle(m_s, m_t, word_mask, pixel_mask, tau):
    """Return {term: (B,)} from nested lists M[b][i][j]."""
    true = lambda mask, b: [k for k, ok in enumerate(mask[b].tolist()) if ok]
    mask_s, mask_t = word_mask if isinstance(word_mask, tuple) else (word_mask, word_mask)
    each = [
        sample_terms(m_s[b], m_t[b], true(pixel_mask, b), true(mask_s, b), true(mask_t, b), tau)
        for b in range(len(m_s))
    ]
    return {term: torch.tensor([e[term] for e in each], dtype=torch.float64) for term in each[0]}


def make(seed=0, b=2, n=6, t=4, widths=(3, 5), scale=1.0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: scale * torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(b, n, widths[0]), draw(b, t, widths[0]), draw(b, n, widths[1]), draw(b, t, widths[1])


def masks(b=2, n=6, t=4):
    words, pixels = torch.ones(b, t, dtype=torch.bool), torch.ones(b, n, dtype=torch.bool)
    words[0, 2:] = False
    words[1, 1] = False  # not only padding at the end
    pixels[0, 0] = pixels[1, 3:5] = False
    return words, pixels


def expected(inputs, word_mask, pixel_mask, similarity, tau):
    v_s, l_s, v_t, l_t = (x.tolist() for x in inputs)
    m_s = [logits_of(v, w, similarity) for v, w in zip(v_s, l_s, strict=True)]
    m_t = [logits_of(v, w, similarity) for v, w in zip(v_t, l_t, strict=True)]
    return oracle(m_s, m_t, word_mask, pixel_mask, tau)


@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_term_equals_the_loop(masked, similarity, tau):
    inputs = make()
    words, pixels = masks() if masked else (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool))
    want = expected(inputs, words, pixels, similarity, tau)
    options = {"similarity": similarity, "temperature": tau}
    if masked:
        options |= {"word_mask": words, "pixel_mask": pixels}
    got = cross_modal_kd(*inputs, terms=ALL, reduction="none", return_terms=True, **options)
    assert list(got) == TERMS
    for term in TERMS:
        torch.testing.assert_close(got[term], want[term], rtol=1e-8, atol=1e-12)
        one = cross_modal_kd(*inputs, terms={term: 2.0}, reduction="none", **options)
        torch.testing.assert_close(one, 2 * want[term], rtol=1e-8, atol=1e-12)
    weights = {"pixel_to_word": 0.5, "word_to_pixel": 0.0, "pixel_pixel": 3.0, "word_word": 2.0}
    total = sum(weights[term] * want[term] for term in TERMS)
    for reduction, value in (("none", total), ("mean", total.mean()), ("sum", total.sum())):
        got = cross_modal_kd(*inputs, terms=weights, reduction=reduction, **options)
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-12)


def test_default_terms():
    inputs, (words, pixels) = make(1), masks()
    want = expected(inputs, words, pixels, "scaled_dot", 1.0)
    got = cross_modal_kd(*inputs, word_mask=words, pixel_mask=pixels)
    torch.testing.assert_close(got, (want["pixel_to_word"] + want["word_to_pixel"]).mean())
    assert set(cross_modal_kd(*inputs, return_terms=True)) == {"pixel_to_word", "word_to_pixel"}


@pytest.mark.parametrize("heads", [None, 3])
def test_from_logits_equals_the_loop(heads):
    g = torch.Generator().manual_seed(2)
    shape = (2, 6, 4) if heads is None else (2, heads, 6, 4)
    m_s, m_t = (2 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    words, pixels = masks()
    got = cross_modal_kd_from_logits(
        m_s, m_t, word_mask=words, pixel_mask=pixels, temperature=0.7, terms=ALL, reduction="none", return_terms=True
    )
    by_head = [
        oracle(
            (m_s if heads is None else m_s[:, h]).tolist(),
            (m_t if heads is None else m_t[:, h]).tolist(),
            words,
            pixels,
            0.7,
        )
        for h in range(heads or 1)
    ]
    for term in TERMS:
        want = sum(each[term] for each in by_head) / len(by_head)
        torch.testing.assert_close(got[term], want, rtol=1e-8, atol=1e-12)


def test_from_logits_agrees_with_features():
    v_s, l_s, v_t, l_t = inputs = make(3)
    words, pixels = masks()
    m_s, m_t = v_s @ l_s.mT / 3**0.5, v_t @ l_t.mT / 5**0.5
    torch.testing.assert_close(
        cross_modal_kd_from_logits(m_s, m_t, word_mask=words, pixel_mask=pixels, terms=ALL),
        cross_modal_kd(*inputs, word_mask=words, pixel_mask=pixels, terms=ALL),
    )


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_pixel_pixel_allows_different_tokens(tau):
    v_s, l_s, v_t, _ = make(4)
    l_t = make(5, t=7)[3]
    words, pixels = masks()
    words_t = torch.ones(2, 7, dtype=torch.bool)
    words_t[0, 3:] = False
    want = expected((v_s, l_s, v_t, l_t), (words, words_t), pixels, "scaled_dot", tau)["pixel_pixel"]
    options = {"terms": {"pixel_pixel": 1.0}, "temperature": tau, "pixel_mask": pixels, "reduction": "none"}
    got = cross_modal_kd(v_s, l_s, v_t, l_t, word_mask=(words, words_t), **options)
    torch.testing.assert_close(got, want)
    m_s, m_t = v_s @ l_s.mT / 3**0.5, v_t @ l_t.mT / 5**0.5
    got = cross_modal_kd_from_logits(m_s, m_t, word_mask=(words, words_t), **options)
    torch.testing.assert_close(got, want)
    leaf = v_s.requires_grad_()
    f = lambda x: cross_modal_kd(x, l_s, v_t, l_t, word_mask=(words, words_t), **options, backend="reference")
    assert gradcheck(f, (leaf,))
    assert gradgradcheck(f, (leaf,))
    with pytest.raises(ValueError, match=r"numbers of words differ, 4 and 7.*only 'pixel_pixel'"):
        cross_modal_kd(v_s, l_s, v_t, l_t)
    with pytest.raises(ValueError, match="pass a pair"):
        cross_modal_kd(v_s, l_s, v_t, l_t, terms={"pixel_pixel": 1.0}, word_mask=words)


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("term", TERMS)
def test_first_and_second_derivatives(term, similarity):
    v_s, l_s, v_t, l_t = make(6)
    words, pixels = masks()
    f = lambda v, w: cross_modal_kd(
        v,
        w,
        v_t,
        l_t,
        word_mask=words,
        pixel_mask=pixels,
        similarity=similarity,
        temperature=0.7,
        terms={term: 1.0},
        reduction="none",
        backend="reference",  # kernels are differentiable once
    )
    leaves = (v_s.requires_grad_(), l_s.requires_grad_())
    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


@pytest.mark.parametrize("fill", [0.0, 1e30, math.nan, math.inf])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_padding_changes_nothing(similarity, fill):
    inputs, (words, pixels) = make(7), masks()
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    options = {"similarity": similarity, "terms": ALL}
    want = cross_modal_kd(*leaves, *inputs[2:], word_mask=words, pixel_mask=pixels, **options)
    want.backward()
    pad = lambda x, k: torch.cat([x, torch.full((2, k, x.shape[2]), fill, dtype=x.dtype)], 1)
    padded = [pad(x, k).requires_grad_(i < 2) for i, (x, k) in enumerate(zip(inputs, (5, 3, 5, 3), strict=True))]
    more = lambda mask, k: torch.cat([mask, torch.zeros(2, k, dtype=torch.bool)], 1)
    got = cross_modal_kd(*padded, word_mask=more(words, 3), pixel_mask=more(pixels, 5), **options)
    torch.testing.assert_close(got, want)
    got.backward()
    for leaf, wide, k in zip(leaves, padded[:2], (6, 4), strict=True):
        torch.testing.assert_close(wide.grad[:, :k], leaf.grad)
        assert (wide.grad[:, k:] == 0).all()
    m_s, m_t = (torch.randn(2, 6, 4, dtype=torch.float64) for _ in range(2))
    wide_s, wide_t = (torch.full((2, 9, 7), fill, dtype=torch.float64) for _ in range(2))
    wide_s[:, :6, :4], wide_t[:, :6, :4] = m_s, m_t
    wide_s.requires_grad_()
    got = cross_modal_kd_from_logits(wide_s, wide_t, word_mask=more(words, 3), pixel_mask=more(pixels, 3), terms=ALL)
    torch.testing.assert_close(got, cross_modal_kd_from_logits(m_s, m_t, word_mask=words, pixel_mask=pixels, terms=ALL))
    got.backward()
    assert torch.isfinite(wide_s.grad).all()
    assert (wide_s.grad[:, 6:] == 0).all()
    assert (wide_s.grad[:, :, 4:] == 0).all()


def test_maps_equal_rows():
    v_s, l_s, v_t, l_t = make(8)
    words, pixels = masks()
    want = cross_modal_kd(v_s, l_s, v_t, l_t, word_mask=words, pixel_mask=pixels, terms=ALL)
    map_s, map_t = v_s.mT.reshape(2, 3, 2, 3), v_t.mT.reshape(2, 5, 2, 3)
    for student, teacher in ((map_s, map_t), (map_s, v_t), (v_s, map_t)):
        for mask in (pixels, pixels.view(2, 2, 3)):
            got = cross_modal_kd(student, l_s, teacher, l_t, word_mask=words, pixel_mask=mask, terms=ALL)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
def test_equal_student_has_zero_loss_and_gradient(tau, similarity):
    g = torch.Generator().manual_seed(9)
    v, w = torch.randn(2, 50, 8, generator=g), torch.randn(2, 5, 8, generator=g)
    v_s, l_s = v.clone().requires_grad_(), w.clone().requires_grad_()
    loss = cross_modal_kd(v_s, l_s, v, w, temperature=tau, similarity=similarity, terms=ALL)
    loss.backward()
    assert abs(loss.item()) < 2e-6 * max(1, tau**2)
    assert v_s.grad.abs().max() < 1e-6
    assert l_s.grad.abs().max() < 1e-5 * max(1, tau)


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("term", ["pixel_pixel", "word_word"])
def test_second_order_is_accurate_near_the_teacher(term, difference):
    g = torch.Generator().manual_seed(10)
    m_t = 2 * torch.randn(2, 300, 6, generator=g)
    m_s = m_t + difference * torch.randn(2, 300, 6, generator=g)
    leaf, exact = m_s.clone().requires_grad_(), m_s.double().requires_grad_()
    got = cross_modal_kd_from_logits(leaf, m_t, terms={term: 1.0})
    a, b = exact.softmax(2), m_t.double().softmax(2)
    gram = (lambda x: x @ x.mT) if term == "pixel_pixel" else (lambda x: x.mT @ x)
    want = (gram(a) - gram(b)).square().sum((1, 2)).mean() / 300**2
    # The rounding of the probabilities, 6e-8, relative to their difference; the formula adds no error.
    assert abs(got.item() / want.item() - 1) < 3e-7 / difference
    got.backward()
    want.backward()
    assert (leaf.grad.double() - exact.grad).norm() / exact.grad.norm() < 5e-7 / difference


def test_minus_infinity_logits_and_one_hot_teachers():
    inf = math.inf
    g = torch.Generator().manual_seed(11)
    m_s, m_t = (torch.randn(1, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    m_s[0, 0, 1] = m_t[0, 0, 1] = -inf  # excluded by both
    m_t[0, 1, 2] = -inf  # by the teacher only
    m_t[0, 2, :3] = -inf  # a one-hot row
    leaf = m_s.requires_grad_()
    got = cross_modal_kd_from_logits(leaf, m_t, terms=ALL, reduction="none", return_terms=True)
    finite_s, finite_t = ([[[max(v, -5000.0) for v in r] for r in m.tolist()[0]]] for m in (m_s, m_t))
    want = oracle(finite_s, finite_t, torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool), 1.0)
    for term in TERMS:
        torch.testing.assert_close(got[term], want[term])
        (grad,) = torch.autograd.grad(got[term].sum(), leaf, retain_graph=True)
        assert torch.isfinite(grad).all()
    m_t = m_t.clone()
    m_s = m_s.detach().clone()
    m_s[0, 3, 0] = -inf  # excluded by the student, allowed by the teacher
    assert cross_modal_kd_from_logits(m_s, m_t, terms={"pixel_to_word": 1.0}).item() == inf


def test_fp16_extremes_stay_finite():
    inputs = [(x.sign() * 65504).half() for x in make(12)]
    for similarity in ("scaled_dot", "cosine"):
        for tau in (0.05, 20.0):
            loss = cross_modal_kd(*inputs, similarity=similarity, temperature=tau, terms=ALL)
            assert loss.dtype == torch.float32
            assert torch.isfinite(loss)
    logits = [(torch.rand(2, 6, 4) * 2 - 1).mul(65504).half() for _ in range(2)]
    leaf = logits[0].requires_grad_()
    cross_modal_kd_from_logits(leaf, logits[1], temperature=0.05, terms=ALL).backward()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("term", TERMS)
def test_nan_and_inf_propagate(term, value):
    words, pixels = masks()
    for which in range(4):
        inputs = make(13)
        inputs[which][0, 1, 0] = value
        for similarity in ("scaled_dot", "cosine"):
            got = cross_modal_kd(
                *inputs,
                word_mask=words,
                pixel_mask=pixels,
                terms={term: 1.0},
                similarity=similarity,
                reduction="none",
            )
            assert not torch.isfinite(got[0])
            assert torch.isfinite(got[1])


def test_strided_expanded_and_low_precision_inputs():
    inputs, (words, pixels) = make(14, widths=(4, 4)), masks()
    loss = functools.partial(cross_modal_kd, terms=ALL)
    want = loss(*inputs, word_mask=words, pixel_mask=pixels)
    wide = []
    for x in inputs:
        w = torch.zeros(2, x.shape[1] * 2, x.shape[2] * 3, dtype=x.dtype)
        w[:, ::2, 1::3] = x
        wide.append(w[:, ::2, 1::3])
    torch.testing.assert_close(loss(*wide, word_mask=words, pixel_mask=pixels), want)
    maps = [x.mT.reshape(2, 4, 2, 3).to(memory_format=torch.channels_last) for x in inputs[::2]]
    torch.testing.assert_close(loss(maps[0], inputs[1], maps[1], inputs[3], word_mask=words, pixel_mask=pixels), want)
    one = inputs[3][:1].expand(2, -1, -1)
    row = words[:1].expand(2, -1)
    torch.testing.assert_close(
        loss(*inputs[:3], one, word_mask=row),
        loss(*inputs[:3], one.contiguous(), word_mask=row.contiguous()),
    )
    half = [x.bfloat16() for x in inputs]
    torch.testing.assert_close(loss(*half), loss(*[x.float() for x in half]), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*[x.float() for x in half])
    torch.testing.assert_close(inside, loss(*[x.float() for x in half]), rtol=0, atol=0)


def test_masks_with_one_valid_pixel_and_word():
    inputs = make(15)
    words, pixels = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    words[:, 1] = pixels[:, 2] = True
    # A single choice has probability 1 in both networks: the loss is 0.
    assert cross_modal_kd(*inputs, word_mask=words, pixel_mask=pixels, terms=ALL).item() == 0


def test_module_equals_the_function():
    inputs, (words, pixels) = make(16), masks()
    options = {"similarity": "cosine", "temperature": 0.5, "terms": {"pixel_to_word": 1.0, "word_word": 2.0}}
    module = CrossModalKD(**options)
    torch.testing.assert_close(
        module(*inputs, word_mask=words, pixel_mask=pixels),
        cross_modal_kd(*inputs, word_mask=words, pixel_mask=pixels, **options),
    )
    assert not list(module.parameters())
    assert set(CrossModalKD(return_terms=True, reduction="none")(*inputs)) == set(DEFAULT_TERMS)
