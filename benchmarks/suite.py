"""What the pytest-benchmark suites share: one test per work and provider, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import measure, workloads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases(family: str) -> list[Any]:
    """The family's fp32 works by provider, those of N×N matrices left out: they take seconds and gigabytes a call."""
    return [
        pytest.param(work, provider, id=f"{work.name}-{provider}")
        for work in workloads.works(family, "cpu", (torch.float32,))
        for provider in workloads.providers(work, DEVICE)
        if provider != "eager_nn"
    ]


def run(benchmark: Any, work: workloads.Work, provider: str) -> None:
    if (reason := workloads.unavailable(provider, work.family, DEVICE)) is not None:
        pytest.skip(f"{provider}: {reason}")
    step = workloads.step_of(work, provider, "both", work.inputs(DEVICE))

    def call() -> None:
        step()
        measure.synchronize(DEVICE)

    benchmark.group = f"{work.family}: {work.name}, forward + backward"
    benchmark.extra_info["provider"] = provider
    benchmark.pedantic(call, rounds=10, warmup_rounds=3)
