"""Parametrize and run the pytest-benchmark suites: one test per workload and provider, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import measure, providers, workloads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases(family: str) -> list[Any]:
    """Return a family's fp32 workloads with each provider but ``eager_nn``, which takes seconds and gigabytes."""
    return [
        pytest.param(workload, provider, id=f"{workload.name}-{provider}")
        for workload in workloads.select(family, "cpu", (torch.float32,))
        for provider in providers.candidates(workload, DEVICE)
        if provider != "eager_nn"
    ]


def run(benchmark: Any, workload: workloads.Workload, provider: str) -> None:
    """Time one provider of a workload, or skip the test if the provider is unavailable."""
    if (reason := providers.unavailable_reason(provider, workload.family, DEVICE)) is not None:
        pytest.skip(f"{provider} is unavailable: {reason}")
    step = providers.make_step(workload, provider, "both", workload.inputs(DEVICE))

    def call() -> None:
        step()
        measure.synchronize(DEVICE)

    measure.settle_malloc()
    benchmark.group = f"{workload.family}: {workload.name}, forward + backward"
    benchmark.extra_info["provider"] = provider
    benchmark.pedantic(call, rounds=10, warmup_rounds=3)
