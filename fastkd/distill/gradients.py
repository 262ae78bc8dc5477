"""Gradient norms of the task loss and of every term."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastkd._wrappers import plain_name


@dataclass(frozen=True)
class GradientReport:
    """Loss values and gradient norms with respect to the student's parameters; the task loss is under ``"task"``.

    Attributes:
        values: name to unweighted value.
        norms: name to the 2-norm of the unweighted gradient.
        weights: term name to weight.
        reached: name to part of the student to the number of its parameter tensors whose gradient is not 0. A part is a
            first-level module, such as "backbone".
        parts: part to the number of its trainable parameter tensors.
    """

    values: dict[str, float]
    norms: dict[str, float]
    weights: dict[str, float]
    reached: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """Term name to weight · norm / (norm of the task's gradient)."""
        task = self.norms["task"]
        return {name: weight * self.norms[name] / task if task else math.inf for name, weight in self.weights.items()}

    def rows(self) -> list[list[str]]:
        """Return a table as text: a header, then name, value, gradient norm, weight, share and parts per loss."""
        found = [["term", "value", "gradient", "weight", "share", "reaches"]]
        for name, value in self.values.items():
            weight, share = self.weights.get(name, 1.0), self.shares.get(name, 1.0)
            numbers = [f"{number:.4g}" for number in (value, self.norms[name], weight)]
            found.append([name, *numbers, f"{share:.2f}", self._parts_of(name)])
        return found

    def _parts_of(self, name: str) -> str:
        reached = self.reached.get(name, {})
        if reached == self.parts:
            return "all" if self.parts else ""
        return ", ".join(f"{part} {count}/{self.parts[part]}" for part, count in reached.items() if count) or "nothing"

    def __str__(self) -> str:
        return "\n".join(
            (f"{name:<28}" + "".join(f"{cell:>12}" for cell in cells) + f"{share:>8}  {parts}").rstrip()
            for name, *cells, share, parts in self.rows()
        )


def report_gradients(
    losses: Mapping[str, Tensor],
    parameters: Sequence[tuple[str, Tensor]],
    weights: Mapping[str, float],
    scale: float = 1.0,
) -> GradientReport:
    """Return the values and gradient norms of scalar losses; their graphs are kept.

    Args:
        losses: name to loss.
        parameters: name and tensor of each parameter.
        weights: term name to weight.
        scale: factor of the weighted losses in the backward (a loss scale); the norms are divided by it.

    Raises:
        ValueError: a loss that is not a scalar tensor.
    """
    values, norms, reached = {}, {}, {}
    parts = [plain_name(name).partition(".")[0] for name, _ in parameters]
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            received = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the task loss must be a scalar tensor, got {received}")
        values[name] = float(loss.detach())
        factor = 1.0 if scale == 1 else scale * (weights.get(name, 1.0) or 1.0)  # as in the loss, for the range of fp16
        norm, nonzero = _gradient_norm(loss if factor == 1 else loss * factor, [p for _, p in parameters])
        norms[name] = norm / factor
        reached[name] = dict.fromkeys(parts, 0)
        for part, some in zip(parts, nonzero, strict=True):
            reached[name][part] += some
    return GradientReport(values, norms, dict(weights), reached, dict(Counter(parts)))


def _gradient_norm(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[float, list[bool]]:
    """Return the norm of a gradient, and whether it is not 0 for each parameter."""
    if not loss.requires_grad:
        return 0.0, [False] * len(parameters)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g.detach().float()) for g in gradients if g is not None]
    if not norms:
        return 0.0, [False] * len(parameters)
    each = iter(torch.stack(norms).tolist())
    return float(torch.linalg.vector_norm(torch.stack(norms))), [g is not None and next(each) != 0 for g in gradients]


def balanced_weights(reports: Sequence[GradientReport], shares: Mapping[str, float]) -> dict[str, float]:
    """Return weights for which weight · ‖∇term‖ = share · ‖∇task‖, with norms summed over the reports.

    Raises:
        ValueError: a share that is negative or not finite, or a gradient norm that is zero or not finite.
    """
    for name, share in shares.items():
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"balance: the share of {name!r} must be a finite number >= 0, got {share!r}")
    norms = {name: sum(report.norms[name] for report in reports) for name in ("task", *shares) if shares}
    for name, norm in norms.items():
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"balance: the gradient norm of {name!r} is {norm}, so no weight gives it a share")
    return {name: share * norms["task"] / norms[name] for name, share in shares.items()}


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Restore random state and buffers (running statistics, also re-assigned ones) at the end of the block."""
    owners = [(each, dict(each._buffers)) for each in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if _is_writable(buffer)]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        try:
            yield
        finally:
            with torch.no_grad():
                for each, named in owners:
                    each._buffers |= named
                for buffer, before in buffers:
                    buffer.copy_(before)


def _is_writable(buffer: Tensor) -> bool:
    """Return whether a forward can write a buffer; not if it is computed, expanded or an inference tensor."""
    expanded = any(step == 0 and size > 1 for size, step in zip(buffer.shape, buffer.stride(), strict=True))
    return buffer.grad_fn is None and not buffer.is_inference() and not expanded
