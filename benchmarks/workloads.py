"""What is measured: the works of each family with their targets, and the providers that compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import formulas
from fastkd.ops import dispatch

Step = Callable[[], Any]


@dataclass(frozen=True)
class Target:
    """What forward and backward must reach: times faster than a provider, extra memory (a key of MEMORY), and a share.

    The share is of the work's limit, or of what the machine copies or multiplies in the same time (``of``).
    """

    eager: float | None = None
    compile: float | None = None
    eager_nn: float | None = None
    memory: str | None = None
    share: float = 0.5
    of: str = "limit"


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
    autocast: bool = False  # on a GPU, to its dtype: the plain formulas' softmaxes are fp32 then
    small: bool = False  # launches are what takes the time: the target is the CUDA graph's
    modes: tuple[str, ...] = ("forward", "both")
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
    def judged(self) -> str:
        """Return the mode to which the targets apply."""
        return "graph" if self.small else "both"

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
    "64 MiB": lambda work, eager: 64 * 2**20,
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

_COPY, _ROWS_COPY = (Target(5, compile, share=share, of="copy") for compile, share in ((1.5, 0.8), (2, 0.7)))
_PRODUCT = Target(2.5, 1.8, share=0.35, of="product")
_PIXELS = Target(4, 2.5, memory="64 MiB", share=0.35, of="product")
_NO_SLOWER = Target(1, share=0)
GPU_WORKS: dict[str, list[Work]] = {
    "softmax_kl": [
        *(
            Work("softmax_kl", "channel_distribution_kd", shape, target=_COPY)
            for shape in [(32, 512, 30, 30), (16, 512, 60, 60), (16, 128, 120, 120)]
        ),
        Work("softmax_kl", "channel_distribution_kd", (2, 64, 15, 15), small=True, target=_NO_SLOWER),
    ],
    "relation": [
        *(
            Work("relation", "channel_kd", shape, distance="kl", target=_PRODUCT)
            for shape in [(32, 512, 30, 30), (16, 512, 60, 60), (32, 1024, 15, 15)]
        ),
        *(Work(*_KL, shape, distance="kl", target=_PIXELS) for shape in [(8, 256, 60, 60), (2, 128, 120, 120)]),
        Work("relation", "channel_kd", (2, 64, 15, 15), distance="kl", small=True, target=_NO_SLOWER),
        Work(*_KL, (2, 64, 15, 15), distance="kl", small=True, target=_NO_SLOWER),
    ],
    "pixel_word": [
        *(
            Work("pixel_word", "cross_modal_kd", shape, target=_ROWS_COPY)
            for shape in [(16, 14400, 20, 128), (32, 3600, 20, 256)]
        ),
        Work("pixel_word", "cross_modal_kd", (2, 225, 20, 64), small=True, target=_NO_SLOWER),
    ],
}
"""The works of each family on a GPU."""

GPU_MODES = ("forward", "both", "graph")
FIRST = [
    ("pixel_relation_kd", (8, 256, 60, 60)),
    ("cross_modal_kd", (16, 14400, 20, 128)),
    ("channel_kd", (32, 512, 30, 30)),
    ("channel_distribution_kd", (16, 512, 60, 60)),
    ("pixel_relation_kd", (2, 128, 120, 120)),
    ("channel_kd", (32, 1024, 15, 15)),
]
"""The most valuable works on a GPU, in order; the others follow."""

SWEEPS = ("own", "compile", "autotune")
"""The sweeps over all works, in order: fastkd's kernels first, then what takes minutes to compile. Each has eager."""

TRAINED_IN = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}


def works(family: str, device_type: str, dtypes: tuple[torch.dtype, ...] | None = None) -> list[Work]:
    """The works of a family on a kind of device; a family without any there has an empty list."""
    gpu = device_type == "cuda"
    return [
        replace(work, dtype=dtype, autocast=gpu and dtype.itemsize == 2, modes=GPU_MODES if gpu else work.modes)
        for dtype in dtypes or TRAINED_IN[device_type]
        for work in (GPU_WORKS if gpu else WORKS).get(family, [])
    ]


def by_value(device_type: str, dtypes: tuple[torch.dtype, ...] | None = None) -> list[Work]:
    """Return the works of all families in order of value."""
    found = [work for family in WORKS for work in works(family, device_type, dtypes)]
    rank = {which: i for i, which in enumerate(FIRST)}
    return sorted(found, key=lambda work: rank.get((work.loss, work.shape), len(rank)))


def own(family: str, device_type: str) -> list[str]:
    """fastkd's kernels on a kind of device, whether or not this family has them yet."""
    names = [b for b in dispatch.PREFERENCE[device_type] if b != "reference"]
    return [b for b in names if b in dispatch.IMPLEMENTED[family]] or names[:1]


def providers(work: Work, device_type: str, autotune: bool = False) -> list[str]:
    """Who may compute a work on a kind of device, whether or not it works here."""
    nn = ["eager_nn"] if work.target.eager_nn is not None else []
    compiled = ["compile", *(["compile_max"] if autotune else [])]
    return [*nn, "eager", *compiled, "reference", *own(work.family, device_type)]


def swept(work: Work, device_type: str, sweep: str) -> list[str]:
    """Return the providers that one sweep measures in turn; eager is in each, so that a ratio to it is of one run."""
    everyone = providers(work, device_type, autotune=True)
    others = {"compile": ("eager", "compile", "reference"), "autotune": ("eager", "compile_max")}
    if sweep == "own":
        return [name for name in everyone if name not in ("compile", "compile_max", "reference")]
    return [name for name in everyone if name in others[sweep]]


def unavailable(provider: str, family: str, device: str) -> str | None:
    """Why a provider cannot be measured here, or None."""
    if provider in ("eager_nn", "eager", "compile", "compile_max"):
        return None
    if provider not in dispatch.IMPLEMENTED[family]:
        return f"{family} has no {provider} backend yet"
    return dispatch.unavailable_reason(provider, family, device)


def loss_of(work: Work, provider: str) -> formulas.Loss:
    """The loss as a function of the work's inputs."""
    if provider in ("eager_nn", "eager"):
        loss = formulas.formula(work, nn=provider == "eager_nn")
    elif provider.startswith("compile"):
        mode = "max-autotune" if provider == "compile_max" else None
        loss = torch.compile(formulas.formula(work), fullgraph=True, dynamic=False, mode=mode)
    else:
        loss = formulas.fastkd(work, provider)
    if not work.autocast:
        return loss

    def cast(*inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, work.dtype):
            return loss(*inputs)

    return cast


def step_of(
    work: Work, provider: str, mode: str, inputs: tuple[Tensor, ...], loss: formulas.Loss | None = None
) -> Step:
    """One call to time: "forward" under no_grad, "both" forward and backward, or the same as a "graph" to replay."""
    loss = loss or loss_of(work, provider)

    def forward() -> Any:
        with torch.no_grad():
            return loss(*inputs)

    def both() -> Any:
        return formulas.gradients(loss, inputs)

    if provider == "eager_nn":
        return _by_sample(work, inputs, loss, mode)
    return {"forward": lambda: forward, "both": lambda: both, "graph": lambda: _recorded(both)}[mode]()


def _recorded(step: Step) -> Step:
    """Replays what the step launches, without Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            step()
    finally:  # a capture that fails leaves its stream the current one
        torch.cuda.set_stream(stream)
    return graph.replay


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
