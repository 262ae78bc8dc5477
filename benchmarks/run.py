"""Compare every provider of each family on this machine, against the targets, and write the figures.

    python -m benchmarks [--family relation] [--works SUBSTRING] [--dtype bfloat16] [--seconds 10] [--out FOLDER]

Each work runs in its own process, where all providers are timed in turn, round after round, and compared by
medians. Prints one line per work and kernel of fastkd, forward and backward; a figure that misses its target, in
parentheses, is marked ``!``, next to the ratio at the limit. ``--all`` prints every provider and mode. See
docs/benchmarks.md.
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

from benchmarks import formulas, measure, memory, roofline, table, workloads
from fastkd._console import plain_characters

Rows = list[dict[str, Any]]


SHARES = {"forward": 0.3, "both": 0.7, "graph": 0.4}  # of the time that a work has


def compare(work: workloads.Work, device: str, seconds: float, names: list[str]) -> Iterator[Rows]:
    """Yield, mode by mode, a row per provider; one that cannot run is a row with ``ok: false`` and a note."""
    inputs = work.inputs(device)
    exact = formulas.exact_gradients(work, inputs)
    failed = {name: why for name in names if (why := workloads.unavailable(name, work.family, device)) is not None}
    errors, losses = {}, {}
    for name in [name for name in names if name not in failed]:
        try:
            losses[name] = workloads.loss_of(work, name)
            errors[name] = error(workloads.step_of(work, name, "both", inputs, losses[name])(), exact)
        except Exception as reason:  # out of memory, a compiler that is missing, ...: a row that says so
            failed[name] = in_words(reason)
    del exact
    whole = sum(SHARES[mode] for mode in work.modes)
    for mode in work.modes:
        both = mode != "forward"
        steps, failed_here = {}, dict(failed)
        for name in [name for name in names if name not in failed]:
            try:
                step = workloads.step_of(work, name, mode, inputs, losses[name])
                if device.startswith("cuda"):
                    step()
                    measure.synchronize(device)
                steps[name] = step
            except Exception as reason:  # a CUDA graph that cannot be recorded, a kernel that cannot be launched
                failed_here[name] = in_words(reason)
        share = SHARES[mode] / whole
        times = measure.alternate(steps, device, share * seconds, least=5 if both else 3, slow={"eager_nn"})
        rows: Rows = []
        for name in names:
            row = blank_row(work, mode, name)
            row |= {"error_vs_fp64": errors.get(name), "ok": name in steps, "note": failed_here.get(name, "")}
            if name in steps:
                row["ms"] = measure.summary(times[name])
                if mode != "graph" and (both or name != "eager_nn"):  # a graph's memory is its own
                    row["peak_extra_bytes"] = memory.peak_extra_bytes(steps[name], device)
                if both and name != "eager_nn" and device == "cpu":
                    row["peak_resident_bytes"] = memory.peak_resident_bytes(steps[name])
                if name == "eager_nn":
                    row["note"] = "sample by sample: the batch's N×N matrices would not fit"
            rows.append(row)
        yield rows


def in_words(reason: Exception) -> str:
    return f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"


def blank_row(work: workloads.Work, mode: str, provider: str) -> dict[str, Any]:
    least = roofline.minimum(work, mode)
    return {
        "work": work.name,
        "loss": work.loss,
        "shape": list(work.shape),
        "dtype": work.dtype_name,
        "mode": mode,
        "provider": provider,
        "ms": None,
        "peak_extra_bytes": None,
        "peak_resident_bytes": None,
        "min_bytes": least["bytes"],
        "min_flop": least["flop"],
        "min_flop_dtype": roofline.arithmetic(work),
        "min_exp": least["exp"],
        "share_of_limit": None,
        "share_of_copy": None,
        "share_of_product": None,
        "error_vs_fp64": None,
        "ok": False,
        "note": "",
    }


def error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """‖gradient − exact‖ / ‖exact‖, the largest over the student's inputs."""
    pairs = zip(got, exact, strict=True)
    return max(((g.double() - e).norm() / e.norm()).item() for g, e in pairs)


def child_command(
    work: workloads.Work | None, device: str, seconds: float, names: list[str], path: Path, ceilings: bool
) -> list[str]:
    """Return the command that measures one work, or the ceilings alone, in its own process: see ``child``."""
    one = ["--device", device, "--seconds", str(seconds), "--one-to", str(path), *(["--ceilings"] if ceilings else [])]
    if work is not None:
        one += ["--family", work.family, "--dtype", work.dtype_name, "--one", work.name, "--providers", *names]
    return [sys.executable, str(Path(__file__).parent), *one]


