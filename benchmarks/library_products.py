"""Compare the C++ relation kernels with the matrix products that a form on torch's products would need.

    python -m benchmarks.library_products [--seconds 20] [--out FOLDER]

bfloat16, forward and backward. A relation needs fp32 elements, but torch's products of bfloat16 rows on a CPU return
bfloat16. Two ways return more: products of rows widened to fp32 ("widened"), and a bfloat16 product plus its residual,
``baddbmm(E, X, Xᵀ, beta=-1)``, a second product ("residual"). The times are those of the products alone, a lower bound
of such a form: nothing is normalised, exponentiated or reduced. Run it under ``FASTKD_CPU_ISA=amx`` on a processor with
AMX. Writes library_products.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure, providers, run
from benchmarks.workloads import CPU_WORKLOADS, Workload
from fastkd._console import plain_characters

BLOCK = 512
"""Rows of a pixel relation multiplied at a time: 7 MiB of E at 3600 pixels."""


def widened(rows: Tensor, others: Tensor) -> Tensor:
    """Return the products of rows in fp32, (B, R, K) and (B, S, K) to (B, R, S)."""
    return torch.bmm(rows.float(), others.float().mT)


def residual(rows: Tensor, others: Tensor) -> Tensor:
    """Return the products of rows with an error of two bfloat16 numbers, (B, R, K) and (B, S, K) to (B, R, S)."""
    rounded = torch.bmm(rows, others.mT)
    rest = torch.baddbmm(rounded, rows, others.mT, beta=-1)
    return rounded.float().add_(rest)


def products(workload: Workload, relation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """Return a function that computes the products of a forward and a backward."""
    student, teacher = (x.detach().flatten(2) for x in workload.inputs("cpu"))
    channels = workload.loss == "channel_kd"
    if not channels:
        student, teacher = student.mT.contiguous(), teacher.mT.contiguous()
    count = student.shape[1]
    step = count if channels else BLOCK
    h = torch.randn(student.shape[0], step, count).to(student.dtype)
    # Channels keep E for the backward, pixels compute it again.
    networks = (student, teacher) if channels else (student, teacher, student, teacher)

    def compute() -> None:
        for begin in range(0, count, step):
            for x in networks:
                relation(x[:, begin : begin + step], x)
            torch.bmm(h[:, : count - begin], student)

    return compute


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="time per workload")
    parser.add_argument("--out", type=Path, help="folder of library_products.json")
    args = parser.parse_args()
    plain_characters()
    env = measure.environment("cpu")
    rows = []
    for original in CPU_WORKLOADS["relation"]:
        workload = replace(original, dtype=torch.bfloat16)
        if workload.distance != "kl":
            continue
        calls = {
            "cpu": providers.make_step(workload, "cpu", "both", workload.inputs("cpu")),
            "widened": products(workload, widened),
            "residual": products(workload, residual),
        }
        times = measure.time_in_turns(calls, "cpu", args.seconds)
        for name in calls:
            rows.append(run.empty_row(workload, "both", name) | {"ok": True, "ms": measure.percentiles(times[name])})
        own = rows[-3]["ms"]["median"]
        print(f"{workload.name}: " + ", ".join(f"{r['provider']} {r['ms']['median'] / own:.2f}" for r in rows[-3:]))
        sys.stdout.flush()
    path = (args.out or measure.RESULTS / measure.device_slug(env)) / "library_products.json"
    measure.write_results(path, env, rows)
    print(path)


if __name__ == "__main__":
    main()
