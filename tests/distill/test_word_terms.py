"""Named terms of word descriptors and of channel attention: values, sizes, tokenizers, pooled batches, errors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import contract_formulas
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fastkd import Term, losses
from fastkd.distill import recipe
from fastkd.distill.terms import pools_batch, takes_group, term_value
from fastkd.distill.word_terms import word_channel_kd, word_descriptor_kd
from fastkd.distill.words import check_term
from fastkd.errors import BackendUnavailable

B, T = 3, 4
WORD_LOSSES = {"word_descriptor": word_descriptor_kd, "word_channel": word_channel_kd}


def network(heads: int, channels: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return logits (B, heads, N, T) and a map (B, C, side, side)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return draw(B, heads, side * side, T), draw(B, channels, side, side)


def formula(term: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Return the term from every sample's descriptors (t, C)."""
    sides = []
    for (logits, features), tau in ((student, 0.7), (teacher, 1.5)):
        attention = [(m.mean(0)[:, w] / tau).softmax(1) for m, w in zip(logits, mask, strict=True)]
        sides.append([(a / a.sum(0)).T @ f.flatten(1).T for a, f in zip(attention, features, strict=True)])
    relation = lambda x: contract_formulas.similarities(x, x, "cosine")
    kl = lambda s, t: contract_formulas.kl(relation(s), relation(t), 0.1).mean()
    if term == "word_channel":
        return kl(*(torch.cat(d).T for d in sides))
    return torch.stack([kl(s, t) for s, t in zip(*sides, strict=True)]).mean()


@pytest.mark.parametrize("term", WORD_LOSSES)
def test_value_with_other_heads_and_map_sizes(term: str) -> None:
    """Widths may differ for "word_descriptor"."""
    student, teacher = network(2, 5, 3, 0), network(3, 5 if term == "word_channel" else 7, 4, 1)
    mask = torch.tensor([[True, True, False, True], [True] * T, [False, True, False, False]])
    want = formula(term, student, teacher, mask)
    got = WORD_LOSSES[term](*student, *teacher, word_mask=mask, temperature=(0.7, 1.5))
    torch.testing.assert_close(got, want)
    names = {
        "word_channel": ("pixel_word_logits.0", "decoder_features"),
        "word_descriptor": ("pixel_word_logits.2", "stages.2"),
    }
    outputs = [
        SimpleNamespace(pixel_word_logits=[logits] * 4, decoder_features=features, stages=[features] * 4)
        for logits, features in (student, teacher)
    ]
    [named] = recipe([term])
    assert named.student == names[term]
    named.kwargs = {**named.kwargs, "temperature": (0.7, 1.5)}
    torch.testing.assert_close(term_value(named, *outputs, {"word_mask": mask}), want)


@pytest.mark.parametrize("loss", WORD_LOSSES.values())
def test_learned_temperatures_get_their_whole_gradient(loss: Callable[..., Any]) -> None:
    student, teacher = network(2, 5, 3, 0), network(2, 5, 3, 1)
    own, other = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 1.5))
    assert gradcheck(lambda *taus: loss(*student, *teacher, temperature=taus), (own, other))
    with pytest.raises(BackendUnavailable, match="no gradient with respect to the temperature"):
        loss(*student, *teacher, temperature=own, backend="cpu")


@pytest.mark.parametrize("loss", WORD_LOSSES.values())
def test_terms_that_compare_words_are_refused_for_two_tokenizers(loss: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"'word_(channel|descriptor)' would compare them: only 'pixel_pixel'"):
        check_term("words", loss, {"word_mask": "batch.word_mask"})


def test_terms_that_pool_the_batch() -> None:
    cases: list[tuple[Any, dict[str, Any], bool, bool]] = [
        (losses.channel_attention_kd, {}, True, True),
        (losses.channel_attention_kd, {"distance": "mse"}, False, False),
        (losses.ChannelAttentionKD(), {}, True, True),
        (losses.ChannelAttentionKD(distance="cosine"), {}, False, False),
        (word_channel_kd, {}, True, False),
        (word_descriptor_kd, {}, False, False),
        (losses.cross_modal_kd, {"terms": {"word_channel": 1.0}}, True, False),
        (losses.cross_modal_kd, {}, False, False),
        (losses.CrossModalKD(terms={"word_channel": 1.0}), {}, True, False),
    ]
    for loss, kwargs, pools, group in cases:
        term = Term(loss, "a", kwargs=kwargs)
        assert (pools_batch(term), takes_group(term)) == (pools, group), term
    [attention, words] = recipe(["channel_attention", "word_channel"], group="world")
    assert attention.kwargs == {"group": "world"}
    assert "group" not in words.kwargs


def test_errors() -> None:
    student, teacher = network(2, 5, 3, 0), network(2, 6, 3, 1)
    with pytest.raises(ValueError, match="numbers of channels differ, 5 and 6; select maps of equal width, or use"):
        word_channel_kd(*student, *teacher)
    with pytest.raises(ValueError, match=r"student_logits and student_map: \(B, N\) differ, \(3, 9\) and \(3, 4\)"):
        word_descriptor_kd(student[0], student[1][..., :2, :2], *teacher)
    with pytest.raises(ValueError, match=r"\(B, T\) differ, \(3, 4\) and \(3, 3\); words are compared one by one"):
        word_descriptor_kd(*student, teacher[0][..., :3], teacher[1])
    with pytest.raises(ValueError, match=r"student_logits: expected shape \(B, heads, N, T\), got"):
        word_descriptor_kd(student[0][:, 0], student[1], *teacher)
    with pytest.raises(ValueError, match="teacher_map: requires grad"):
        word_descriptor_kd(*student, teacher[0], teacher[1].requires_grad_())
    with pytest.raises(ValueError, match="word_mask: no valid word in sample"):
        word_descriptor_kd(*student, *student, word_mask=torch.zeros(B, T, dtype=torch.bool))
