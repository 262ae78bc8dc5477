"""pixel_word through cross_modal_kd, forward and backward: eager, torch.compile and each backend.

pytest --benchmark-only benchmarks/test_pixel_word.py
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import suite, workloads


@pytest.mark.parametrize(("workload", "provider"), suite.cases("pixel_word"))
def test_forward_and_backward(benchmark: Any, workload: workloads.Workload, provider: str) -> None:
    suite.run(benchmark, workload, provider)
