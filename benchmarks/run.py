"""Time every provider of each family's workloads on this machine and compare them with the targets.

    python -m benchmarks [--family relation] [--workloads SUBSTRING] [--dtype bfloat16] [--seconds 10] [--out FOLDER]

Each workload runs in its own process, which times all providers in turn, round after round, and compares medians.
Prints one line per workload and fastkd backend, forward plus backward, with targets in parentheses. ``!`` marks a
missed target, preceded by the speed-up that a kernel at the roofline would have. ``--all`` prints every provider and
mode. Writes FAMILY.json. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import formulas, measure, memory, providers, roofline, table, workloads
from fastkd._console import plain_characters

Rows = list[dict[str, Any]]

SHARES = {"forward": 0.3, "both": 0.7, "graph": 0.4}  # relative, of a workload's time


def compare(workload: workloads.Workload, device: str, seconds: float, names: list[str]) -> Iterator[Rows]:
    """Yield the rows of each mode, one per provider; a provider that cannot run has ``ok: false`` and a note."""
    inputs = workload.inputs(device)
    exact = formulas.exact_gradients(workload, inputs)
    failed = {
        name: reason
        for name in names
        if (reason := providers.unavailable_reason(name, workload.family, device)) is not None
    }
    errors, losses = {}, {}
    for name in [name for name in names if name not in failed]:
        try:
            losses[name] = providers.loss_fn(workload, name)
            errors[name] = relative_error(providers.make_step(workload, name, "both", inputs, losses[name])(), exact)
        except Exception as exception:  # such as out of memory or a missing compiler
            failed[name] = summarize_error(exception)
    del exact
    whole = sum(SHARES[mode] for mode in workload.modes)
    for mode in workload.modes:
        both = mode != "forward"
        steps, failed_here = {}, dict(failed)
        for name in [name for name in names if name not in failed]:
            try:
                step = providers.make_step(workload, name, mode, inputs, losses[name])
                if device.startswith("cuda"):
                    step()
                    measure.synchronize(device)
                steps[name] = step
            except Exception as exception:  # such as a failed graph capture or launch
                failed_here[name] = summarize_error(exception)
        share = SHARES[mode] / whole
        times = measure.time_in_turns(steps, device, share * seconds, min_rounds=5 if both else 3, slow={"eager_nn"})
        rows: Rows = []
        for name in names:
            row = empty_row(workload, mode, name)
            row |= {"error_vs_fp64": errors.get(name), "ok": name in steps, "note": failed_here.get(name, "")}
            if name in steps:
                row["ms"] = measure.percentiles(times[name])
                if mode != "graph" and (both or name != "eager_nn"):  # a CUDA graph has a private memory pool
                    row["peak_extra_bytes"] = memory.peak_extra_bytes(steps[name], device)
                if both and name != "eager_nn" and device == "cpu":
                    row["peak_resident_bytes"] = memory.peak_resident_bytes(steps[name])
                if name == "eager_nn":
                    row["note"] = "run sample by sample: the batch's N×N matrices would not fit in memory"
            rows.append(row)
        yield rows


def summarize_error(exception: Exception) -> str:
    """Return the type and the first line of an exception."""
    return f"{type(exception).__name__}: {(str(exception).splitlines() or [''])[0]}"


def empty_row(workload: workloads.Workload, mode: str, provider: str) -> dict[str, Any]:
    """Return a results row without measurements."""
    least = roofline.minimum(workload, mode)
    return {
        "work": workload.name,
        "loss": workload.loss,
        "shape": list(workload.shape),
        "dtype": workload.dtype_name,
        "mode": mode,
        "provider": provider,
        "ms": None,
        "peak_extra_bytes": None,
        "peak_resident_bytes": None,
        "min_bytes": least["bytes"],
        "min_flop": least["flop"],
        "min_flop_dtype": roofline.arithmetic(workload),
        "min_exp": least["exp"],
        "share_of_limit": None,
        "share_of_copy": None,
        "share_of_product": None,
        "error_vs_fp64": None,
        "ok": False,
        "note": "",
    }


def relative_error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return ‖gradient − exact‖ / ‖exact‖, the maximum over the student's inputs."""
    pairs = zip(got, exact, strict=True)
    return max(((g.double() - e).norm() / e.norm()).item() for g, e in pairs)


def child_command(
    workload: workloads.Workload | None, device: str, seconds: float, names: list[str], path: Path, ceilings: bool
) -> list[str]:
    """Return the command that measures one workload, or only the ceilings, by :func:`run_child` in a new process."""
    one = ["--device", device, "--seconds", str(seconds), "--one-to", str(path)]
    one += [*(["--ceilings"] if ceilings else []), *(["--cpu-time"] if measure.uses_cpu_time() else [])]
    if workload is not None:
        one += [
            "--family",
            workload.family,
            "--dtype",
            workload.dtype_name,
            "--one",
            workload.name,
            "--providers",
            *names,
        ]
    return [sys.executable, str(Path(__file__).parent), *one]


def run_child(
    workload: workloads.Workload | None, device: str, seconds: float, names: list[str], path: Path, ceilings: bool
) -> None:
    """Measure a workload in this process, appending ``{"ceilings"}`` if requested and ``{"rows"}`` after each mode."""
    with path.open("a", encoding="utf-8") as file:
        if ceilings:
            print(json.dumps({"ceilings": measure.ceilings(device)}), file=file, flush=True)
        for rows in compare(workload, device, seconds, names) if workload is not None else ():
            print(json.dumps({"rows": rows}), file=file, flush=True)


