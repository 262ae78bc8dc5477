"""Find the size from which fastkd's kernels are faster, by sweeping small sizes of each loss.

    python -m benchmarks.sweep [--family relation] [--dtype float32] [--seconds 1] [--out FOLDER]

Times fastkd's kernel, the reference and the plain formula, forward and backward, and prints for each loss the number of
student elements from which the kernel is faster than each of the others, at all larger sizes too. A family's entry of
``MIN_ELEMENTS`` in fastkd/ops/dispatch.py is its largest number. Writes sweep.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, providers, run, workloads
from benchmarks.workloads import Workload
from fastkd._console import plain_characters

NOISE = 1.03  # slowdowns below this ratio count as noise
MAPS = [
    (1, 4, 2, 2),
    (1, 4, 4, 4),
    (1, 8, 4, 4),
    (1, 8, 8, 4),
    (1, 16, 8, 4),
    (1, 16, 8, 8),
    (1, 32, 8, 8),
    (2, 32, 8, 8),
    (2, 64, 8, 8),
    (4, 64, 8, 8),
    (4, 128, 8, 8),
    (4, 128, 15, 15),
    (8, 256, 15, 15),
]
TOKENS = [  # N a square, T, D
    (1, 4, 4, 8),
    (1, 16, 4, 8),
    (1, 16, 8, 16),
    (1, 64, 8, 16),
    (1, 64, 20, 32),
    (2, 64, 20, 32),
    (2, 64, 20, 64),
    (2, 225, 20, 64),
    (4, 225, 20, 128),
    (8, 225, 20, 256),
]


def sweep(family: str) -> list[list[Workload]]:
    """Return the workloads of each loss, smallest first."""
    if family == "softmax_kl":
        return [[Workload(family, "channel_distribution_kd", shape) for shape in MAPS]]
    if family == "pixel_word":
        return [[Workload(family, "cross_modal_kd", shape) for shape in TOKENS]]
    losses = [("pixel_relation_kd", "kl"), ("pixel_relation_kd", "mse"), ("channel_kd", "kl"), ("channel_kd", "mse")]
    return [[Workload(family, loss, shape, distance=distance) for shape in MAPS] for loss, distance in losses]


def elements(workload: Workload) -> int:
    """Return the number of elements of the student's first input, the size that dispatch compares."""
    return workload.inputs("cpu")[0].numel()


def compare(workload: Workload, names: list[str], device: str, seconds: float) -> run.Rows:
    """Time both passes and return one row per provider."""
    inputs = workload.inputs(device)
    failed = {
        name: why for name in names if (why := providers.unavailable_reason(name, workload.family, device)) is not None
    }
    steps = {name: providers.make_step(workload, name, "both", inputs) for name in names if name not in failed}
    times = measure.time_in_turns(steps, device, seconds, min_rounds=30, max_rounds=2000)
    rows = []
    for name in names:
        row = run.empty_row(workload, "both", name) | {"elements": inputs[0].numel(), "note": failed.get(name, "")}
        rows.append(row | ({"ok": True, "ms": measure.percentiles(times[name])} if name in times else {}))
    return rows


def crossover(rows: run.Rows, kernel: str, other: str) -> int | None:
    """Return the number of elements from which ``kernel`` is never slower than ``other``, or None."""
    ms = {(r["elements"], r["provider"]): r["ms"]["median"] for r in rows if r["ok"]}
    smallest = None
    for count in sorted({count for count, _ in ms}, reverse=True):
        if ms[count, kernel] > NOISE * ms[count, other]:
            break
        smallest = count
    return smallest


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--family", nargs="+", default=list(workloads.CPU_WORKLOADS), choices=list(workloads.CPU_WORKLOADS)
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on each size")
    parser.add_argument("--out", type=Path, help="folder for sweep.json; default: benchmarks/results/DEVICE")
    args = parser.parse_args(argv)
    others = ["eager", "reference"]
    rows: run.Rows = []
    crossovers: list[dict[str, Any]] = []
    for family in args.family:
        kernels = providers.fastkd_backends(family, torch.device(args.device).type)
        for sizes in sweep(family):
            mine: run.Rows = []
            for workload in sizes:
                workload = Workload(
                    workload.family, workload.loss, workload.shape, getattr(torch, args.dtype), workload.distance
                )
                got = compare(workload, [*others, *kernels], args.device, args.seconds)
                mine += got
                times = (f"{r['provider']} {1e3 * r['ms']['median']:.0f} µs" for r in got if r["ok"])
                print(f"{workload.name:44} {elements(workload):>7} elements: {', '.join(times)}", flush=True)
            rows += mine
            title = f"{sizes[0].loss} {sizes[0].distance}".strip()
            for kernel in kernels:
                if not all(r["ok"] for r in mine if r["provider"] == kernel):
                    print(f"  {title}: {kernel} was not measured: {mine[-1]['note']}")
                    continue
                found = {other: crossover(mine, kernel, other) for other in others}
                crossovers.append({"family": family, "loss": title, "kernel": kernel, "faster_from": found})
                sizes_found = (
                    f"{other} {'at no size' if n is None else f'from {n} elements'}" for other, n in found.items()
                )
                print(f"  {title}: {kernel} is faster than {', '.join(sizes_found)}")
    env = measure.environment(args.device) | {"ceilings": {}}
    path = (args.out or measure.RESULTS / measure.device_slug(env)) / "sweep.json"
    measure.write_results(path, env, rows, crossovers=crossovers)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
