"""Relative cost of a training step, measured by turns, so that runs of equal time can be stated in steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastkd.cli._settings import DistillSettings, RunSettings
from fastkd.train.config import TrainConfig

STEPS, WARM_UP = 25, 5


class Candidate(NamedTuple):
    """A model or distiller, its training set, and the settings of its steps."""

    model: Any
    dataset: Any
    config: TrainConfig


def relative_costs(candidates: Sequence[Candidate], rounds: int = 5) -> list[float]:
    """Return the cost of a step of each candidate relative to the first; this trains them.

    They take turns of 25 steps, 20 of them timed, and the result is the median over rounds of the ratios, so that
    other load on the machine affects all alike. Long runs, one after the other, might see different loads. With one
    thread on a CPU, CPU seconds are compared, else wall-clock time.
    """
    from dataclasses import replace
    from statistics import median

    from fastkd._runtime import pick_device
    from fastkd.train import train

    def seconds(candidate: Candidate) -> float:
        model, dataset, config = candidate
        probe = replace(
            config, steps=STEPS, log_every=WARM_UP, eval_every=None, max_seconds=None, check=False, tracker=()
        )
        single = config.threads == 1 and pick_device(config.device).type == "cpu"
        clock = "cpu_seconds" if single else "seconds"
        lines = train(model, dataset, probe, progress=False).history
        return lines[-1][clock] - lines[0][clock]  # type: ignore[no-any-return]

    turns = [[seconds(candidate) for candidate in candidates] for _ in range(rounds)]
    return [median(turn[i] / turn[0] for turn in turns) for i in range(len(candidates))]


def phases(settings: RunSettings) -> list[tuple[float, tuple[str, ...]]]:
    """Return the parts of a run between changes of its schedules: share of the steps, and the terms computed in it.

    A term whose weight is 0 is not computed, so steps do not all cost the same.
    """
    if not isinstance(settings, DistillSettings):
        return [(1.0, ())]
    steps = settings.config.steps
    schedules = {name: term.resolve(steps) for name, term in settings.terms.items()}
    edges = {0, steps}
    for schedule in schedules.values():
        if schedule is not None:
            edges |= {edge for edge in (schedule.start, schedule.stop) if edge is not None and edge < steps}
    found: dict[tuple[str, ...], int] = {}
    for first, end in itertools.pairwise(sorted(edges)):
        active = tuple(
            name
            for name, schedule in schedules.items()
            if schedule is None or any(schedule.factor(step) for step in (first, end - 1))
        )
        found[active] = found.get(active, 0) + end - first
    return [(count / steps, active) for active, count in found.items()]