def child(
    work: workloads.Work | None, device: str, seconds: float, names: list[str], path: Path, ceilings: bool
) -> None:
    """Measure one work, in this process: a line ``{"ceilings"}`` if asked for, and ``{"rows"}`` after each mode."""
    with path.open("a", encoding="utf-8") as file:
        if ceilings:
            print(json.dumps({"ceilings": measure.ceilings(device)}), file=file, flush=True)
        for rows in compare(work, device, seconds, names) if work is not None else ():
            print(json.dumps({"rows": rows}), file=file, flush=True)


def in_its_own_process(
    work: workloads.Work, device: str, seconds: float, names: list[str], ceilings: bool
) -> dict[str, Any]:
    """``{"rows", "ceilings"}`` of one work. Allocators, threads and compiled graphs of others don't touch it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        done = subprocess.run(child_command(work, device, seconds, names, path, ceilings), check=False)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = [row for line in lines for row in line.get("rows", [])]
    found = {name: rate for line in lines for name, rate in line.get("ceilings", {}).items()}
    note = f"its process ended with status {done.returncode}"
    return {"rows": rows + missing(work, names, rows, note), "ceilings": found}


def missing(work: workloads.Work, names: list[str], rows: Rows, note: str) -> Rows:
    """Return a row with ``note`` for each mode and provider that ``rows`` lack."""
    there = {(row["mode"], row["provider"]) for row in rows}
    blank = [blank_row(work, mode, name) for mode in work.modes for name in names if (mode, name) not in there]
    return [row | {"note": note} for row in blank]


def earlier(path: Path, now: set[str], best: dict[str, float]) -> Rows:
    """The rows of a results file whose works are not measured now, with their commit; their ceilings count too."""
    if not path.exists():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    best |= {name: max(rate, best.get(name, 0)) for name, rate in old["environment"]["ceilings"].items()}
    commit = {"commit": old["environment"]["commit"]}
    return [commit | row for row in old["rows"] if row["work"] not in now]


def set_shares(rows: Rows, ceilings: dict[str, float]) -> None:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=list(workloads.WORKS), choices=list(workloads.WORKS))
    parser.add_argument("--works", default="", metavar="SUBSTRING", help="only works whose name has it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", help="float32, bfloat16, float16; default: what the device trains in")
    parser.add_argument("--seconds", type=float, default=8.0, help="time to spend on each work, once it is warm")
    parser.add_argument(
        "--autotune", action="store_true", help="torch.compile(mode='max-autotune') too, as compile_max"
    )
    parser.add_argument("--all", action="store_true", help="print every provider and mode")
    parser.add_argument("--out", type=Path, help="folder for FAMILY.json; default: benchmarks/results/DEVICE")
    parser.add_argument("--keep", action="store_true", help="keep what FAMILY.json holds of works not measured now")
    for name, options in {"one": {}, "one-to": {"type": Path}, "providers": {"nargs": "+"}}.items():
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **options)
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    dtypes = tuple(getattr(torch, name) for name in args.dtype) if args.dtype else None
    chosen = {
        family: [w for w in workloads.works(family, torch.device(args.device).type, dtypes) if args.works in w.name]
        for family in args.family
    }
    if args.one_to is not None:
        (work,) = [w for w in chosen[args.family[0]] if w.name == args.one] if args.one else [None]
        child(work, args.device, args.seconds, args.providers, args.one_to, args.ceilings)
        return 0

    env = measure.environment(args.device) | {"ceilings": {}}
    best: dict[str, float] = env["ceilings"]
    print(f"{env['device']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}", flush=True)
    results: dict[str, Rows] = {}
    for family, todo in chosen.items():
        path = (args.out or measure.RESULTS / measure.slug(env)) / f"{family}.json"
        results[family] = earlier(path, {work.name for work in todo}, best) if args.keep else []
        for work in todo:
            names = workloads.providers(work, torch.device(args.device).type, args.autotune)
            again = not best or args.device == "cpu"  # other load makes a CPU's best hard to see: the best of all
            result = in_its_own_process(work, args.device, args.seconds, names, again)
            results[family] += result["rows"]
            best |= {name: max(rate, best.get(name, 0)) for name, rate in result["ceilings"].items()}
            for name in [name for name in results if results[name]]:  # a later ceiling changes earlier shares
                set_shares(results[name], best)
                measure.write(path.with_name(f"{name}.json"), env, results[name])
            print(f"  {work.name}", flush=True)
    print("ceilings: " + ", ".join(f"{name} {rate:.3g}" for name, rate in best.items()))
    everything = [row for rows in results.values() for row in rows]
    measured = {row["work"] for row in everything}
    todo = [w for f in chosen for w in workloads.works(f, torch.device(args.device).type, dtypes) if w.name in measured]
    print(table.every_row(everything) if args.all else table.against_targets(todo, everything))
    return 0 if all(row["ok"] for row in everything) else 1
