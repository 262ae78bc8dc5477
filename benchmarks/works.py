"""What is measured: the works of each family with their targets, and the providers that compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import formulas
import torch
from torch import Tensor

from fastkd.ops import _backends

Step = Callable[[], Any]
MODES = ("forward", "both")


@dataclass(frozen=True)
class Target:
    """What forward and backward must reach: times faster than a provider, and extra memory (a key of MEMORY)."""

    eager: float | None = None
    compile: float | None = None
    eager_nn: float | None = None
    memory: str | None = None


@dataclass(frozen=True)
class Work:
    """One loss at one shape and dtype. Shapes are (B, C, H, W), and (B, N, T, D) for cross_modal_kd."""

    family: str
    loss: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    distance: str = ""
    teacher_width: int | None = None  # if it is not the student's
    maps: bool = False  # cross_modal_kd: pixels as (B, D, H, W) maps, else as (B, N, D) tokens
    target: Target = field(default=Target(), compare=False)

    @property
    def name(self) -> str:
        sizes = [str(n) for n in self.shape]
        if self.teacher_width is not None:
            sizes[1] += f"to{self.teacher_width}"
        parts = [self.loss, self.distance, "x".join(sizes), "maps" if self.maps else "", self.dtype_name]
        return " ".join(part for part in parts if part)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def relation_sizes(self) -> tuple[int, int, int, int]:
        """B, R rows, and the widths K of the student's and the teacher's rows."""
        b, c, h, w = self.shape
        if self.loss == "channel_kd":
            return b, c, h * w, h * w
        return b, h * w, c, self.teacher_width or c

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Fresh random features: never zeros, which can run faster and hide what was not written."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, student: bool) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype).requires_grad_(student)

        if self.family == "pixel_word":
            b, n, t, d = self.shape
            side = round(n**0.5)
            pixels = (b, d, side, side) if self.maps else (b, n, d)
            return tuple(random(*shape, student=s) for s in (True, False) for shape in (pixels, (b, t, d)))
        b, c, *rest = self.shape
        return random(b, c, *rest, student=True), random(b, self.teacher_width or c, *rest, student=False)


def _gradient_bytes(work: Work) -> int:
    size = torch.empty((), dtype=work.dtype).element_size()
    if work.family == "pixel_word":
        b, n, t, d = work.shape
        return b * (n + t) * d * size
    return torch.Size(work.shape).numel() * size


def _rows(work: Work) -> int:
    return work.shape[1] if work.loss in ("channel_kd", "cross_modal_kd") else work.shape[2] * work.shape[3]


MEMORY: dict[str, Callable[[Work, int], float]] = {
    "gradient + 1 MiB": lambda work, eager: _gradient_bytes(work) + 2**20,
    "5 % of eager": lambda work, eager: 0.05 * eager,
    "1 % of eager": lambda work, eager: 0.01 * eager,
    "no NxN": lambda work, eager: 4 * _rows(work) ** 2,  # less than one such matrix in fp32
    "gradient + 3 CxC": lambda work, eager: _gradient_bytes(work) + 3 * 4 * work.shape[0] * work.shape[1] ** 2,
}
"""The bytes that a call may allocate at most beyond what lived before, given eager's."""

_KL = ("relation", "pixel_relation_kd")
_CWD = Target(6, 2.7, memory="gradient + 1 MiB")
_CHANNELS = Target(2, 1.5, memory="gradient + 3 CxC")
_WORDS, _FEW_WORDS = Target(3, 3, 300, "no NxN"), Target(2, 1.7)

