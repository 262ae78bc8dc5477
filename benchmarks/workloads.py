"""The workloads of each kernel family: losses, shapes and dtypes, with the speed and memory they must reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """Targets for forward plus backward: speed-ups over other providers, extra memory, and share of a roofline.

    ``memory`` is a key of MEMORY. ``of`` selects the roofline: the workload's limit, the machine's copy bandwidth
    ("copy") or its matrix-product rate ("product").
    """

    eager: float | None = None
    compile: float | None = None
    eager_nn: float | None = None
    memory: str | None = None
    share: float = 0.5
    of: str = "limit"
    limited_by: str = ""  # what keeps a kernel below `share`, if that was measured


@dataclass(frozen=True)
class Workload:
    """One loss at one shape and dtype.

    Shapes are (B, C, H, W); (B, N, T, D) for cross_modal_kd; (B, heads, N, M, D) for attention_kd.
    """

    family: str
    loss: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    distance: str = ""
    teacher_width: int | None = None  # None: same as the student's
    maps: bool = False  # cross_modal_kd: pixels are (B, D, H, W) maps instead of (B, N, D) tokens
    autocast: bool = False  # on a GPU, to the workload's dtype; the plain formulas then compute softmaxes in fp32
    small: bool = False  # launch-bound: the target applies to the CUDA graph
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
    def target_mode(self) -> str:
        """Return the mode to which the targets apply."""
        return "graph" if self.small else "both"

    @property
    def relation_sizes(self) -> tuple[int, int, int, int]:
        """Return the batch size, the number of rows R, and the widths K of the student's and the teacher's rows."""
        b, c, h, w = self.shape
        if self.loss == "channel_kd":
            return b, c, h * w, h * w
        return b, h * w, c, self.teacher_width or c

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Return new random features: zeros could run faster, and would hide elements that are never written."""
        generator = torch.Generator().manual_seed(0)
        return self._inputs(lambda shape: torch.randn(shape, generator=generator).to(device, self.dtype))

    def inputs_without_values(self) -> tuple[Tensor, ...]:
        """Return CPU tensors without values, whose memory is never touched, to record launches."""
        return self._inputs(lambda shape: torch.empty(shape, dtype=self.dtype))

    def _inputs(self, make: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, ...]:
        if self.family == "pixel_word":
            b, n, t, d = self.shape
            side = round(n**0.5)
            pixels = (b, d, side, side) if self.maps else (b, n, d)
            students = teachers = (pixels, (b, t, d))
        elif self.family == "attention_kl":
            b, heads, n, m, d = self.shape
            students = teachers = ((b, heads, n, d), (b, heads, m, d))
        else:
            b, c, *rest = self.shape
            students, teachers = ((b, c, *rest),), ((b, self.teacher_width or c, *rest),)
        return tuple(make(shape).requires_grad_() for shape in students) + tuple(make(shape) for shape in teachers)


def _gradient_bytes(workload: Workload) -> int:
    """Return the bytes of the student's gradients."""
    size = torch.empty((), dtype=workload.dtype).element_size()
    if workload.family == "pixel_word":
        b, n, t, d = workload.shape
        return b * (n + t) * d * size
    if workload.family == "attention_kl":
        b, heads, n, m, d = workload.shape
        return b * heads * (n + m) * d * size
    return torch.Size(workload.shape).numel() * size


def _rows(workload: Workload) -> int:
    """Return the side N of the matrix that "no NxN" rules out: the number of channels or pixels."""
    channels, *pixels = workload.shape[1:]
    return channels if workload.loss in ("channel_kd", "cross_modal_kd") else pixels[0] * pixels[1]


MEMORY: dict[str, Callable[[Workload, int], float]] = {
    "gradient + 1 MiB": lambda w, eager: _gradient_bytes(w) + 2**20,
    "5 % of eager": lambda w, eager: 0.05 * eager,
    "2 % of eager": lambda w, eager: 0.02 * eager,
    "1 % of eager": lambda w, eager: 0.01 * eager,
    "gradient + 512 MiB": lambda w, eager: _gradient_bytes(w) + 512 * 2**20,  # a GPU's largest workspace
    "no NxN": lambda w, eager: 4 * _rows(w) ** 2,  # one N×N matrix in fp32
    "gradient + 3 CxC": lambda w, eager: _gradient_bytes(w) + 3 * 4 * w.shape[0] * w.shape[1] ** 2,
}
"""Upper bounds on a call's extra memory in bytes, as functions of the workload and of eager's extra memory."""

_KL = ("relation", "pixel_relation_kd")
_ATTENTION = ("attention_kl", "attention_kd")
_WINDOWS = (
    "it counts neither the maxima, sums and H, the transposition of K and the separate 49th key, a quarter of the "
    "kernel's time, nor Python and torch, a tenth of the call"
)
_CWD = Target(6, 2.7, memory="gradient + 1 MiB")
_CHANNELS = Target(2, 1.5, memory="gradient + 3 CxC")
_WORDS, _FEW_WORDS = Target(3, 3, 300, "no NxN"), Target(2, 1.7)

