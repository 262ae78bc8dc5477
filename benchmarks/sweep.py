"""Find the size from which fastkd's kernels are faster, by sweeping small sizes of each loss.

    python -m benchmarks.sweep [--family relation] [--dtype float32 bfloat16] [--seconds 1] [--cpu-time] [--out FOLDER]

Times fastkd's kernel, the reference and the plain formula, forward and backward, and prints for each loss the number of
student elements from which the kernel is faster than each of the others, at all larger sizes too. These numbers set
``MIN_ELEMENTS`` in fastkd/ops/dispatch.py. Writes sweep.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, providers, run, workloads
from benchmarks.workloads import Workload
from fastkd._console import plain_characters

FIELDS = ("work", "loss", "shape", "dtype", "mode", "provider", "ms", "ok", "note")
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
    (2, 256, 30, 30),
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
    (2, 900, 20, 512),
]
HEADS = [  # B, heads, N, M, D
    (1, 1, 4, 4, 8),
    (1, 1, 16, 16, 8),
    (1, 2, 16, 16, 16),
    (1, 2, 49, 49, 16),
    (1, 4, 49, 49, 32),
    (4, 4, 49, 49, 32),
    (16, 4, 49, 49, 32),
    (1, 4, 256, 256, 64),
    (4, 4, 256, 256, 64),
]


def sweep(family: str) -> list[list[Workload]]:
    """Return the workloads of each loss, smallest first."""
    if family == "softmax_kl":
        return [[Workload(family, "channel_distribution_kd", shape) for shape in MAPS]]
    if family == "pixel_word":
        return [[Workload(family, "cross_modal_kd", shape) for shape in TOKENS]]
    if family == "attention_kl":
        return [[Workload(family, "attention_kd", shape) for shape in HEADS]]
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
    times = measure.time_in_turns(steps, device, seconds, min_rounds=5, max_rounds=2000)
    rows = []
    for name in names:
        row = {key: value for key, value in run.empty_row(workload, "both", name).items() if key in FIELDS}
        row |= {"elements": inputs[0].numel(), "note": failed.get(name, "")}
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


def sweep_loss(sizes: list[Workload], args: argparse.Namespace) -> tuple[run.Rows, list[dict[str, Any]]]:
    """Time one loss at all sizes; print and return the rows, and each kernel's crossovers."""
    family, dtype = sizes[0].family, sizes[0].dtype_name
    others = ["eager", "reference"]
    kernels = providers.fastkd_backends(family, torch.device(args.device).type)
    rows: run.Rows = []
    for workload in sizes:
        got = compare(workload, [*others, *kernels], args.device, args.seconds)
        rows += got
        times = (f"{r['provider']} {1e3 * r['ms']['median']:.0f} µs" for r in got if r["ok"])
        print(f"{workload.name:44} {elements(workload):>7} elements: {', '.join(times)}", flush=True)
    title = f"{sizes[0].loss} {sizes[0].distance}".strip()
    crossovers: list[dict[str, Any]] = []
    for kernel in kernels:
        mine = [r for r in rows if r["provider"] == kernel]
        if not all(r["ok"] for r in mine):
            print(f"  {title}: {kernel} was not measured: {mine[-1]['note']}")
            continue
        found = {other: crossover(rows, kernel, other) for other in others}
        crossovers.append({"family": family, "loss": title, "dtype": dtype, "kernel": kernel, "faster_from": found})
        sizes_found = (f"{other} {'at no size' if n is None else f'from {n} elements'}" for other, n in found.items())
        print(f"  {title}: {kernel} is faster than {', '.join(sizes_found)}")
    return rows, crossovers


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--family", nargs="+", default=list(workloads.CPU_WORKLOADS), choices=list(workloads.CPU_WORKLOADS)
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on each size")
    parser.add_argument("--cpu-time", action="store_true", help="time one thread in CPU seconds: for a loaded machine")
    parser.add_argument("--out", type=Path, help="folder for sweep.json; default: benchmarks/results/DEVICE")
    args = parser.parse_args(argv)
    if args.cpu_time:
        if args.device != "cpu":
            parser.error(f"--cpu-time: needs --device cpu, got {args.device}")
        measure.use_cpu_time()
    rows: run.Rows = []
    crossovers: list[dict[str, Any]] = []
    for dtype in args.dtype:
        for family in args.family:
            for sizes in sweep(family):
                mine, found = sweep_loss([replace(w, dtype=getattr(torch, dtype)) for w in sizes], args)
                rows += mine
                crossovers += found
    env = measure.environment(args.device) | {"ceilings": {}}
    path = (args.out or measure.RESULTS / measure.device_slug(env)) / "sweep.json"
    measure.write_results(path, env, rows, crossovers=crossovers)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
