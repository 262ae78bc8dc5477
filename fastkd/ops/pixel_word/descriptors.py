"""Terms of word descriptors: per word the mean of the pixels that attend to it, compared by words and by channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.ops import checks
from fastkd.ops.numerics import compute_dtype, full_precision, normalise_rows
from fastkd.ops.pixel_word.reference import _masked, pixel_word_logits
from fastkd.ops.products import product
from fastkd.ops.relation import relation_unchecked
from fastkd.ops.relation.plan import keeping_pays
from fastkd.ops.softmax_kl.reference import kl
from fastkd.ops.torch_state import savable

DESCRIPTOR_TERMS = ("word_descriptor", "word_channel")
RELATION_TEMPERATURE = 0.1
"""Temperature of the cosines between words, and between channels."""


class Attended(NamedTuple):
    """Pixels of one network, and the logits of their attention to words."""

    logits: Tensor  # (B, N, T)
    pixels: Tensor  # (B, N, D)
    temperature: float | Tensor


def logits_of(
    pixels: Tensor, words: Tensor, similarity: str, word_mask: Tensor | None, pixel_mask: Tensor | None
) -> Tensor:
    """Return the logits M (B, N, T) of pixels (B, N, D) and words (B, T, D), as the other terms compute them."""
    pixels, words = savable(pixels, words)
    dtype = compute_dtype(pixels, words)
    with full_precision(pixels.device):
        return pixel_word_logits(pixels.to(dtype), words.to(dtype), pixel_mask, word_mask, similarity)


def descriptor_terms(
    student: Attended,
    teacher: Attended,
    word_mask: Tensor | None,
    pixel_mask: Tensor | None,
    terms: Sequence[str],
    backend: str,
) -> dict[str, Tensor]:
    """Return the terms (B,) of two networks' word descriptors D (B, T, D_x).

    - "word_descriptor": the mean over valid words of KL(softmax(D̂_T D̂_Tᵀ/0.1) ‖ softmax(D̂_S D̂_Sᵀ/0.1)), each softmax
      over the valid words of the sample;
    - "word_channel": the channel relation of D over the valid words of all samples, one number for the batch. Masked
      words are columns of zeros, which change no cosine.

    Attention, descriptors and the T×T relation are plain torch; ``backend`` computes the relation of the channels, in
    plain torch too if a temperature is learned: the teacher's descriptors then need a gradient, which kernels lack.

    Raises:
        BackendUnavailable: a temperature is learned, and ``backend`` names kernels.
    """
    if checks.differentiates_temperature(backend, student.temperature, teacher.temperature):
        backend = "reference"
    dtype = compute_dtype(*student[:2], *teacher[:2])
    results = {}
    with full_precision(student.logits.device):
        d_s, d_t = (_descriptors(x, dtype, word_mask, pixel_mask) for x in (student, teacher))  # (B, T, D_x)
        if "word_descriptor" in terms:
            rows = _masked(kl(_word_relation(d_s, word_mask), _word_relation(d_t, word_mask)), word_mask, 1)  # (B, T)
            words = rows.shape[1] if word_mask is None else word_mask.sum(1).to(dtype)
            results["word_descriptor"] = rows.sum(1) / words
        if "word_channel" in terms:
            # Contiguous, as kernels that store the C×C matrices usually receive their rows.
            rows_s, rows_t = (d.flatten(0, 1).mT.contiguous().unsqueeze(0) for d in (d_s, d_t))  # (1, D, B·T)
            rows = relation_unchecked(
                rows_s,
                rows_t,
                similarity="cosine",
                distance="kl",
                temperature=RELATION_TEMPERATURE,
                keep=keeping_pays(rows_s, rows_t),
                backend=backend,
            )
            results["word_channel"] = rows.mean().expand(d_s.shape[0])
    return {term: results[term] for term in terms}


def _descriptors(network: Attended, dtype: torch.dtype, word_mask: Tensor | None, pixel_mask: Tensor | None) -> Tensor:
    """Return D (B, T, D): per word the mean of the pixels, weighted by their attention A to it.

    The weights A[i, j] / Σ_i A[i, j] are a softmax of log A over the pixels, so that no attention is too small for
    them. A word that no pixel attends to, such as a masked one, has D = 0.
    """
    logits, pixels = (_masked(x.to(dtype), pixel_mask, 1) for x in savable(*network[:2]))
    logits = _masked(logits, word_mask, 2) / network.temperature
    log_a = torch.log_softmax(_masked(logits, word_mask, 2, -torch.inf), 2)  # (B, N, T)
    log_a = _masked(log_a, pixel_mask, 1, -torch.inf)
    ignored = (log_a == -torch.inf).all(1)  # (B, T)
    share = torch.softmax(_masked(log_a, ~ignored, 2), 1)
    return product(_masked(share, ~ignored, 2).mT, pixels)


def _word_relation(descriptors: Tensor, word_mask: Tensor | None) -> Tensor:
    """Return log softmax over valid words (B, T, T) of the cosines between the words' descriptors."""
    unit = normalise_rows(descriptors)
    return torch.log_softmax(_masked(product(unit, unit.mT) / RELATION_TEMPERATURE, word_mask, 2, -torch.inf), 2)
