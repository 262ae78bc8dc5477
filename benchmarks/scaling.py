"""Fit the growth of time and memory with the number of pixels N = 900 ... 14400.

    python -m benchmarks.scaling [--seconds 4] [--out FOLDER]

Time of ``cross_modal_kd`` (4, N, T=20, D=128) and extra memory of ``pixel_relation_kd`` (1, 64, √N, √N), forward and
backward. The exponent is the slope of a least-squares line in log–log space; 1 is linear. Writes scaling.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, memory, providers, run, workloads
from fastkd._console import plain_characters

SIDES = (30, 45, 60, 90, 120)
EAGER_MAX_SIDE = 60  # N×N matrices of larger maps take gigabytes


def measure_workload(
    workload: workloads.Workload, names: list[str], device: str, seconds: float, memory_only: bool
) -> run.Rows:
    """Return one row per provider: extra memory, and unless ``memory_only`` the times of both passes."""
    inputs = workload.inputs(device)
    failed = {
        name: why for name in names if (why := providers.unavailable_reason(name, workload.family, device)) is not None
    }
    steps = {name: providers.make_step(workload, name, "both", inputs) for name in names if name not in failed}
    times = {} if memory_only else measure.time_in_turns(steps, device, seconds)
    rows = []
    for name in names:
        row = run.empty_row(workload, "both", name) | {"ok": name not in failed, "note": failed.get(name, "")}
        if name in steps:
            row["peak_extra_bytes"] = memory.peak_extra_bytes(steps[name], device)
            row["ms"] = None if memory_only else measure.percentiles(times[name])
        rows.append(row)
    return rows


def exponent(points: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of log y over log x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def fit(quantity: str, rows: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one fit per provider of time or memory over N."""
    fits = []
    for name in dict.fromkeys(row["provider"] for _, row in rows):
        mine = [(n, row) for n, row in rows if row["provider"] == name and row["ok"]]
        points = [(n, row["ms"]["median"] if quantity == "ms" else row["peak_extra_bytes"]) for n, row in mine]
        found = {"exponent": round(exponent(points), 3), "last": round(exponent(points[-2:]), 3)} if points else {}
        loss = rows[0][1]["loss"]
        fits.append({"loss": loss, "provider": name, "quantity": quantity, "points": points} | found)
    return fits


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on each N")
    parser.add_argument("--out", type=Path, help="folder for scaling.json; default: benchmarks/results/DEVICE")
    args = parser.parse_args(argv)
    kind = torch.device(args.device).type
    times, bytes_ = [], []
    for side in SIDES:
        workload = workloads.Workload("pixel_word", "cross_modal_kd", (4, side * side, 20, 128))
        names = ["eager", *providers.fastkd_backends(workload.family, kind)]
        times += [(side * side, row) for row in measure_workload(workload, names, args.device, args.seconds, False)]
        workload = workloads.Workload("relation", "pixel_relation_kd", (1, 64, side, side), distance="kl")
        names = [*(["eager"] if side <= EAGER_MAX_SIDE else []), *providers.fastkd_backends(workload.family, kind)]
        bytes_ += [(side * side, row) for row in measure_workload(workload, names, args.device, args.seconds, True)]
        print(f"  N = {side * side}", flush=True)
    fits = fit("ms", times) + fit("peak_extra_bytes", bytes_)
    for found in fits:
        head = f"{found['loss']:18} {found['provider']:8} {found['quantity']:16}"
        if "exponent" not in found:
            print(f"{head} not measured")
            continue
        points = ", ".join(f"{n}: {y / 2**20:.1f} MiB" if y > 1e5 else f"{n}: {y:.2f} ms" for n, y in found["points"])
        print(f"{head} N^{found['exponent']:.2f} (last step N^{found['last']:.2f}): {points}")
    env = measure.environment(args.device) | {"ceilings": measure.ceilings(args.device)}
    rows = [row for _, row in times + bytes_]
    run.set_shares([row for row in rows if row["ms"]], env["ceilings"])
    measure.write_results(
        (args.out or measure.RESULTS / measure.device_slug(env)) / "scaling.json", env, rows, fits=fits
    )
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
