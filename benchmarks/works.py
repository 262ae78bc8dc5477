"""What is measured: the works of each family, and the providers that compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.ops import _backends

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Work:
    """One loss at one shape and dtype."""

    family: str
    loss: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.loss} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def inputs(self, device: str) -> tuple[Tensor, Tensor]:
        """Fresh random maps: never zeros, which can run faster and hide what was not written."""
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(self.shape, generator=generator) for _ in range(2))
        return student.to(device, self.dtype).requires_grad_(), teacher.to(device, self.dtype)

    def minimum(self, mode: str) -> dict[str, int]:
        """The least that any implementation must do: bytes moved, operations, exponentials."""
        reads = 2 if mode == "forward" else 5  # forward: S, T; backward: S, T, and the gradient written
        exps = 2 if mode == "forward" else 4
        size = torch.empty((), dtype=self.dtype).element_size()
        return {"bytes": reads * self.elements * size, "flop": 4 * exps * self.elements, "exp": exps * self.elements}


TEMPERATURE = 4.0


def channel_distribution_formula(student: Tensor, teacher: Tensor) -> Tensor:
    """What users write without fastkd: softmaxes of the flattened maps, in the inputs' dtype."""
    s, t = student.flatten(2) / TEMPERATURE, teacher.flatten(2) / TEMPERATURE
    rows = (torch.softmax(t, -1) * (torch.log_softmax(t, -1) - torch.log_softmax(s, -1))).sum(-1)
    return rows.mean() * TEMPERATURE**2


def channel_distribution_fastkd(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    from fastkd.losses import channel_distribution_kd

    return channel_distribution_kd(student, teacher, temperature=TEMPERATURE, backend=backend)


FORMULAS = {"channel_distribution_kd": (channel_distribution_formula, channel_distribution_fastkd)}
"""Each loss as the plain formula, and as fastkd's function."""

SHAPES = {
    "softmax_kl": {
        "cpu": [(8, 512, 30, 30), (8, 128, 120, 120), (4, 1024, 15, 15)],
        "cuda": [(32, 512, 30, 30), (16, 512, 60, 60), (16, 128, 120, 120), (8, 512, 30, 30), (4, 1024, 15, 15)],
    }
}
LOSSES = {"softmax_kl": "channel_distribution_kd"}


def works(family: str, device_type: str, dtypes: tuple[torch.dtype, ...] | None = None) -> list[Work]:
    """The works of a family on a kind of device."""
    if dtypes is None:
        dtypes = (torch.float32,) if device_type == "cpu" else (torch.bfloat16, torch.float32)
    return [Work(family, LOSSES[family], shape, dtype) for dtype in dtypes for shape in SHAPES[family][device_type]]


def providers(family: str, device_type: str) -> list[str]:
    """Who may compute a family on a kind of device, whether or not it works here."""
    own = [b for b in _backends.PREFERENCE[device_type] if b in _backends.IMPLEMENTED[family] and b != "reference"]
    return ["eager", "compile", "reference", *own]


def unavailable(provider: str, family: str, device: str) -> str | None:
    """Why a provider cannot be measured here, or None."""
    if provider in ("eager", "compile"):
        return None
    return _backends.why_not(provider, family, device)


def loss_of(work: Work, provider: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a function of student and teacher."""
    formula, ours = FORMULAS[work.loss]
    if provider == "eager":
        return formula
    if provider == "compile":
        return torch.compile(formula, fullgraph=True, dynamic=False)
    return lambda student, teacher: ours(student, teacher, provider)


def step_of(work: Work, provider: str, mode: str, student: Tensor, teacher: Tensor) -> Step:
    """One call to time: "forward" under no_grad, or "both" forward and backward."""
    loss = loss_of(work, provider)

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(student, teacher)

    def both() -> Tensor:
        return torch.autograd.grad(loss(student, teacher), student)[0]

    return {"forward": forward, "both": both}[mode]
