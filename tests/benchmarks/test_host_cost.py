"""The host time of a call is bounded by counts, which load does not change: Python functions and torch's operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host_cost
from fastkd.ops.dispatch import unavailable_reason

BOUNDS = {
    # forward + backward: calls of fastkd's Python functions, torch's operators
    ("cpu", "channel_distribution_kd"): (63, 10),
    ("cpu", "channel_kd"): (99, 9),
    ("cpu", "pixel_relation_kd"): (85, 12),
    ("cpu", "cross_modal_kd"): (142, 10),
    ("cpu", "attention_kd"): (165, 17),
    ("triton", "channel_distribution_kd"): (63, 10),
    ("triton", "channel_kd"): (86, 9),
    ("triton", "pixel_relation_kd"): (79, 12),
    ("triton", "cross_modal_kd"): (104, 10),
}
"""A few more than counted with torch 2.15 and Python 3.11. Before plans were cached, relations had 230."""

TRITON = """
import json
import torch
from benchmarks import host_cost
from fastkd.losses import channel_kd

with host_cost.stand_in("triton"):
    counts = {one.loss: host_cost.counts("triton", one, "both") for one in host_cost.measured("triton")}
    from fastkd.kernels.relation import call, forward
    maps = torch.empty(2, 64, 15, 15)
    made = []
    for temperature in (0.1, 0.11, 0.12):
        channel_kd(maps, maps, temperature=temperature, backend="triton")
        made.append((call._call.cache_info().misses, forward._plan.cache_info().misses))
print(json.dumps({"counts": counts, "made": made}))
"""


@pytest.fixture(scope="module")
def triton() -> dict:
    if (reason := unavailable_reason("triton")) is not None:
        pytest.skip(f"Triton is unavailable: {reason}")
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(backend: str, loss: str, counted: dict[str, int]) -> None:
    python_calls, operators = BOUNDS[backend, loss]
    assert counted["python_calls"] <= python_calls
    assert counted["torch_operators"] <= operators


@pytest.mark.parametrize("loss", [loss for backend, loss in BOUNDS if backend == "cpu"])
def test_calls_of_the_cpu_backend_are_few(loss: str) -> None:
    if (reason := unavailable_reason("cpu")) is not None:
        pytest.skip(f"the C++ kernels are unavailable: {reason}")
    (workload,) = (one for one in host_cost.measured("cpu") if one.loss == loss)
    check("cpu", loss, host_cost.counts("cpu", workload, "both"))


@pytest.mark.parametrize("loss", [loss for backend, loss in BOUNDS if backend == "triton"])
def test_calls_of_the_triton_backend_are_few(triton: dict, loss: str) -> None:
    check("triton", loss, triton["counts"][loss])


def test_a_temperature_that_changes_makes_no_plan(triton: dict) -> None:
    assert triton["made"][0] == triton["made"][1] == triton["made"][2]


@pytest.mark.parametrize("loss", ["channel_distribution_kd", "attention_kd"])  # the last's backward has no operator
def test_parts_of_a_call_add_up(loss: str) -> None:
    (workload,) = (one for one in host_cost.measured("cpu") if one.loss == loss)
    row = host_cost.host_cost("cpu", workload, "both", rounds=5, calls=10)
    assert row["us"] == pytest.approx(row["torch_us"] + row["fastkd_us"], abs=0.2)
    assert 0 < row["torch_us"] < row["us"]
    assert row["launch_us"] is None
