"""attention_kl through attention_kd, forward and backward: eager, torch.compile and each backend.

pytest --benchmark-only benchmarks/test_attention_kl.py
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import suite, workloads


@pytest.mark.parametrize(("workload", "provider"), suite.cases("attention_kl"))
def test_forward_and_backward(benchmark: Any, workload: workloads.Workload, provider: str) -> None:
    suite.run(benchmark, workload, provider)
