"""softmax_kl through channel_distribution_kd, forward and backward: eager, torch.compile and each backend.

pytest --benchmark-only benchmarks/test_softmax_kl.py
"""

from __future__ import annotations

from typing import Any

import measure
import pytest
import torch
import works

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = works.SHAPES["softmax_kl"]["cpu"]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("provider", works.providers("softmax_kl", DEVICE))
def test_forward_and_backward(benchmark: Any, shape: tuple[int, ...], provider: str) -> None:
    if (reason := works.unavailable(provider, "softmax_kl", DEVICE)) is not None:
        pytest.skip(f"{provider}: {reason}")
    work = works.Work("softmax_kl", "channel_distribution_kd", shape, torch.float32)
    step = works.step_of(work, provider, "both", *work.inputs(DEVICE))

    def call() -> None:
        step()
        measure.synchronize(DEVICE)

    benchmark.group = f"softmax_kl: {work.name}, forward + backward"
    benchmark.extra_info["provider"] = provider
    benchmark.pedantic(call, rounds=10, warmup_rounds=3)
