"""The rooflines of the benchmark workloads."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import measure, roofline, workloads
from fastkd import _native

CEILINGS = {
    "copy_bytes_per_s": 1e15,
    "matmul_flop_per_s": 100.0,
    "matmul_bf16_flop_per_s": 400.0,
    "matmul_fp64_flop_per_s": 50.0,
    "exp_per_s": 1e15,
}


def case_of(dtype: torch.dtype, teacher_width: int | None, distance: str = "mse", side: int = 30) -> workloads.Workload:
    return workloads.Workload(
        "relation", "pixel_relation_kd", (2, 64, side, side), dtype, distance=distance, teacher_width=teacher_width
    )


def test_products_count_at_the_rate_of_their_dtype() -> None:
    for dtype, teacher_width, distance, rate, arithmetic in (
        (torch.float32, 32, "mse", 50, "float64"),
        (torch.float16, 32, "mse", 50, "float64"),
        (torch.bfloat16, 32, "mse", 100, "float32"),
        (torch.float32, None, "mse", 100, "float32"),
        (torch.bfloat16, None, "mse", 100, "float32"),
        (torch.float64, None, "mse", 50, "float64"),
        (torch.float32, 32, "kl", 100, "float32"),
        (torch.bfloat16, 32, "kl", 400, "bfloat16"),
    ):
        case = case_of(dtype, teacher_width, distance)
        assert roofline.arithmetic(case) == arithmetic
        minimum = roofline.minimum(case, "both")
        assert roofline.seconds(minimum | {"exp": 0}, CEILINGS, arithmetic) == pytest.approx(minimum["flop"] / rate)


def test_mse_counts_the_cheaper_form() -> None:
    wide, narrow = case_of(torch.float32, 63, side=3), case_of(torch.float32, 63, side=30)
    assert roofline.minimum(wide, "both")["flop"] == 2 * 81 * (
        2 * (64 + 63) + 2 * 64
    )  # the R×R matrices twice, and a product
    assert roofline.arithmetic(wide) == "float32"
    assert roofline.minimum(narrow, "both")["flop"] == 2 * 900 * ((64 + 63) ** 2 + 2 * 64 * (64 + 63))


def test_missing_float64_rate_falls_back_to_float32() -> None:
    older = {name: rate for name, rate in CEILINGS.items() if name != "matmul_fp64_flop_per_s"}
    assert roofline.seconds({"bytes": 0, "flop": 1000, "exp": 0}, older, "float64") == 10


def test_peak_loops_are_not_optimised_away() -> None:
    cpu = _native.load("cpu")
    for operation in ("float32", "float64", "bfloat16", "exp"):
        seconds, counts = {}, {}
        for repeats in (500, 5000):
            times = []
            for _ in range(5):
                begin = time.thread_time()
                counts[repeats] = cpu.peak(operation, repeats)
                times.append(time.thread_time() - begin)
            seconds[repeats] = min(times)
        assert counts[5000] == 10 * counts[500] > 0
        assert seconds[5000] > 4 * seconds[500], operation


def test_peak_rejects_an_unknown_operation() -> None:
    with pytest.raises(ValueError, match="operation: expected float32, float64, bfloat16 or exp, got 'int8'"):
        _native.load("cpu").peak("int8", 1)


def test_peak_rates_name_ceilings() -> None:
    rates = measure.peak_rates(threads=1, rounds=1)
    assert rates.keys() <= CEILINGS.keys()
    assert min(rates.values()) > 1e8
