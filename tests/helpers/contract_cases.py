"""What the contract suite runs: every loss in each of its variants, on each backend its family has.

A backend enters every test by its entry in ``fastkd.ops.backends.BACKENDS``; a loss or a variant by a ``Case`` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import contract_formulas as formulas
import torch
from torch import Tensor

from fastkd import losses
from fastkd.ops import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ALL_TERMS = {"pixel_to_word": 1.0, "word_to_pixel": 0.5, "pixel_pixel": 3.0, "word_word": 2.0}
Size = tuple[int, ...]
Shapes = Callable[..., list[tuple[int, ...]]]


def _no_masks(args: Sequence[Tensor]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """One loss with one set of options."""

    name: str
    family: str
    loss: Callable[..., Any]
    twin: type[torch.nn.Module] | None
    shapes: Shapes  # size -> shapes of the inputs: the student's, then as many of the teacher's
    sizes: Mapping[str, Size]  # "small", and one for every other regime of the kernels
    options: dict[str, Any] = field(default_factory=dict)
    masks: Callable[[Sequence[Tensor]], dict[str, Any]] = _no_masks
    pools_the_batch: bool = False  # a sample's numbers depend on the other samples

    @property
    def temperature(self) -> float:
        return self.options.get("temperature", 1.0)

    @property
    def has_masks(self) -> bool:
        return self.masks is not _no_masks

    @property
    def is_kl(self) -> bool:
        """Return whether the distance is a KL, which has a temperature."""
        return self.options.get("distance", "kl") == "kl"

    @property
    def has_cosines(self) -> bool:
        return self.options.get("similarity", "cosine" if self.family == "relation" else "") == "cosine"

    @property
    def takes_logits(self) -> bool:
        """Return whether the inputs go straight into a softmax, so that −inf means "impossible"."""
        if self.options.get("weight"):
            return False
        return self.loss is losses.cross_modal_kd_from_logits or (
            self.family == "softmax_kl" and not self.options.get("guide")
        )

    @property
    def has_equal_shapes(self) -> bool:
        """Return whether the teacher's inputs have the shapes of the student's."""
        shapes = self.shapes(*self.sizes["small"])
        n = len(shapes) // 2
        return shapes[:n] == shapes[n:]

    def at(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)

    def problem(
        self,
        size: str = "small",  # or "tiny", for what runs once per input element
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        scale: float = 1.0,
        seed: int = 0,
    ) -> Problem:
        chosen = tuple(min(n, 2) for n in self.sizes["small"]) if size == "tiny" else self.sizes[size]
        return self.problem_of(chosen, dtype=dtype, device=device, scale=scale, seed=seed)

    def problem_of(self, size: Size, *, dtype: torch.dtype, device: str, scale: float = 1.0, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda shape: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        args = [draw(shape).to(device, dtype) for shape in self.shapes(*size)]
        return Problem(self, args, self.masks(args))


@dataclass
class Problem:
    """A case with its inputs."""

    case: Case
    args: list[Tensor]
    masks: dict[str, Any]

    @property
    def students(self) -> int:
        return len(self.args) // 2

    @property
    def options(self) -> dict[str, Any]:
        return self.case.options | self.masks

    def replaced(self, *args: Tensor) -> Problem:
        return Problem(self.case, list(args), self.masks)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return self.replaced(*(change(x) for x in self.args))

    def leaves(self) -> Problem:
        """The same with student inputs that require grad."""
        own = [x.detach().requires_grad_(i < self.students) for i, x in enumerate(self.args)]
        return self.replaced(*own)

    def loss(self, backend: str, reduction: str = "none", **more: Any) -> Tensor:
        return self.case.loss(*self.args, **self.options, reduction=reduction, backend=backend, **more)

    def run(self, backend: str, weight: Tensor | None = None) -> list[Tensor]:
        """Per-row losses, and the gradients of their weighted sum with respect to each of the student's inputs."""
        return self._differentiated(lambda p: p.loss(backend), weight)

    def plain(self, weight: Tensor | None = None) -> list[Tensor]:
        """The same by the formula that a user writes, in the inputs' dtype."""
        return self._differentiated(Problem.formula, weight)

    def formula(self) -> Tensor:
        return getattr(formulas, self.case.loss.__name__)(*self.args, **self.options)

    def exact(self, weight: Tensor | None = None) -> list[Tensor]:
        """The same in fp64 on the CPU: the oracle."""
        masks = {k: tuple(m.cpu() for m in v) if isinstance(v, tuple) else v.cpu() for k, v in self.masks.items()}
        exact = Problem(self.case, [x.detach().cpu().double() for x in self.args], masks)
        return exact.plain(None if weight is None else weight.cpu().double())

    def _differentiated(self, loss: Callable[[Problem], Tensor], weight: Tensor | None) -> list[Tensor]:
        leaves = self.leaves()
        rows = loss(leaves)
        weight = torch.ones_like(rows) if weight is None else weight.to(rows.device, rows.dtype)
        return [rows.detach(), *torch.autograd.grad(rows, leaves.args[: self.students], weight)]

    def weight(self) -> Tensor:
        """A gradient for each row, none like another."""
        with torch.no_grad():
            shape = self.formula().shape
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (drawn + 0.25).to(self.args[0].device)

    def assert_near(self, got: Sequence[Tensor], want: Sequence[Tensor], ulps: float = 8, least: float = 1e-6) -> None:
        """Equal but for the order in which fp32 sums are taken: ``ulps`` roundings of the largest summand.

        ``got`` and ``want`` are the losses and gradients, or the gradients alone; ``least`` bounds from below the size
        of what cancels in a gradient that vanishes.
        """
        assert len(got) == len(want)
        n = self.students
        largest = max(least, *(x.detach().abs().max().item() for x in want[-n:]))
        sizes = [self.magnitude()] * (len(want) - n) + [self.condition() * largest] * n
        for a, b, size in zip(got, want, sizes, strict=True):
            allowed = (
                ulps * size * torch.finfo(torch.float32).eps / 2 + torch.finfo(a.dtype).eps * b.detach().abs().max()
            )
            torch.testing.assert_close(
                a.detach().cpu().double(), b.detach().cpu().double(), rtol=0, atol=allowed.item()
            )

    # How many digits fp32 arithmetic can give here, whoever computes: used for the hard ceilings.

    def condition(self) -> float:
        """The size of the logarithms whose difference the loss is, or of the largest similarity."""
        peak, entries = self._peak()
        distance = self.case.options.get("distance", "kl")
        return peak / self.case.temperature + math.log(entries) + 1 if distance == "kl" else 4.0

    def slope(self) -> float:
        """How far a softmax's rounding moves a gradient: the largest input over τ."""
        return max(x.abs().max().item() for x in self.args) / self.case.temperature

    def magnitude(self) -> float:
        """The size of the largest summand of a row's loss."""
        options, loss = self.case.options, self.condition()
        if options.get("distance", "kl") != "kl":
            return 4 * self._peak()[0] ** 2 if options["distance"] == "mse" else 4.0
        if self.case.family != "relation":
            loss *= max(self.case.temperature**2, 1.0) * sum(options.get("terms", {"": 1.0}).values())
        return loss * (self.args[0].shape[1] if "weight" in options else 1)  # attention weights are at most C

    def _peak(self) -> tuple[float, int]:
        """The largest logit or similarity, and how many of them a softmax sums."""
        args, n = [x.double().cpu() for x in self.args], self.students
        if self.case.family == "softmax_kl" or self.case.loss is losses.cross_modal_kd_from_logits:
            return max(x.abs().max().item() for x in args), max(x.numel() // x.shape[0] for x in args)
        kind = self.case.options.get("similarity", "cosine" if self.case.family == "relation" else "scaled_dot")
        entries = max(x.numel() // x.shape[0] for x in args)
        if kind == "cosine":
            return 1.0, entries
        if self.case.family == "pixel_word":
            rows = [x.flatten(2).mT if x.dim() == 4 else x for x in args]
            pairs = [(rows[0], rows[1]), (rows[n], rows[n + 1])]
            return max((v @ w.mT).abs().max().item() / v.shape[-1] ** 0.5 for v, w in pairs), entries
        rows = [x.flatten(2) for x in args]
        rows = [x.mT for x in rows] if self.case.loss is losses.pixel_relation_kd else rows
        if self.case.options.get("across_batch"):
            rows = [x.transpose(0, 1).flatten(1) for x in rows]
        return max((x.square().mean if kind == "mean" else x.square().sum)(-1).max().item() for x in rows), entries


def _holes(*shape: int, device: torch.device) -> Tensor:
    """A mask with its first and every fourth entry missing, other ones in every sample; never empty."""
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
    twin = losses.ChannelDistributionKD
    return Case(f"channel_distribution_kd {name}", "softmax_kl", losses.channel_distribution_kd, twin, maps, sizes,
                options)  # fmt: skip


def _logit(name: str, sizes: Mapping[str, Size], mask: bool = False) -> Case:
    masks = lambda args: {"pixel_mask": _holes(args[0].shape[0], *args[0].shape[2:], device=args[0].device)}
    return Case(f"logit_kd {name}", "softmax_kl", losses.logit_kd, losses.LogitKD, maps, sizes,
                {"temperature": 2.0}, masks if mask else _no_masks)  # fmt: skip


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

# Student's and teacher's maps differ in size. The block of rows that a kernel takes at a time is 32 to 128.
CHANNEL_SIZES = {
    "small": (2, 5, 3, 4, 2, 4),
    "one channel": (1, 1, 2, 3, 2, 3),
    "rows beyond a block": (2, 70, 4, 3, 5, 3),
    "blocks and a tail": (1, 135, 3, 7, 3, 7),
    "wide rows": (1, 3, 19, 29, 19, 29),
}
EVEN_SIZES = {"small": (2, 4, 4, 4, 2, 4), "more": (1, 9, 6, 10, 4, 6)}
# Widths that agree and that don't, rows narrower and wider than their number (narrow ones have a Gram form).
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
                {"terms": ALL_TERMS} | options, masks if masked else _no_masks)  # fmt: skip


def _from_logits(name: str, sizes: Mapping[str, Size], heads: int | None, masked: bool = False) -> Case:
    shapes = lambda b, n, t: [(b, n, t) if heads is None else (b, heads, n, t)] * 2
    masks = lambda args: {
        "word_mask": _holes(args[0].shape[0], args[0].shape[-1], device=args[0].device),
        "pixel_mask": _holes(args[0].shape[0], args[0].shape[-2], device=args[0].device),
    }
    return Case(f"cross_modal_kd_from_logits {name}", "pixel_word", losses.cross_modal_kd_from_logits, None, shapes,
                sizes, {"terms": ALL_TERMS, "temperature": 0.7}, masks if masked else _no_masks)  # fmt: skip


def _other_tokens() -> Case:
    """pixel_pixel with T_S ≠ T_T."""
    shapes = lambda b, n, t_s, t_t, d: [(b, n, d), (b, t_s, d), (b, n, d), (b, t_t, d)]
    masks = lambda args: {"word_mask": tuple(_holes(*args[i].shape[:2], device=args[i].device) for i in (1, 3))}
    sizes = {"small": (2, 6, 4, 7, 3), "more": (1, 50, 9, 20, 6)}
    return Case("cross_modal_kd other tokens", "pixel_word", losses.cross_modal_kd, losses.CrossModalKD, shapes, sizes,
                {"terms": {"pixel_pixel": 1.0}}, masks)  # fmt: skip


PIXEL_WORD = [
    _cross_modal("all", WORD_SIZES),
    _cross_modal("masked", WORD_SIZES, masked=True),
    _cross_modal("cosine masked", masked=True, similarity="cosine", temperature=0.2),
    *(_cross_modal(f"{term}", terms={term: 1.0}, temperature=0.5) for term in ALL_TERMS),
    _other_tokens(),
    _from_logits("plain", LOGIT_SIZES, None),
    _from_logits("heads masked", {"small": (2, 6, 4), "more words than a vector": (2, 9, 17)}, 3, masked=True),
]

CASES = [*SOFTMAX_KL, *RELATION, *PIXEL_WORD]
BASIC = {case.family: case for case in reversed(CASES)}
"""The first case of each family, for what does not depend on a loss's options."""

ONE_PER_FAMILY = {case.name for case in BASIC.values()}
ONE_PER_LOSS = {case.name for case in {case.loss: case for case in reversed(CASES)}.values()}
REPRESENTATIVE = {
    "channel_distribution_kd plain",
    "logit_kd masked",
    "channel_kd kl",  # rows outermost, cosines, matrices stored
    "channel_kd kl dot negate",  # maxima of unbounded similarities, a sign
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
}
"""Cases that together reach every branch of the GPU kernels: each distance with rows innermost and outermost, with and
without cosines, sign, pairs of images and masks, every term. The other cases repeat these branches with other work in
torch around the kernels, which does not depend on the backend."""


# --- where they run ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A backend and the device its tensors live on."""

    backend: str
    device: str

    @property
    def is_simulated(self) -> bool:
        """Return whether a GPU's kernels run on CPU tensors, in Triton's interpreter or built for the host."""
        return self.device == "cpu" and self.backend in ("triton", "cuda")


class Setting(NamedTuple):
    """A case, and where it runs."""

    case: Case
    place: Place

    def takes(self, dtype: torch.dtype) -> bool:
        """Return whether this backend computes in this dtype."""
        without_fp64 = dispatch.BACKENDS[self.place.backend].families_without_fp64
        return dtype != torch.float64 or self.case.family not in without_fp64

    def uses(self, dtype: torch.dtype) -> bool:
        """Return whether this dtype is a code path of its own: simulated kernels treat fp16 as they treat bf16."""
        return self.takes(dtype) and not (self.place.is_simulated and dtype == torch.float16)


DEVICES = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": ("cpu", "cuda"), "cuda": ("cpu", "cuda")}
"""On CPU tensors Triton's kernels are interpreted, and CUDA's are built for the host (``emulation.py``)."""


def places(family: str) -> list[Place]:
    return [Place(b, d) for b in dispatch.BACKENDS for d in DEVICES[b]]


INTERPRETED = {
    "channel_kd kl": ("rows beyond a block",),  # matrices kept for the backward
    "channel_kd mse": ("one channel",),
    "channel_kd row_cosine": ("rows beyond a block",),
    "pixel_relation_kd kl unequal widths": ("blocks and a tail",),  # columns outside, nothing kept
    "cross_modal_kd all": ("more words than a vector",),
}
"""The sizes beside "small" that Triton's interpreter runs, of families where a call takes up to 3 s in it: one for each
way that a kernel goes beyond one block. "small" has every case go through its kernels in one block; all ways, options
and edges of blocks are crossed in ``test_relation_triton.py`` and ``testpixel_word_triton.py``. On a GPU every size
runs."""


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
