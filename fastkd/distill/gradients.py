"""Gradient norms of the task loss and of every term."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GradientReport:
    """Loss values and gradient norms with respect to the student's parameters; the task loss is under ``"task"``.

    Attributes:
        values: name to unweighted value.
        norms: name to the 2-norm of the unweighted gradient.
        weights: term name to weight.
    """

    values: dict[str, float]
    norms: dict[str, float]
    weights: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Term name to weight · norm / (norm of the task's gradient)."""
        task = self.norms["task"]
        return {name: weight * self.norms[name] / task if task else math.inf for name, weight in self.weights.items()}

    def __str__(self) -> str:
        lines = [f"{'term':<28}{'value':>12}{'gradient':>12}{'weight':>12}{'share':>8}"]
        for name, value in self.values.items():
            weight, share = self.weights.get(name, 1.0), self.shares.get(name, 1.0)
            lines.append(f"{name:<28}{value:>12.4g}{self.norms[name]:>12.4g}{weight:>12.4g}{share:>8.2f}")
        return "\n".join(lines)


def report_gradients(
    losses: Mapping[str, Tensor], parameters: Sequence[Tensor], weights: Mapping[str, float]
) -> GradientReport:
    """Return the values and gradient norms of scalar losses; their graphs are kept.

    Raises:
        ValueError: a loss that is not a scalar tensor.
    """
    values, norms = {}, {}
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            received = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the task loss must be a scalar tensor, got {received}")
        values[name] = float(loss.detach())
        norms[name] = _gradient_norm(loss, parameters)
    return GradientReport(values, norms, dict(weights))


def _gradient_norm(loss: Tensor, parameters: Sequence[Tensor]) -> float:
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g.detach().float()) for g in gradients if g is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def balanced_weights(reports: Sequence[GradientReport], shares: Mapping[str, float]) -> dict[str, float]:
    """Return weights for which weight · ‖∇term‖ = share · ‖∇task‖, with norms summed over the reports.

    Raises:
        ValueError: a share that is negative or not finite, or a gradient norm that is zero or not finite.
    """
    for name, share in shares.items():
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"balance: the share of {name!r} must be a finite number >= 0, got {share!r}")
    norms = {name: sum(report.norms[name] for report in reports) for name in ("task", *shares)}
    for name, norm in norms.items():
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"balance: the gradient norm of {name!r} is {norm}, so no weight gives it a share")
    return {name: share * norms["task"] / norms[name] for name, share in shares.items()}


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Restore random state and buffers (running statistics) at the end of the block."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
