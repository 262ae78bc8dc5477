"""The terms "word_descriptor" and "word_channel" of cross_modal_kd: formula, masks, gradients, errors."""

from __future__ import annotations

import math
from typing import Any

import contract_formulas
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastkd.distill.recipes import pixel_pixel_kd
from fastkd.distill.word_terms import word_channel_kd, word_descriptor_kd
from fastkd.losses import CrossModalKD, channel_kd, cross_modal_kd, cross_modal_kd_from_logits
from fastkd.ops.pixel_word.descriptors import DESCRIPTOR_TERMS, RELATION_TEMPERATURE

B, N, T, D = 3, 6, 4, 5


def inputs(d_t: int = D, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, N, D), (B, T, D), (B, N, d_t), (B, T, d_t)]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    found = {name: torch.rand(B, n, generator=g) < 0.6 for name, n in (("word_mask", T), ("pixel_mask", N))}
    for mask in found.values():
        mask[:, 1] = True
        assert not mask.all()
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.7, (0.7, 2.0)])
@pytest.mark.parametrize("similarity", ["scaled_dot", "cosine"])
def test_formula(similarity: str, temperature: Any, masked: bool) -> None:
    args = inputs()
    options: dict[str, Any] = {"similarity": similarity, "temperature": temperature} | (masks() if masked else {})
    got = cross_modal_kd(
        *args, **options, terms=dict.fromkeys(DESCRIPTOR_TERMS, 1.0), return_terms=True, reduction="none"
    )
    assert list(got) == list(DESCRIPTOR_TERMS)
    for term in DESCRIPTOR_TERMS:
        want = contract_formulas.cross_modal_kd(*args, **options, terms={term: 1.0})
        torch.testing.assert_close(got[term], want)
    terms = {"word_channel": 2.0, "pixel_to_word": 1.0, "word_descriptor": 0.5}
    want = contract_formulas.cross_modal_kd(*args, **options, terms=terms)
    for reduction, value in (("none", want), ("mean", want.mean()), ("sum", want.sum())):
        torch.testing.assert_close(cross_modal_kd(*args, **options, terms=terms, reduction=reduction), value)
        module = CrossModalKD(terms=terms, reduction=reduction, similarity=similarity, temperature=temperature)
        torch.testing.assert_close(module(*args, **(masks() if masked else {})), value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_words_that_hardly_any_pixel_attends_to(dtype: torch.dtype) -> None:
    """A descriptor is a mean of pixels, however small the attention to its word."""
    args = inputs()
    for pixels, words in (args[:2], args[2:]):
        pixels[..., 0] = 10.0
        words[..., 0] = 0.0
        words[:, 2, 0] = 10.0  # the other words receive almost no attention
    options: dict[str, Any] = {"temperature": 0.3, "terms": dict.fromkeys(DESCRIPTOR_TERMS, 1.0)}
    want = log_space_descriptors(args, 0.3)
    got = cross_modal_kd(*(x.to(dtype) for x in args), **options, return_terms=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    kd = channel_kd(*(d.flatten(0, 1).mT[None] for d in want))
    torch.testing.assert_close(got["word_channel"], kd.to(dtype), **tolerance)
    log_p = [(torch.nn.functional.normalize(d, dim=2) @ torch.nn.functional.normalize(d, dim=2).mT) for d in want]
    log_s, log_t = ((e / RELATION_TEMPERATURE).log_softmax(2) for e in log_p)
    kl = (log_t.exp() * (log_t - log_s)).sum(2).mean()
    torch.testing.assert_close(got["word_descriptor"], kl.to(dtype), **tolerance)


def log_space_descriptors(args: list[Tensor], tau: float) -> list[Tensor]:
    found = []
    for v, w in (args[:2], args[2:]):
        log_a = (v @ w.mT / D**0.5 / tau).log_softmax(2)
        assert log_a[..., [0, 1, 3]].max() < -110  # e^-110 is 0 in fp32
        found.append((log_a - log_a.amax(1, keepdim=True)).exp().mT @ v)
        found[-1] /= (log_a - log_a.amax(1, keepdim=True)).exp().sum(1)[..., None]
    return found


def test_words_that_no_pixel_attends_to_have_no_gradient() -> None:
    student, teacher = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(2))
    student[0, ..., 1] = teacher[0, ..., 1] = -math.inf
    pixels = [torch.randn(2, 6, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (2, 3)]
    student.requires_grad_()
    loss = word_descriptor_kd(student, pixels[0], teacher, pixels[1])
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("loss", [word_descriptor_kd, word_channel_kd, pixel_pixel_kd])
def test_half_precision_heads_are_averaged_in_fp32(loss: Any) -> None:
    student, teacher = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(i)) * 8 for i in range(2))
    pixels = [torch.randn(2, 6, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (2, 3)]
    inputs = [x.bfloat16() for x in ((student, pixels[0], teacher, pixels[1]))]
    options: dict[str, Any] = {}
    if loss is pixel_pixel_kd:
        inputs, options = inputs[::2], {"word_mask": (torch.ones(2, 5, dtype=torch.bool),) * 2}
    torch.testing.assert_close(loss(*inputs, **options), loss(*(x.float() for x in inputs), **options))


def test_word_channel_is_channel_kd_of_the_descriptors() -> None:
    pixels, words, *teacher = inputs()
    sides = []
    for v, w in ((pixels, words), teacher):
        a = (v @ w.mT / D**0.5).softmax(2)
        sides.append(((a / a.sum(1, keepdim=True)).mT @ v).mT)  # (B, D, T)
    want = channel_kd(sides[0], sides[1], across_batch=True, temperature=RELATION_TEMPERATURE)
    got = cross_modal_kd(pixels, words, *teacher, terms={"word_channel": 1.0})
    torch.testing.assert_close(got, want)


def test_word_descriptor_takes_other_widths_and_maps() -> None:
    v_s, w_s, v_t, w_t = inputs(d_t=8)
    want = contract_formulas.cross_modal_kd(v_s, w_s, v_t, w_t, terms={"word_descriptor": 1.0})
    v_s, v_t = v_s.mT.unflatten(2, (2, 3)), v_t.mT.unflatten(2, (2, 3))
    pixel_mask = torch.ones(B, 2, 3, dtype=torch.bool)
    got = cross_modal_kd(v_s, w_s, v_t, w_t, terms={"word_descriptor": 1.0}, pixel_mask=pixel_mask, reduction="none")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("term", DESCRIPTOR_TERMS)
def test_first_and_second_derivatives(term: str) -> None:
    """Also by a learned temperature, next to masked words."""
    v, w, *teacher = inputs()
    tau = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"terms": {term: 1.0}, "backend": "reference"} | masks()
    loss = lambda v, w, tau: cross_modal_kd(v, w, *teacher, temperature=tau, **options)
    given = (v[:, :, :2].requires_grad_(), w[:, :, :2].requires_grad_(), tau)
    teacher = [x[:, :, :2] for x in teacher]
    assert gradcheck(loss, given)
    assert gradgradcheck(loss, given)


