"""List the cases of the contract suite: every loss with each of its options, on each backend of its family.

A backend is tested as soon as it is listed in ``fastkd.ops.backends.BACKENDS``, a loss as soon as a ``Case`` here
names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from contract_problems import Case, Size, no_masks
from torch import Tensor

from fastkd import losses
from fastkd.ops import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ALL_TERMS = {"pixel_to_word": 1.0, "word_to_pixel": 0.5, "pixel_pixel": 3.0, "word_word": 2.0}


def _holes(*shape: int, device: torch.device) -> Tensor:
    """Return a mask that is False at every fourth entry, shifted by one per sample, and True at least once in each."""
    index = torch.arange(math.prod(shape[1:])) + torch.arange(shape[0])[:, None]
    mask = index % 4 != 0
    mask[:, -1] |= ~mask.any(1)
    return mask.reshape(shape).to(device)


def _pixels_of(x: Tensor) -> tuple[int, int]:
    return (x.shape[0], x.shape[1]) if x.dim() == 3 else (x.shape[0], x.shape[2] * x.shape[3])


# --- softmax_kl -------------------------------------------------------------------------------------------------------

SOFTMAX_SIZES = {
    "small": (2, 3, 4, 5),
    "one column": (2, 3, 1, 1),
    "a partial vector": (1, 2, 7, 1),
    "several rows in one block": (2, 11, 7, 7),
    "one block exactly": (1, 2, 16, 32),
    "a loop with a tail": (1, 2, 5, 417),  # Triton's blocks have 1024 columns, the C++ ones 1024 (fp64) or 2048
}


def maps(b: int, c: int, h: int, w: int) -> list[tuple[int, ...]]:
    return [(b, c, h, w)] * 2


def _distribution(name: str, options: dict[str, Any] | None = None, sizes: Mapping[str, Size] = SOFTMAX_SIZES) -> Case:
    options = {"temperature": 4.0} | (options or {})
    module_class = losses.ChannelDistributionKD
    return Case(f"channel_distribution_kd {name}", "softmax_kl", losses.channel_distribution_kd, module_class, maps,
                sizes, options)  # fmt: skip


def _logit(name: str, sizes: Mapping[str, Size], mask: bool = False) -> Case:
    masks = lambda args: {"pixel_mask": _holes(args[0].shape[0], *args[0].shape[2:], device=args[0].device)}
    return Case(f"logit_kd {name}", "softmax_kl", losses.logit_kd, losses.LogitKD, maps, sizes,
                {"temperature": 2.0}, masks if mask else no_masks)  # fmt: skip


GUIDED = {"small": (2, 3, 4, 5), "more": (1, 9, 6, 7)}

SOFTMAX_KL = [
    _distribution("plain"),
    _distribution("weight=attention", {"weight": "attention"}, GUIDED),
    _distribution("guide=own", {"guide": "own"}, GUIDED),
    _distribution("guide=teacher", {"guide": "teacher", "temperature": 1.0}, GUIDED),
    _logit("classes", {"small": (2, 4, 3, 2), "many": (2, 19, 4, 5)}),
    _logit("masked", {"small": (2, 4, 3, 2), "many": (2, 19, 4, 5)}, mask=True),
    _logit("one channel", {"small": (2, 1, 3, 2)}),
]

# --- relation ---------------------------------------------------------------------------------------------------------

# Student and teacher maps differ in size. Kernels process 32 to 128 rows per block.
CHANNEL_SIZES = {
    "small": (2, 5, 3, 4, 2, 4),
    "one channel": (1, 1, 2, 3, 2, 3),
    "rows beyond a block": (2, 70, 4, 3, 5, 3),
    "blocks and a tail": (1, 135, 3, 7, 3, 7),
    "wide rows": (1, 3, 19, 29, 19, 29),
}
EVEN_SIZES = {"small": (2, 4, 4, 4, 2, 4), "more": (1, 9, 6, 10, 4, 6)}
# Equal widths; rows with fewer and with more columns than there are rows (narrow rows have a Gram form).
PIXEL_SIZES = {
    "small": (2, 4, 4, 3, 4),
    "one pixel": (2, 4, 4, 1, 1),
    "blocks and a tail": (1, 6, 6, 9, 15),
    "many narrow rows": (1, 4, 4, 18, 25),
    "wide rows": (1, 70, 70, 2, 3),
}
UNEQUAL_SIZES = {"small": (2, 4, 6, 3, 4), "blocks and a tail": (1, 3, 5, 9, 15), "wide rows": (1, 70, 33, 2, 3)}
CROSS_SIZES = {"small": (2, 4, 6, 2, 3), "more": (3, 5, 5, 7, 11)}


def _channel(name: str, sizes: Mapping[str, Size] = EVEN_SIZES, **options: Any) -> Case:
    shapes = lambda b, c, h_s, w_s, h_t, w_t: [(b, c, h_s, w_s), (b, c, h_t, w_t)]
    return Case(f"channel_kd {name}", "relation", losses.channel_kd, losses.ChannelKD, shapes, sizes,
                {"temperature": 0.1 if options.get("similarity", "cosine") == "cosine" else 2.0} | options,
                pools_the_batch=bool(options.get("across_batch")))  # fmt: skip


def _pixel(name: str, sizes: Mapping[str, Size] = PIXEL_SIZES, **options: Any) -> Case:
    shapes = lambda b, c_s, c_t, h, w: [(b, c_s, h, w), (b, c_t, h, w)]
    return Case(f"pixel_relation_kd {name}", "relation", losses.pixel_relation_kd, losses.PixelRelationKD, shapes,
                sizes, {"temperature": 0.1 if options.get("similarity", "cosine") == "cosine" else 2.0} | options,
                pools_the_batch=bool(options.get("cross_image")))  # fmt: skip


RELATION = [
    _channel("kl", CHANNEL_SIZES),
    _channel("kl mean", similarity="mean"),
    _channel("kl dot negate", similarity="dot", negate=True),
    _channel("kl centered", centered=True),
    _channel("kl patches", patches=2),
    _channel("kl across_batch centered", across_batch=True, centered=True),
    _channel("kl weight=attention", weight="attention"),
    _channel("mse", CHANNEL_SIZES, distance="mse"),
    _channel("mse dot", distance="mse", similarity="dot"),
    _channel("row_cosine", CHANNEL_SIZES, distance="row_cosine"),
    _channel("row_cosine mean across_batch", distance="row_cosine", similarity="mean", across_batch=True),
    _pixel("kl"),
    _pixel("kl unequal widths", UNEQUAL_SIZES),
    _pixel("kl dot", similarity="dot"),
    _pixel("kl cross_image", CROSS_SIZES, cross_image=True),
    _pixel("mse", distance="mse"),
    _pixel("mse unequal widths", UNEQUAL_SIZES, distance="mse"),
    _pixel("mse mean cross_image", CROSS_SIZES, distance="mse", similarity="mean", cross_image=True),
    _pixel("row_cosine", distance="row_cosine"),
    _pixel("row_cosine unequal widths", UNEQUAL_SIZES, distance="row_cosine"),
    _pixel("row_cosine dot cross_image", CROSS_SIZES, distance="row_cosine", similarity="dot", cross_image=True),
]

# --- pixel_word -------------------------------------------------------------------------------------------------------

WORD_SIZES = {  # b, n, t, d_s, d_t
    "small": (2, 6, 4, 3, 5),
    "one word": (2, 5, 1, 3, 3),
    "one pixel": (2, 1, 3, 4, 4),
    "more words than a vector": (2, 33, 17, 8, 5),
    "pixels beyond a block": (1, 301, 20, 16, 16),
    "more words than pixels": (1, 40, 70, 6, 9),
}
LOGIT_SIZES = {
    "small": (2, 6, 4),
    "more words than a vector": (2, 33, 17),
    "pixels beyond a block": (1, 301, 20),
    "more words than pixels": (1, 40, 70),
}


def _cross_modal(name: str, sizes: Mapping[str, Size] | None = None, masked: bool = False, **options: Any) -> Case:
    shapes = lambda b, n, t, d_s, d_t: [(b, n, d_s), (b, t, d_s), (b, n, d_t), (b, t, d_t)]
    sizes = sizes or {k: WORD_SIZES[k] for k in ("small", "more words than a vector")}
    masks = lambda args: {
        "word_mask": _holes(*args[1].shape[:2], device=args[1].device),
        "pixel_mask": _holes(*_pixels_of(args[0]), device=args[0].device),
    }
    return Case(f"cross_modal_kd {name}", "pixel_word", losses.cross_modal_kd, losses.CrossModalKD, shapes, sizes,
                {"terms": ALL_TERMS} | options, masks if masked else no_masks)  # fmt: skip


def _from_logits(name: str, sizes: Mapping[str, Size], heads: int | None, masked: bool = False) -> Case:
    shapes = lambda b, n, t: [(b, n, t) if heads is None else (b, heads, n, t)] * 2
    masks = lambda args: {
        "word_mask": _holes(args[0].shape[0], args[0].shape[-1], device=args[0].device),
        "pixel_mask": _holes(args[0].shape[0], args[0].shape[-2], device=args[0].device),
    }
    return Case(f"cross_modal_kd_from_logits {name}", "pixel_word", losses.cross_modal_kd_from_logits, None, shapes,
                sizes, {"terms": ALL_TERMS, "temperature": 0.7}, masks if masked else no_masks)  # fmt: skip


def _other_tokens() -> Case:
    """Return a case of "pixel_pixel" with T_S ≠ T_T."""
    shapes = lambda b, n, t_s, t_t, d: [(b, n, d), (b, t_s, d), (b, n, d), (b, t_t, d)]
    masks = lambda args: {"word_mask": tuple(_holes(*args[i].shape[:2], device=args[i].device) for i in (1, 3))}
    sizes = {"small": (2, 6, 4, 7, 3), "more": (1, 50, 9, 20, 6)}
    return Case("cross_modal_kd other tokens", "pixel_word", losses.cross_modal_kd, losses.CrossModalKD, shapes, sizes,
                {"terms": {"pixel_pixel": 1.0}}, masks)  # fmt: skip


def _descriptors(name: str, sizes: Mapping[str, Size], **terms: float) -> Case:
    """Return a case of terms of word descriptors, in addition to those that kernels compute."""
    case = _cross_modal(f"{name} masked", sizes, masked=True, terms=ALL_TERMS | terms)
    return replace(case, pools_the_batch="word_channel" in terms)


DESCRIPTOR_SIZES = {"small": (2, 6, 4, 3, 5), "more words than a vector": (2, 33, 17, 8, 5)}
EQUAL_WIDTHS = {"small": (2, 6, 4, 3, 3), "more words than a vector": (2, 33, 17, 8, 8)}

PIXEL_WORD = [
    _cross_modal("all", WORD_SIZES),
    _cross_modal("masked", WORD_SIZES, masked=True),
    _cross_modal("cosine masked", masked=True, similarity="cosine", temperature=0.2),
    *(_cross_modal(f"{term}", terms={term: 1.0}, temperature=0.5) for term in ALL_TERMS),
    _descriptors("word_descriptor", DESCRIPTOR_SIZES, word_descriptor=0.5),
    _descriptors("word_channel", EQUAL_WIDTHS, word_channel=2.0),
    _other_tokens(),
    _from_logits("plain", LOGIT_SIZES, None),
    _from_logits("heads masked", {"small": (2, 6, 4), "more words than a vector": (2, 9, 17)}, 3, masked=True),
]

# --- attention_kl -----------------------------------------------------------------------------------------------------

ATTENTION_SIZES = {  # b, heads, n, m, d_s, d_t
    "small": (2, 2, 4, 5, 3, 3),
    "queries beyond a block": (1, 1, 70, 33, 8, 8),
    "wide heads": (1, 2, 9, 19, 33, 17),
}


def _attention(name: str, sizes: Mapping[str, Size], masked: bool = False, **options: Any) -> Case:
    shapes = lambda b, heads, n, m, d_s, d_t: [(b, heads, rows, d) for d in (d_s, d_t) for rows in (n, m)]
    masks = lambda args: {
        f"{rows}_mask": _holes(x.shape[0], x.shape[2], device=x.device)
        for rows, x in zip(("query", "key"), args, strict=False)
    }
    return Case(f"attention_kd {name}", "attention_kl", losses.attention_kd, losses.AttentionKD, shapes, sizes,
                options, masks if masked else no_masks)  # fmt: skip


def _causal_relation_heads() -> Case:
    """Return a case of networks with different numbers of heads, regrouped to two."""
    shapes = lambda b, h_s, h_t, n, more, d: [(b, 2 * h, rows, d) for h in (h_s, h_t) for rows in (n, n + more)]
    sizes = {"small": (2, 1, 3, 4, 1, 2), "more": (1, 2, 1, 68, 9, 3)}
    return replace(_attention("causal relation heads", sizes, causal=True, relation_heads=2), shapes=shapes)


ATTENTION_KL = [
    _attention("plain", ATTENTION_SIZES),
    _attention("masked", {"small": (2, 2, 4, 6, 3, 5), "more": (2, 1, 9, 40, 8, 4)}, True, temperature=0.5),
    _causal_relation_heads(),
]

# --- temperatures in pairs, pixel masks -------------------------------------------------------------------------------


def _masked(case: Case) -> Case:
    """Return the case with a pixel mask, for channel_kd one of each network."""
    pair = case.loss is losses.channel_kd
    masks = lambda args: [_holes(*_pixels_of(x), device=x.device) for x in args]
    return replace(case, masks=lambda args: {"pixel_mask": tuple(masks(args)) if pair else masks(args)[0]})


PAIRED_AND_MASKED = [
    _distribution("pair", {"temperature": (4.0, 1.5)}, GUIDED),
    _masked(_distribution("masked pixels")),
    _masked(_distribution("pair guide weight masked pixels", {"temperature": (1.0, 3.0), "guide": "own",
                                                              "weight": "attention"}, GUIDED)),
    _logit("pair masked", {"small": (2, 4, 3, 2), "many": (2, 19, 4, 5)}, mask=True).at(temperature=(2.0, 0.7)),
    _channel("kl pair", CHANNEL_SIZES, temperature=(0.1, 0.3)),
    _channel("kl pair dot negate patches", similarity="dot", negate=True, patches=2, temperature=(2.0, 1.0)),
    _masked(_channel("kl pair masked pixels", CHANNEL_SIZES, temperature=(0.2, 0.1))),
    _masked(_channel("kl mean centered weight=attention masked pixels", similarity="mean", centered=True,
                     weight="attention")),
    _masked(_channel("mse mean across_batch centered masked pixels", distance="mse", similarity="mean",
                     across_batch=True, centered=True)),
    _masked(_channel("row_cosine masked pixels", CHANNEL_SIZES, distance="row_cosine")),
    _pixel("kl pair unequal widths", UNEQUAL_SIZES, temperature=(0.3, 0.1)),
    _masked(_pixel("kl masked pixels", UNEQUAL_SIZES)),
    _masked(_pixel("kl dot masked pixels", similarity="dot")),
    _masked(_pixel("kl cross_image masked pixels", CROSS_SIZES, cross_image=True, temperature=0.05)),
    _masked(_pixel("kl pair mean cross_image masked pixels", CROSS_SIZES, similarity="mean", cross_image=True,
                   temperature=(1.0, 2.0))),
    _masked(_pixel("mse masked pixels", distance="mse")),
    _masked(_pixel("mse cross_image masked pixels", CROSS_SIZES, distance="mse", cross_image=True)),
    _masked(_pixel("row_cosine dot cross_image masked pixels", CROSS_SIZES, distance="row_cosine", similarity="dot",
                   cross_image=True)),
    _cross_modal("pair masked", masked=True, temperature=(0.5, 2.0)),
    _cross_modal("pair cosine masked", masked=True, similarity="cosine", temperature=(0.2, 0.1)),
    _from_logits("pair masked", LOGIT_SIZES, None, masked=True).at(temperature=(0.7, 2.0)),
    _attention("pair masked", ATTENTION_SIZES, masked=True, temperature=(0.5, 1.5)),
]  # fmt: skip
"""Cases of ``contract/test_pairs_and_masks.py``. They differ from the others in plain torch around the kernels, and in
what reaches these: −inf, zero columns, rows one element wider with large values."""

SIMULATED_PAIRED_AND_MASKED = {
    "channel_distribution_kd masked pixels",
    "channel_kd kl pair masked pixels",
    "pixel_relation_kd kl pair mean cross_image masked pixels",
    "cross_modal_kd pair cosine masked",
}

# --- plain torch ------------------------------------------------------------------------------------------------------

PLAIN = "plain"
"""In place of a family, for losses that are plain torch on every backend."""


def _attended(name: str, **options: Any) -> Case:
    """Return a case of attended maps; those of "cka" differ in width, and have three samples more than their size."""
    pooled = options["distance"] == "cka"
    unequal = lambda b, c, h, w: [(b + 3, c, h, w), (b + 3, c + 2, h, w)]
    sizes = {"small": (2, 3, 4, 2), "more": (4, 9, 6, 7)}
    return Case(f"channel_attention_kd {name}", PLAIN, losses.channel_attention_kd, losses.ChannelAttentionKD,
                unequal if pooled else maps, sizes, {"temperature": 0.1} | options, pools_the_batch=pooled)  # fmt: skip


ATTENDED = [
    _attended("mse", distance="mse"),
    _attended("cosine weight=attention", distance="cosine", weight="attention", gamma=0.5),
    _attended("mse dot negate", distance="mse", similarity="dot", negate=True, temperature=2.0),
    _attended("cka", distance="cka"),
    _attended("cka biased", distance="cka", debiased=False, similarity="mean", gamma=-0.5),
]

CASES = [*SOFTMAX_KL, *RELATION, *PIXEL_WORD, *ATTENTION_KL, *ATTENDED]
BASIC = {case.family: case for case in reversed(CASES)}
"""The first case of each family, for checks that do not depend on the options of a loss."""

ONE_PER_FAMILY = {case.name for case in BASIC.values()}
ONE_PER_LOSS = {case.name for case in {case.loss: case for case in reversed(CASES)}.values()}
REPRESENTATIVE = {
    "channel_distribution_kd plain",
    "logit_kd masked",
    "channel_kd kl",  # rows outermost, cosines, matrices stored
    "channel_kd kl dot negate",  # maxima of unbounded similarities, negation
    "channel_kd mse",
    "channel_kd row_cosine mean across_batch",
    "pixel_relation_kd kl unequal widths",  # rows innermost, cosines, nothing stored
    "pixel_relation_kd kl dot",
    "pixel_relation_kd mse mean cross_image",
    "pixel_relation_kd row_cosine",
    "cross_modal_kd all",
    "cross_modal_kd cosine masked",
    "cross_modal_kd other tokens",
    "cross_modal_kd_from_logits heads masked",
    *(case.name for case in ATTENTION_KL),
}
"""Cases that together reach every branch of the GPU kernels: each distance, rows innermost and outermost, with and
without cosines, negation, image pairs, masks, and every term. The other cases differ only in the torch code around the
kernels, which is the same for every backend."""


# --- places and settings ----------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A backend and the device of its tensors."""

    backend: str
    device: str

    @property
    def is_simulated(self) -> bool:
        """Return whether GPU kernels run on CPU tensors, in Triton's interpreter or built for the host."""
        return self.device == "cpu" and self.backend in ("triton", "cuda")


