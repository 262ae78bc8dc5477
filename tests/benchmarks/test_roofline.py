"""The limit that the benchmarks print beside each ratio."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import roofline, workloads

CEILINGS = {
    "copy_bytes_per_s": 1e15,
    "matmul_flop_per_s": 100.0,
    "matmul_bf16_flop_per_s": 400.0,
    "matmul_fp64_flop_per_s": 50.0,
    "exp_per_s": 1e15,
}


def work(dtype: torch.dtype, teacher_width: int | None, distance: str = "mse", side: int = 30) -> workloads.Work:
    return workloads.Work(
        "relation", "pixel_relation_kd", (2, 64, side, side), dtype, distance=distance, teacher_width=teacher_width
    )


def test_products_count_at_the_rate_of_the_arithmetic_they_need() -> None:
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
        case = work(dtype, teacher_width, distance)
        assert roofline.arithmetic(case) == arithmetic
        least = roofline.minimum(case, "both")
        assert roofline.seconds(least | {"exp": 0}, CEILINGS, arithmetic) == pytest.approx(least["flop"] / rate)


def test_products_of_the_lesser_form_are_counted() -> None:
    wide, narrow = work(torch.float32, 63, side=3), work(torch.float32, 63, side=30)
    assert roofline.minimum(wide, "both")["flop"] == 2 * 81 * (2 * (64 + 63) + 2 * 64)  # R×R, twice and a product
    assert roofline.arithmetic(wide) == "float32"
    assert roofline.minimum(narrow, "both")["flop"] == 2 * 900 * ((64 + 63) ** 2 + 2 * 64 * (64 + 63))


def test_results_without_a_double_rate_use_the_float_rate() -> None:
    older = {name: rate for name, rate in CEILINGS.items() if name != "matmul_fp64_flop_per_s"}
    assert roofline.seconds({"bytes": 0, "flop": 1000, "exp": 0}, older, "float64") == 10