@pytest.mark.parametrize("term", DESCRIPTOR_TERMS)
@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_masked_values_change_nothing_and_others_propagate(term: str, fill: float) -> None:
    v, w, *teacher = inputs()
    given, options = masks(), {"terms": {term: 1.0}, "reduction": "none"}
    word, pixel = given["word_mask"].unsqueeze(2), given["pixel_mask"].unsqueeze(2)
    want = cross_modal_kd(v, w, *teacher, **given, **options)
    hidden = [x.masked_fill(~m, fill) for x, m in zip((v, w, *teacher), (pixel, word) * 2, strict=True)]
    own = [x.requires_grad_() for x in hidden[:2]]
    got = cross_modal_kd(*own, *hidden[2:], **given, **options)
    torch.testing.assert_close(got, want)
    for gradient, mask in zip(torch.autograd.grad(got.sum(), own), (pixel, word), strict=True):
        assert gradient.isfinite().all()
        assert not gradient.masked_fill(mask, 0).any()
    w = w.clone()
    w[0, 1, 0] = fill
    seen = cross_modal_kd(v, w, *teacher, **given, **options)
    assert seen[0].isnan()
    assert bool(seen[1:].isfinite().all()) == (term == "word_descriptor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_networks_have_loss_0(dtype: torch.dtype) -> None:
    v, w = (x.to(dtype).requires_grad_() for x in inputs()[:2])
    loss = cross_modal_kd(v, w, v.detach(), w.detach(), terms={"word_descriptor": 1.0}, **masks())
    assert loss.item() == 0
    assert max(x.abs().max().item() for x in torch.autograd.grad(loss, (v, w))) < 1e-6


def test_errors() -> None:
    args = inputs(d_t=8)
    with pytest.raises(ValueError, match=r"widths D differ, 5 and 8, but 'word_channel' .*or use 'word_descriptor'"):
        cross_modal_kd(*args, terms={"word_channel": 1.0})
    for term in DESCRIPTOR_TERMS:
        with pytest.raises(ValueError, match=f"terms: '{term}' averages the features of pixels.*call cross_modal_kd"):
            cross_modal_kd_from_logits(torch.randn(2, 6, 4), torch.randn(2, 6, 4), terms={term: 1.0})
        fewer = [*args[:3], args[3][:, :3]]
        with pytest.raises(ValueError, match=f"numbers of words differ, 4 and 3, .*but terms has '{term}'"):
            cross_modal_kd(*fewer, terms={term: 1.0})
