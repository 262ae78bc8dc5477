"""Named distillation terms for pairs of `fastkd.models`, as used by `fastkd distill --terms` and the demo."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from fastkd import losses
from fastkd._messages import suggestion
from fastkd.distill.attention_taps import tapped_attention_kd
from fastkd.distill.terms import Term, takes_group
from fastkd.distill.word_terms import word_channel_kd, word_descriptor_kd
from fastkd.ops.numerics import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_WORDS = {"word_mask": "batch.word_mask"}


def _first_order() -> Term:
    terms = {"pixel_to_word": 1.0, "word_to_pixel": 1.0}
    return Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", kwargs={**_WORDS, "terms": terms})


def _second_order() -> Term:
    terms = {"pixel_pixel": 1.0, "word_word": 1.0}
    return Term(losses.cross_modal_kd_from_logits, "pixel_word_logits.*", kwargs={**_WORDS, "terms": terms})


def _channel_distribution() -> Term:
    return Term(losses.channel_distribution_kd, "decoder_features")


def _guided_channel_distribution() -> Term:
    return Term(losses.channel_distribution_kd, "decoder_features", kwargs={"guide": "teacher"})


def _channel() -> Term:
    return Term(losses.channel_kd, "decoder_features", kwargs={"across_batch": True, "centered": True})


def _channel_attention() -> Term:
    return Term(losses.channel_attention_kd, "decoder_features")


def _word_channel() -> Term:
    return Term(word_channel_kd, ("pixel_word_logits.0", "decoder_features"), kwargs=_WORDS)


def _word_descriptor() -> Term:
    return Term(word_descriptor_kd, ("pixel_word_logits.2", "stages.2"), kwargs=_WORDS)


def _attention() -> Term:
    return Term(tapped_attention_kd, "attention")


def _pixel_relation() -> Term:
    return Term(losses.pixel_relation_kd, "stages.2")


def _feature() -> Term:
    return Term(losses.feature_kd, "decoder_features", kwargs={"distance": "cosine"})


def _logit() -> Term:
    return Term(losses.logit_kd, "decoder")


def _mask() -> Term:
    return Term(losses.logit_kd, "logits")


def _pixel_pixel() -> Term:
    masks = ("student.word_mask", "teacher.word_mask")
    return Term(pixel_pixel_kd, "pixel_word_logits.-1", kwargs={"word_mask": masks})


def pixel_pixel_kd(student: Tensor, teacher: Tensor, *, word_mask: tuple[Tensor, Tensor]) -> Tensor:
    """Return the "pixel_pixel" loss of two networks with different words, numbers of heads or map sizes.

    Heads are averaged and the teacher's logits resized bilinearly to the student's square map. The loss then compares
    which pixels attend to the same words.

    Args:
        student: (B, heads, N, T) pixel–word logits of a square map.
        teacher: the same, with its own numbers of heads, pixels and words.
        word_mask: masks (B, T) of the student's and of the teacher's words.

    Raises:
        ValueError: a map that is not square.
    """
    dtype = compute_dtype(student, teacher)
    ours, theirs = student.to(dtype).mean(1), teacher.to(dtype).mean(1)  # (B, N, T)
    if ours.shape[1] != theirs.shape[1]:
        theirs = F.interpolate(_square(theirs), size=_square(ours).shape[-2:], mode="bilinear", align_corners=False)
        theirs = theirs.flatten(2).mT  # (B, N, T) with the student's N
    value = losses.cross_modal_kd_from_logits(ours, theirs, word_mask=word_mask, terms={"pixel_pixel": 1.0})
    assert isinstance(value, Tensor)
    return value


def _square(logits: Tensor) -> Tensor:
    """Return logits (B, N, T) as (B, T, √N, √N)."""
    side = math.isqrt(logits.shape[1])
    if side * side != logits.shape[1]:
        raise ValueError(f"pixel_pixel needs square maps to resize, got {logits.shape[1]} pixels: use square images")
    return logits.mT.unflatten(2, (side, side))


TERMS: dict[str, tuple[Callable[[], Term], str]] = {
    "first_order": (_first_order, "pixel–word attention at every fused stage: cross_modal_kd_from_logits, both KLs"),
    "second_order": (
        _second_order,
        "Gram matrices of that attention: cross_modal_kd_from_logits, pixel_pixel and word_word",
    ),
    "channel_distribution": (_channel_distribution, "channel_distribution_kd on the decoder's last map"),
    "guided_channel_distribution": (
        _guided_channel_distribution,
        "the same on maps mixed by the teacher's channel attention (guide='teacher')",
    ),
    "channel": (_channel, "channel_kd on the decoder's last map, pooled over the batch and centred"),
    "channel_attention": (
        _channel_attention,
        "channel_attention_kd on the decoder's last map, by CKA over the batch: any widths, at least 4 samples",
    ),
    "word_channel": (
        _word_channel,
        "channels of the decoder's last map, averaged by the finest stage's attention to each word of the batch",
    ),
    "word_descriptor": (
        _word_descriptor,
        "words related by what they attend to at the third fused stage: any widths, heads and map sizes",
    ),
    "pixel_relation": (_pixel_relation, "pixel_relation_kd on the third fused stage"),
    "feature": (_feature, "feature_kd on the decoder's last map, by the cosine of every pixel"),
    "attention": (_attention, "attention_kd on the taps named 'attention', AttentionTaps of both networks"),
    "logit": (_logit, "logit_kd on the decoder's two-channel map"),
    "mask": (_mask, "logit_kd on the logits at the image's size; works with any teacher"),
    "pixel_pixel": (
        _pixel_pixel,
        "relations of pixels through words at the last fused stage; tokenizers, heads and sizes may differ",
    ),
}
"""Term name to its factory and description. "channel", "word_channel", the channel distributions and "feature" need the
same decoder width on both sides."""


def recipe(names: Sequence[str], *, group: ProcessGroup | str | None = None) -> list[Term]:
    """Return the named terms with weight 1; balance them with `Distiller.balance`.

    Args:
        names: names of `TERMS`.
        group: processes over which terms that compare samples with each other ("channel" and "channel_attention") pool
            their batches, "world" for all of a data-parallel run: see `fastkd.losses.channel_kd`.

    Raises:
        ValueError: an unknown name; the message suggests others.

    Example:
        >>> distiller = Distiller(student, teacher, segmentation_loss, recipe(["first_order", "logit"]))
        >>> distiller.balance(batch, {"first_order": 0.5, "logit": 0.2})
    """
    found = []
    for name in names:
        if name not in TERMS:
            raise ValueError(f"terms: no term named {name!r}.{suggestion(name, TERMS)}")
        term = TERMS[name][0]()
        term.name = name
        if group is not None and takes_group(term):
            term.kwargs = {**term.kwargs, "group": group}
        found.append(term)
    return found