WORKS: dict[str, list[Work]] = {
    "softmax_kl": [
        Work("softmax_kl", "channel_distribution_kd", shape, target=_CWD)
        for shape in [(8, 512, 30, 30), (8, 128, 120, 120), (4, 1024, 15, 15)]
    ],
    "relation": [
        Work(*_KL, (2, 128, 60, 60), distance="kl", target=Target(6, 3, memory="5 % of eager")),
        Work(*_KL, (1, 64, 120, 120), distance="kl", target=Target(9, 3.3, memory="1 % of eager")),
        Work(*_KL, (8, 256, 30, 30), distance="kl", target=Target(2.2, 1.8)),
        Work(*_KL, (4, 256, 60, 60), distance="mse", teacher_width=128, target=Target(5, 3, memory="no NxN")),
        *(
            Work("relation", "channel_kd", shape, distance="kl", target=_CHANNELS)
            for shape in [(8, 512, 30, 30), (4, 1024, 15, 15), (8, 128, 60, 60)]
        ),
    ],
    "pixel_word": [
        Work("pixel_word", "cross_modal_kd", (4, 14400, 20, 128), target=_WORDS),
        Work("pixel_word", "cross_modal_kd", (8, 900, 20, 512), target=_FEW_WORDS),
        Work("pixel_word", "cross_modal_kd", (4, 14400, 20, 128), maps=True, target=replace(_WORDS, eager_nn=None)),
        Work("pixel_word", "cross_modal_kd", (8, 900, 20, 512), maps=True, target=_FEW_WORDS),
    ],
}
"""The works of each family on a CPU."""

GPU_SHAPES = [(32, 512, 30, 30), (16, 512, 60, 60), (16, 128, 120, 120), (8, 512, 30, 30), (4, 1024, 15, 15)]
GPU_WORKS: dict[str, list[Work]] = {
    "softmax_kl": [Work("softmax_kl", "channel_distribution_kd", shape) for shape in GPU_SHAPES]
}

TRAINED_IN = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}


def works(family: str, device_type: str, dtypes: tuple[torch.dtype, ...] | None = None) -> list[Work]:
    """The works of a family on a kind of device; a family without any there has an empty list."""
    table = GPU_WORKS if device_type == "cuda" else WORKS
    return [replace(work, dtype=dtype) for dtype in dtypes or TRAINED_IN[device_type] for work in table.get(family, [])]


def own(family: str, device_type: str) -> list[str]:
    """fastkd's kernels on a kind of device, whether or not this family has them yet."""
    names = [b for b in _backends.PREFERENCE[device_type] if b != "reference"]
    return [b for b in names if b in _backends.IMPLEMENTED[family]] or names[:1]


def providers(work: Work, device_type: str) -> list[str]:
    """Who may compute a work on a kind of device, whether or not it works here."""
    nn = ["eager_nn"] if work.target.eager_nn is not None else []
    return [*nn, "eager", "compile", "reference", *own(work.family, device_type)]


def unavailable(provider: str, family: str, device: str) -> str | None:
    """Why a provider cannot be measured here, or None."""
    if provider in ("eager_nn", "eager", "compile"):
        return None
    if provider not in _backends.IMPLEMENTED[family]:
        return f"{family} has no {provider} backend yet"
    return _backends.why_not(provider, family, device)


def loss_of(work: Work, provider: str) -> formulas.Loss:
    """The loss as a function of the work's inputs."""
    if provider in ("eager_nn", "eager"):
        return formulas.formula(work, nn=provider == "eager_nn")
    if provider == "compile":
        return torch.compile(formulas.formula(work), fullgraph=True, dynamic=False)
    return formulas.fastkd(work, provider)


def step_of(
    work: Work, provider: str, mode: str, inputs: tuple[Tensor, ...], loss: formulas.Loss | None = None
) -> Step:
    """One call to time: "forward" under no_grad, or "both" forward and backward."""
    loss = loss or loss_of(work, provider)

    def forward() -> Any:
        with torch.no_grad():
            return loss(*inputs)

    def both() -> Any:
        return formulas.gradients(loss, inputs)

    if provider == "eager_nn":
        return _by_sample(work, inputs, loss, mode)
    return {"forward": forward, "both": both}[mode]


def _by_sample(work: Work, inputs: tuple[Tensor, ...], loss: formulas.Loss, mode: str) -> Step:
    """The same sample by sample: N×N matrices of a whole batch would not fit."""
    samples = [
        tuple(x.detach()[b : b + 1].clone().requires_grad_(x.requires_grad) for x in inputs)
        for b in range(work.shape[0])
    ]

    def step() -> Any:
        if mode == "both":
            parts = [formulas.gradients(loss, sample) for sample in samples]
            return [torch.cat(part) / len(samples) for part in zip(*parts, strict=True)]
        with torch.no_grad():
            return [loss(*sample) for sample in samples]

    return step
