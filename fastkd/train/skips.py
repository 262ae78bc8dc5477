"""Steps without an update, since a loss or gradient was not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LIMIT = 10  # skipped steps in a row that end the run


class Skips:
    """Count skipped steps, in total and in a row."""

    def __init__(self) -> None:
        self.count = self.reported = 0  # in total, and up to the latest line of the log
        self.latest = self.in_a_row = 0

    def add(self, step: int) -> bool:
        """Count a skipped step; return whether the limit in a row is reached."""
        self.in_a_row = self.in_a_row + 1 if step == self.latest + 1 else 1
        self.latest, self.count = step, self.count + 1
        return self.in_a_row >= LIMIT

    def since_report(self) -> int:
        """Return the number of skipped steps since the previous call."""
        new, self.reported = self.count - self.reported, self.count
        return new

    def to_json(self) -> dict[str, int]:
        """Return the state for a checkpoint."""
        return dict(vars(self))

    def load(self, state: Mapping[str, int]) -> None:
        """Continue from the state of a checkpoint; a run that had reached the limit gets as many steps again."""
        vars(self).update(state)
        if self.in_a_row >= LIMIT:
            self.in_a_row = 0


def describe(values: Mapping[str, float]) -> tuple[list[str], str]:
    """Return which losses of a step are not finite, and a description that also covers the gradient."""
    losses = [name for name in values if name not in ("loss", "gradient") and not math.isfinite(values[name])]
    if losses:
        text = " and ".join("the task loss" if name == "task" else f"term {name!r}" for name in losses)
        return losses, f"{text} is {values[losses[0]]}"
    if math.isfinite(values["gradient"]):
        return [], "a loss of another process is not finite"
    return [], f"the gradient is {values['gradient']} while every loss is finite"


def any_not_finite(row: Tensor, parallel: bool) -> Tensor:
    """Return whether a value and whether a loss of a step is not finite, a bool tensor (2,) on the device.

    Args:
        row: the losses of a step, and its gradient norm at the end.
        parallel: ask all processes, so that they skip together.
    """
    bad = torch.stack([~row.isfinite().all(), ~row[:-1].isfinite().all()])
    if parallel:
        flags = bad.float()
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        bad = flags > 0
    return bad
