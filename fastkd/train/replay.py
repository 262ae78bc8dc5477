"""Find the micro-batch whose loss or gradient is not finite, write it to a file with the weights, and replay it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd._atomic import replace_files
from fastkd._messages import shortened
from fastkd._runtime import autocast, to_device
from fastkd.distill.distiller import Distiller
from fastkd.distill.gradients import GradientReport
from fastkd.ops.collectives import alone
from fastkd.train.checkpoint import save_plain
from fastkd.train.feed import Feed
from fastkd.train.seeding import kept_generators, seed_step
from fastkd.train.state import ModelState

_IDS = ("ref_id", "sent_id", "image_id", "id")


@dataclass(frozen=True)
class Broken:
    """A micro-batch whose loss or gradient is not finite.

    Attributes:
        batch: the micro-batch.
        seed: seed, step, micro-batch and rank, from which its random numbers follow.
        indices: its samples in the training set.
        sources: "task" and terms whose value or gradient is not finite; empty if none is when they are computed again.
        report: values and gradient norms.
    """

    batch: dict[str, Any]
    seed: tuple[int, int, int, int]
    indices: list[int]
    sources: list[str]
    report: GradientReport

    def samples(self) -> str:
        """Return the samples' indices and ids as text."""
        text = f"samples {shortened(list(map(str, self.indices)), 32)}"
        ids = [f"{key} {shortened(list(map(str, self.batch[key])), 32)}" for key in _IDS if key in self.batch]
        return text + (f" ({'; '.join(ids)})" if ids else "")


def find_broken(
    distiller: Distiller, feed: Feed, step: int, seed: int, precision: str, losses: list[str], together: bool = False
) -> Broken:
    """Load a step's micro-batches again and return the first that breaks, or the last one if none does.

    Args:
        distiller: in the state in which the step was computed.
        feed: loads micro-batches again.
        step: the step, counted from 0.
        seed: seed of the run.
        precision: precision of the networks.
        losses: losses that were not finite in the step; empty if only the gradient was not.
        together: processes wait for each other inside the networks, so all compute all micro-batches.
    """
    broken: Broken | None = None
    found = False
    for micro, indices in enumerate(feed.order.indices(step)):
        batch, numbers = feed.reload(step, micro), (seed, step, micro, feed.order.rank)
        report = _report(distiller, batch, numbers, precision, feed.device)
        sources = not_finite(report)
        if not found:
            broken = Broken(batch, numbers, indices, sources, report)
            found = bool(sources) and (not losses or bool(set(losses) & set(sources)))
        if found and not together:
            break
    assert broken is not None
    return broken


def not_finite(report: GradientReport) -> list[str]:
    """Return the names of losses that are not finite or, if all are, of those whose gradient is not."""
    losses = [name for name, value in report.values.items() if not math.isfinite(value)]
    return losses or [name for name, norm in report.norms.items() if not math.isfinite(norm)]


def write_replay(path: Path, broken: Broken, model: ModelState, weights: Mapping[str, float], precision: str) -> None:
    """Write a micro-batch with the weights and settings that `replay_batch` needs; loads with ``weights_only=True``."""
    content = {
        "batch": {key: _plain(value) for key, value in broken.batch.items()},
        "seed": list(broken.seed),
        "indices": broken.indices,
        "precision": precision,
        "weights": dict(weights),
        "tensors": {part: {n: t.detach().cpu() for n, t in each.items()} for part, each in model.consistent().items()},
    }
    with replace_files(path) as (partial,):
        save_plain(content, partial)


def replay_batch(path: str | Path, distiller: Distiller, device: torch.device) -> GradientReport:
    """Compute losses and gradients of a file of `write_replay` again, with its weights and random numbers.

    Args:
        path: the file, ``replay-step-….pt`` in a run's folder.
        distiller: with the student, teacher and terms of the run; its weights are overwritten.
        device: the device to compute on.

    Returns:
        Values and gradient norms of the task and each term.

    Raises:
        ValueError: the file does not fit the distiller.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    distiller.to(device).train()
    ModelState(distiller).load(content["tensors"])
    distiller.set_weights(content["weights"])
    batch = to_device(content["batch"], device)
    with kept_generators():
        return _report(distiller, batch, content["seed"], content["precision"], device)


def _report(
    distiller: Distiller, batch: Mapping[str, Any], numbers: Any, precision: str, device: torch.device
) -> GradientReport:
    seed_step(*numbers)
    with autocast(precision, device), alone():  # the other processes may have other micro-batches to try
        return distiller.gradient_report(batch, step=numbers[1])


def _plain(value: Any) -> Any:
    """Return tensors and plain values as they are, others as text."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