class Setting(NamedTuple):
    """A case on a backend and a device."""

    case: Case
    place: Place

    def supports(self, dtype: torch.dtype) -> bool:
        """Return whether this backend computes in this dtype."""
        backend, family = dispatch.BACKENDS[self.place.backend], self.case.family
        if family in backend.families_without_kernels or (family == PLAIN and backend.name != "reference"):
            return False
        return dtype != torch.float64 or family not in backend.families_without_fp64

    def covers(self, dtype: torch.dtype) -> bool:
        """Return whether structural tests run this dtype; in simulated kernels bf16 represents fp16 as well."""
        return self.supports(dtype) and not (self.place.is_simulated and dtype == torch.float16)


DEVICES = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": ("cpu", "cuda"), "cuda": ("cpu", "cuda")}
"""Devices of each backend. On CPU tensors Triton kernels are interpreted and CUDA kernels built for the host."""


def places(family: str) -> list[Place]:
    if family == PLAIN:
        return [Place("reference", device) for device in DEVICES["reference"]]
    backends = [b.name for b in dispatch.BACKENDS.values() if family not in b.families_without_kernels]
    return [Place(b, d) for b in backends for d in DEVICES[b]]


INTERPRETED = {
    "channel_kd kl": ("rows beyond a block",),  # matrices stored for the backward
    "channel_kd mse": ("one channel",),
    "channel_kd row_cosine": ("rows beyond a block",),
    "pixel_relation_kd kl unequal widths": ("blocks and a tail",),  # rows innermost, nothing stored
    "cross_modal_kd all": ("more words than a vector",),
}
"""Sizes in addition to "small" that Triton's interpreter runs for relation and pixel_word, where a call takes up to
3 s: one for each dimension in which a kernel exceeds one block. ``ops/test_relation_triton.py`` and
``ops/test_pixel_word_triton.py`` combine options, forms and block edges. A GPU runs every size."""


def settings(cases: Sequence[Case] = CASES) -> list[Setting]:
    found = []
    for case in cases:
        for place in places(case.family):
            if place == ("triton", "cpu") and case.family != "softmax_kl":
                sizes = {size: case.sizes[size] for size in ("small", *INTERPRETED.get(case.name, ()))}
                found.append(Setting(replace(case, sizes=sizes), place))
            else:
                found.append(Setting(case, place))
    return found