CPU_WORKLOADS: dict[str, list[Workload]] = {
    "softmax_kl": [
        Workload("softmax_kl", "channel_distribution_kd", shape, target=_CWD)
        for shape in [(8, 512, 30, 30), (8, 128, 120, 120), (4, 1024, 15, 15)]
    ],
    "relation": [
        Workload(*_KL, (2, 128, 60, 60), distance="kl", target=Target(6, 3, memory="5 % of eager")),
        Workload(*_KL, (1, 64, 120, 120), distance="kl", target=Target(9, 3.3, memory="1 % of eager")),
        Workload(*_KL, (8, 256, 30, 30), distance="kl", target=Target(2.2, 1.8)),
        Workload(*_KL, (4, 256, 60, 60), distance="mse", teacher_width=128, target=Target(5, 3, memory="no NxN")),
        *(
            Workload("relation", "channel_kd", shape, distance="kl", target=_CHANNELS)
            for shape in [(8, 512, 30, 30), (4, 1024, 15, 15), (8, 128, 60, 60)]
        ),
    ],
    "pixel_word": [
        Workload("pixel_word", "cross_modal_kd", (4, 14400, 20, 128), target=_WORDS),
        Workload("pixel_word", "cross_modal_kd", (8, 900, 20, 512), target=_FEW_WORDS),
        Workload("pixel_word", "cross_modal_kd", (4, 14400, 20, 128), maps=True, target=replace(_WORDS, eager_nn=None)),
        Workload("pixel_word", "cross_modal_kd", (8, 900, 20, 512), maps=True, target=_FEW_WORDS),
    ],
    "attention_kl": [
        Workload(*_ATTENTION, (4, 8, 1024, 1024, 64), target=Target(2, 1.5, share=0.6)),
        Workload(*_ATTENTION, (1, 8, 4096, 4096, 64), target=Target(2, 1.5, memory="2 % of eager", share=0.6)),
        Workload(*_ATTENTION, (256, 4, 49, 49, 32), target=Target(1.5, share=0.6, limited_by=_WINDOWS)),  # Swin's
    ],
}
"""Workloads of each family on a CPU."""

_COPY, _ROWS_COPY = (Target(5, compile, share=share, of="copy") for compile, share in ((1.5, 0.8), (2, 0.7)))
_PRODUCT = Target(2.5, 1.8, share=0.35, of="product")
_PIXELS = Target(4, 2.5, memory="gradient + 512 MiB", share=0.35, of="product")
_NO_SLOWER = Target(1, share=0)
GPU_WORKLOADS: dict[str, list[Workload]] = {
    "softmax_kl": [
        *(
            Workload("softmax_kl", "channel_distribution_kd", shape, target=_COPY)
            for shape in [(32, 512, 30, 30), (16, 512, 60, 60), (16, 128, 120, 120)]
        ),
        Workload("softmax_kl", "channel_distribution_kd", (2, 64, 15, 15), small=True, target=_NO_SLOWER),
    ],
    "relation": [
        *(
            Workload("relation", "channel_kd", shape, distance="kl", target=_PRODUCT)
            for shape in [(32, 512, 30, 30), (16, 512, 60, 60), (32, 1024, 15, 15)]
        ),
        *(Workload(*_KL, shape, distance="kl", target=_PIXELS) for shape in [(8, 256, 60, 60), (2, 128, 120, 120)]),
        Workload("relation", "channel_kd", (2, 64, 15, 15), distance="kl", small=True, target=_NO_SLOWER),
        Workload(*_KL, (2, 64, 15, 15), distance="kl", small=True, target=_NO_SLOWER),
    ],
    "pixel_word": [
        *(
            Workload("pixel_word", "cross_modal_kd", shape, target=_ROWS_COPY)
            for shape in [(16, 14400, 20, 128), (32, 3600, 20, 256)]
        ),
        Workload("pixel_word", "cross_modal_kd", (2, 225, 20, 64), small=True, target=_NO_SLOWER),
    ],
}
"""Workloads of each family on a GPU."""

GPU_MODES = ("forward", "both", "graph")
FIRST = [
    ("pixel_relation_kd", (8, 256, 60, 60)),
    ("cross_modal_kd", (16, 14400, 20, 128)),
    ("channel_kd", (32, 512, 30, 30)),
    ("channel_distribution_kd", (16, 512, 60, 60)),
    ("pixel_relation_kd", (2, 128, 120, 120)),
    ("channel_kd", (32, 1024, 15, 15)),
]
"""The workloads of highest priority on a GPU, in order; the others follow."""

SWEEPS = ("own", "compile", "autotune")
"""Sweeps over all workloads, in order: fastkd's kernels first, slow-to-compile providers later. Each times eager."""

TRAINED_IN = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}


def select(family: str, device_type: str, dtypes: tuple[torch.dtype, ...] | None = None) -> list[Workload]:
    """Return the workloads of a family on a device type; the list may be empty."""
    gpu = device_type == "cuda"
    return [
        replace(workload, dtype=dtype, autocast=gpu and dtype.itemsize == 2, modes=GPU_MODES if gpu else workload.modes)
        for dtype in dtypes or TRAINED_IN[device_type]
        for workload in (GPU_WORKLOADS if gpu else CPU_WORKLOADS).get(family, [])
    ]


def by_value(device_type: str, dtypes: tuple[torch.dtype, ...] | None = None) -> list[Workload]:
    """Return the workloads of all families, in order of priority."""
    found = [workload for family in CPU_WORKLOADS for workload in select(family, device_type, dtypes)]
    rank = {key: i for i, key in enumerate(FIRST)}
    return sorted(found, key=lambda workload: rank.get((workload.loss, workload.shape), len(rank)))
