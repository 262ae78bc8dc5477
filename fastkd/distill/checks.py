"""What fails silently in distillation, refused before training; and how much each term pulls on the student."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastkd.distill.distiller import Distiller


@dataclass(frozen=True)
class GradientReport:
    """Loss values and gradient norms with respect to the student's parameters, the task's under ``"task"``.

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


def check(distiller: Distiller, batch: Mapping[str, Any]) -> GradientReport:
    """Refuse, with one error each, what would fail silently in training.

    That is: a teacher in train mode, with parameters that require a gradient, without weights, on another device, with
    NaN in its output or taps, or where these change between two passes; a term or task loss that is not a finite
    scalar or sends no (or a non-finite) gradient to the student; a term that is exactly 0; a tap that never fires.
    Neither the models, the gradients nor the random state are changed.

    Args:
        distiller: what is to be trained, in train mode and on its device.
        batch: a batch of training data on the same device.

    Returns:
        Values, gradient norms and shares of the terms on this batch.

    Raises:
        ValueError: one of the above.
        RuntimeError: a tap that never fires.
    """
    if distiller.teacher is not None:
        _check_frozen(distiller.teacher, distiller.student)
        with undisturbed(distiller):
            _check_steady(distiller, batch)
    report = gradient_report(distiller, batch)
    for name, value in report.values.items():
        what = "the task loss" if name == "task" else f"term {name!r}"
        if not math.isfinite(value):
            raise ValueError(f"{what} is {value} on the first batch: look at its inputs for NaN, Inf or overflow")
        if value == 0 and name != "task":
            raise ValueError(
                f"{what} is exactly 0 on the first batch: it teaches nothing. Student and teacher select equal "
                "tensors, or the loss is constant on these shapes"
            )
        norm = report.norms[name]
        if not math.isfinite(norm):
            raise ValueError(f"{what} is {value:.4g} but its gradient with respect to the student is {norm}")
        if norm == 0:
            raise ValueError(
                f"{what} sends no gradient to the student: what it selects is detached or does not depend on the "
                "student's trainable parameters, or the loss is constant there"
            )
    return report


def gradient_report(distiller: Distiller, batch: Mapping[str, Any]) -> GradientReport:
    """Values and gradient norms of the task and of every term on one batch; nothing is changed."""
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("student has no parameter that requires a gradient: nothing can train")
    with undisturbed(distiller), torch.enable_grad():
        output = distiller(batch)
        parts = {"task": output.task, **output.terms}
        values, norms = {}, {}
        for name, value in parts.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the task loss must be a scalar tensor, got {got}")
            values[name] = float(value.detach())
            norms[name] = _gradient_norm(value, parameters)
    return GradientReport(values, norms, distiller.weights)


def balance(
    distiller: Distiller, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], shares: Mapping[str, float]
) -> dict[str, float]:
    """Set the named terms' weights so that weight · ‖∇term‖ = share · ‖∇task‖; see `Distiller.balance`."""
    batches = [batch] if isinstance(batch, Mapping) else list(batch)
    if not batches:
        raise ValueError("balance: batch is an empty sequence; pass at least one batch")
    unknown = sorted(set(shares) - set(distiller.terms))
    if unknown:
        raise ValueError(f"balance: no term named {unknown[0]!r}; terms are {list(distiller.terms)}")
    for name, share in shares.items():
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"balance: the share of {name!r} must be a finite number >= 0, got {share!r}")
    reports = [gradient_report(distiller, one) for one in batches]
    norms = {name: sum(report.norms[name] for report in reports) for name in ("task", *shares)}
    for name, norm in norms.items():
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"balance: the gradient norm of {name!r} is {norm}; there is no weight to find")
    distiller.set_weights({name: share * norms["task"] / norms[name] for name, share in shares.items()})
    return distiller.weights


@contextmanager
def undisturbed(module: Distiller) -> Iterator[None]:
    """Put random state and buffers (running statistics) back afterwards, so that looking changes nothing."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _check_frozen(teacher: nn.Module, student: nn.Module) -> None:
    training = [name or "teacher" for name, module in teacher.named_modules() if module.training]
    if training:
        raise ValueError(
            f"teacher is in train mode ({_few(training)}): dropout, drop path and batch statistics would change its "
            "output; call teacher.eval()"
        )
    open_ = [name for name, p in teacher.named_parameters() if p.requires_grad]
    if open_:
        raise ValueError(
            f"teacher has parameters that require a gradient ({_few(open_)}): call teacher.requires_grad_(False)"
        )
    empty = [name for name, p in teacher.named_parameters() if p.is_meta]
    if empty:
        raise ValueError(f"teacher has parameters without weights ({_few(empty)}): load them before distilling")
    device = next((p.device for p in student.parameters()), None)
    away = [
        f"{name} on {p.device}" for name, p in teacher.named_parameters() if device is not None and p.device != device
    ]
    if away:
        raise ValueError(f"student is on {device}, but the teacher's {_few(away)}: move both with distiller.to(device)")


def _check_steady(distiller: Distiller, batch: Mapping[str, Any]) -> None:
    first, second = _teacher_pass(distiller, batch), _teacher_pass(distiller, batch)
    if not first:
        raise ValueError("teacher returned no tensor: its forward must return a tensor or an object that holds some")
    if len(first) != len(second):
        raise ValueError("teacher returned different outputs on two passes over one batch")
    for (name, a), (_, b) in zip(first, second, strict=True):
        if (torch.isnan(a) | (a == math.inf)).any():  # −inf may be a mask
            raise ValueError(f"teacher's {name} holds NaN or Inf on the first batch: are its weights loaded and whole?")
        # Not bit for bit: some GPU convolutions differ in the last digits between two runs.
        tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 1e-2
        scale = a.detach().abs().nan_to_num(0, 0, 0).max() if a.numel() else a.new_zeros(())
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=float(tolerance * scale), equal_nan=True):
            raise ValueError(
                f"teacher's {name} changes between two passes over one batch: something in it is random or keeps "
                "state; make its forward deterministic"
            )


def _teacher_pass(distiller: Distiller, batch: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """What the teacher returns, and what its taps catch."""
    found = list(_tensors(distiller.run_teacher(batch)))
    taps = distiller._teacher_taps
    if taps is not None:
        found += [pair for name in taps for pair in _tensors(taps[name], f"tap {name!r}")]
        taps.clear()
    return found


def _gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> float:
    if not value.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g.detach().float()) for g in gradients if g is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor in a nested output, with its path."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
        return
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    elif is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        pairs = vars(value).items()
    for key, item in pairs:
        yield from _tensors(item, str(key) if name == "output" else f"{name}.{key}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