def run_in_subprocess(
    workload: workloads.Workload, device: str, seconds: float, names: list[str], ceilings: bool
) -> dict[str, Any]:
    """Return ``{"rows", "ceilings"}`` of a workload, isolated from other workloads' allocators, threads and graphs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        done = subprocess.run(child_command(workload, device, seconds, names, path, ceilings), check=False)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = [row for line in lines for row in line.get("rows", [])]
    found = {name: rate for line in lines for name, rate in line.get("ceilings", {}).items()}
    note = f"the process exited with status {done.returncode}"
    return {"rows": rows + missing_rows(workload, names, rows, note), "ceilings": found}


def missing_rows(workload: workloads.Workload, names: list[str], rows: Rows, note: str) -> Rows:
    """Return an empty row with ``note`` for each mode and provider that has no row."""
    present = {(row["mode"], row["provider"]) for row in rows}
    empty = [
        empty_row(workload, mode, name) for mode in workload.modes for name in names if (mode, name) not in present
    ]
    return [row | {"note": note} for row in empty]


def rows_kept(path: Path, now: set[str], best: dict[str, float]) -> Rows:
    """Return the rows of a results file that are not measured again, with their commit; update the best ceilings."""
    if not path.exists():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    best |= {name: max(rate, best.get(name, 0)) for name, rate in old["environment"]["ceilings"].items()}
    commit = {"commit": old["environment"]["commit"]}
    return [commit | row for row in old["rows"] if row["work"] not in now]


def set_shares(rows: Rows, ceilings: dict[str, float]) -> None:
    """Set the rows' shares of the roofline, of the copy bandwidth and of the matrix-product rate."""
    for row in rows:
        if row["ok"] and ceilings:
            least = {key: row[f"min_{key}"] for key in ("bytes", "flop", "exp")}
            dtype, ms = row.get("min_flop_dtype", row["dtype"]), row["ms"]["median"]
            row["share_of_limit"] = round(1e3 * roofline.seconds(least, ceilings, dtype) / ms, 3)
            for of, key in (("copy", "bytes"), ("product", "flop")):
                alone = {k: n if k == key else 0 for k, n in least.items()}
                row[f"share_of_{of}"] = round(1e3 * roofline.seconds(alone, ceilings, dtype) / ms, 3)


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--family", nargs="+", default=list(workloads.CPU_WORKLOADS), choices=list(workloads.CPU_WORKLOADS)
    )
    parser.add_argument("--workloads", default="", metavar="SUBSTRING", help="only workloads whose name contains it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", nargs="+", help="float32, bfloat16, float16; default: the dtype used for training on the device"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="time per workload after warm-up")
    parser.add_argument(
        "--autotune", action="store_true", help="also time torch.compile(mode='max-autotune'), as compile_max"
    )
    parser.add_argument("--cpu-time", action="store_true", help="time one thread in CPU seconds: for a loaded machine")
    parser.add_argument("--all", action="store_true", help="print every provider and mode")
    parser.add_argument("--out", type=Path, help="folder for FAMILY.json; default: benchmarks/results/DEVICE")
    parser.add_argument("--keep", action="store_true", help="keep rows of FAMILY.json that are not measured again")
    for name, options in {"one": {}, "one-to": {"type": Path}, "providers": {"nargs": "+"}}.items():
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **options)
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cpu_time:
        if args.device != "cpu":
            parser.error(f"--cpu-time: needs --device cpu, got {args.device}")
        measure.use_cpu_time()
    dtypes = tuple(getattr(torch, name) for name in args.dtype) if args.dtype else None
    chosen = {
        family: [
            w for w in workloads.select(family, torch.device(args.device).type, dtypes) if args.workloads in w.name
        ]
        for family in args.family
    }
    if args.one_to is not None:
        (workload,) = [w for w in chosen[args.family[0]] if w.name == args.one] if args.one else [None]
        run_child(workload, args.device, args.seconds, args.providers, args.one_to, args.ceilings)
        return 0

    env = measure.environment(args.device) | {"ceilings": {}}
    best: dict[str, float] = env["ceilings"]
    print(f"{env['device']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}", flush=True)
    results: dict[str, Rows] = {}
    for family, todo in chosen.items():
        path = (args.out or measure.RESULTS / measure.device_slug(env)) / f"{family}.json"
        results[family] = rows_kept(path, {workload.name for workload in todo}, best) if args.keep else []
        for workload in todo:
            names = providers.candidates(workload, torch.device(args.device).type, args.autotune)
            with_ceilings = not best or args.device == "cpu"  # a CPU's ceilings vary with other load: keep the best
            result = run_in_subprocess(workload, args.device, args.seconds, names, with_ceilings)
            results[family] += result["rows"]
            best |= {name: max(rate, best.get(name, 0)) for name, rate in result["ceilings"].items()}
            for name in [name for name in results if results[name]]:  # a new best ceiling changes earlier shares
                set_shares(results[name], best)
                measure.write_results(path.with_name(f"{name}.json"), env, results[name])
            print(f"  {workload.name}", flush=True)
    print("ceilings: " + ", ".join(f"{name} {rate:.3g}" for name, rate in best.items()))
    everything = [row for rows in results.values() for row in rows]
    measured = {row["work"] for row in everything}
    todo = [
        w for f in chosen for w in workloads.select(f, torch.device(args.device).type, dtypes) if w.name in measured
    ]
    print(table.every_row(everything) if args.all else table.against_targets(todo, everything))
    return 0 if all(row["ok"] for row in everything) else 1
