"""`Schedule`: the weight of a term, or of the task, as a function of the training step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Factor of a weight at every step, counted from 0.

    The factor is 0 before ``start`` and ``final`` from ``stop`` on. In between, with
    p = (step − start) / (stop − start), it is

    - ``"constant"``: initial;
    - ``"linear"``: initial + (final − initial) · p;
    - ``"cosine"``: final + (initial − final) · (1 + cos πp) / 2.

    It depends on nothing but the step, so a run that is resumed needs no further state.

    Args:
        kind: ``"constant"``, ``"linear"`` or ``"cosine"``.
        start: first step at which the loss counts.
        stop: step from which the factor is ``final``; None: never, which only ``"constant"`` allows.
        initial: factor at ``start``.
        final: factor from ``stop`` on.

    Raises:
        ValueError: an unknown kind, a step or factor that is negative, a factor that is not finite, ``stop`` not after
            ``start``, or no ``stop`` where the kind needs it.

    Example:
        >>> Schedule("linear", stop=1000).factor(250)
        0.75
        >>> Schedule(start=500).factor(499)  # the second stage of two
        0.0
    """

    kind: Kind = "constant"
    start: int = 0
    stop: int | None = None
    initial: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"schedule must be 'constant', 'linear' or 'cosine', got {self.kind!r}")
        for name in ("start", "stop"):
            value = getattr(self, name)
            if not (value is None and name == "stop") and (type(value) is not int or value < 0):
                raise ValueError(f"schedule: {name} must be a step, an integer >= 0, got {value!r}")
        for name in ("initial", "final"):
            value = getattr(self, name)
            real = isinstance(value, int | float) and not isinstance(value, bool)
            if not (real and math.isfinite(value) and value >= 0):
                raise ValueError(f"schedule: {name} must be a finite number >= 0, got {value!r}")
        if self.stop is None and self.kind != "constant":
            raise ValueError(f"schedule {self.kind!r} needs stop, the step at which it reaches final={self.final}")
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"schedule: stop must be after start, got start={self.start} and stop={self.stop}")

    def factor(self, step: int) -> float:
        """Return the factor at a step, counted from 0."""
        if step < self.start:
            return 0.0
        if self.stop is None:
            return float(self.initial)
        if step >= self.stop:
            return float(self.final)
        progress = (step - self.start) / (self.stop - self.start)
        if self.kind == "linear":
            return self.initial + (self.final - self.initial) * progress
        if self.kind == "cosine":
            return self.final + (self.initial - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return float(self.initial)


def check_schedules(
    schedules: Mapping[str, Schedule], weights_at: Callable[[int], Mapping[str, float]], steps: int
) -> list[str]:
    """Look for steps of a run at which nothing trains; return the names whose schedule begins after the last step.

    Args:
        schedules: "task" and term name to schedule.
        weights_at: returns all weights at a step.
        steps: steps of the run.

    Raises:
        ValueError: every weight is 0 from one step to another.
    """
    changes = {change for each in schedules.values() for change in (each.start, each.stop) if change is not None}
    edges = sorted({0, steps, *(change for change in changes if change < steps)})
    for first, end in itertools.pairwise(edges):
        if not any(any(weights_at(step).values()) for step in (first, end - 1)):  # a ramp from 0 is 0 at one end only
            raise ValueError(
                f"schedules: the weights of the task and of every term are 0 at steps {first} to {end - 1}, counted "
                "from 0, so nothing trains: let one of them start earlier or stop later"
            )
    return [name for name, schedule in schedules.items() if schedule.start >= steps]
