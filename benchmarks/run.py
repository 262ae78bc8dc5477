"""Compare every provider of each family on this machine, against the targets, and write the figures.

    python benchmarks/run.py [--family relation] [--works SUBSTRING] [--dtype bfloat16] [--seconds 10] [--out FOLDER]

Each work runs in a process of its own, where all providers are timed in turn, round after round, and compared by
medians. Prints one line per work and kernel of fastkd, forward and backward; a figure that misses its target, in
parentheses, is marked ``!``, beside the ratio at the limit. ``--all`` prints every provider and mode. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import formulas
import limits
import measure
import memory
import table
import torch
import works

Rows = list[dict[str, Any]]


def compare(work: works.Work, device: str, seconds: float, autotune: bool = False) -> Rows:
    """One row per provider and mode; a provider that cannot run is a row with ``ok: false`` and a note."""
    inputs = work.inputs(device)
    exact = formulas.exact_gradients(work, inputs)
    names = works.providers(work, torch.device(device).type, autotune)
    failed = {name: why for name in names if (why := works.unavailable(name, work.family, device)) is not None}
    errors, losses = {}, {}
    for name in [name for name in names if name not in failed]:
        try:
            losses[name] = works.loss_of(work, name)
            errors[name] = error(works.step_of(work, name, "both", inputs, losses[name])(), exact)
        except Exception as reason:  # out of memory, a compiler that is missing, ...: a row that says so
            failed[name] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"
    del exact
    rows: Rows = []
    for mode in work.modes:
        steps = {name: works.step_of(work, name, mode, inputs, losses[name]) for name in names if name not in failed}
        both = mode != "forward"
        share = 0.7 if both else 0.3
        times = measure.alternate(steps, device, share * seconds, least=5 if both else 3, slow={"eager_nn"})
        for name in names:
            row = blank_row(work, mode, name)
            row |= {"error_vs_fp64": errors.get(name), "ok": name not in failed, "note": failed.get(name, "")}
            if name not in failed:
                row["ms"] = measure.summary(times[name])
                if both or name != "eager_nn":
                    row["peak_extra_bytes"] = memory.peak_extra_bytes(steps[name], device)
                if both and name != "eager_nn" and device == "cpu":
                    row["peak_resident_bytes"] = memory.peak_resident_bytes(steps[name])
                if name == "eager_nn":
                    row["note"] = "sample by sample: the batch's N×N matrices would not fit"
            rows.append(row)
    return rows


def blank_row(work: works.Work, mode: str, provider: str) -> dict[str, Any]:
    least = limits.minimum(work, mode)
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
        "min_flop_dtype": limits.arithmetic(work),
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


def in_its_own_process(work: works.Work, device: str, seconds: float, autotune: bool) -> dict[str, Any]:
    """``{"rows", "ceilings"}`` of one work. Allocators, threads and compiled graphs of others don't touch it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        arguments = ["--device", device, "--seconds", str(seconds), "--dtype", work.dtype_name]
        arguments += ["--autotune"] if autotune else []
        one = ["--family", work.family, "--one", work.name, "--one-to", str(path)]
        done = subprocess.run([sys.executable, __file__, *arguments, *one], check=False)
        if path.exists():
            return json.loads(path.read_text())
    note = f"its process ended with status {done.returncode}"
    names = works.providers(work, torch.device(device).type, autotune)
    return {"rows": [blank_row(work, m, n) | {"note": note} for m in work.modes for n in names], "ceilings": {}}


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
            row["share_of_limit"] = round(1e3 * limits.seconds(least, ceilings, dtype) / ms, 3)
            for of, key in (("copy", "bytes"), ("product", "flop")):
                alone = {k: n if k == key else 0 for k, n in least.items()}
                row[f"share_of_{of}"] = round(1e3 * limits.seconds(alone, ceilings, dtype) / ms, 3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=list(works.WORKS), choices=list(works.WORKS))
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
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--one-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    dtypes = tuple(getattr(torch, name) for name in args.dtype) if args.dtype else None
    chosen = {
        family: [w for w in works.works(family, torch.device(args.device).type, dtypes) if args.works in w.name]
        for family in args.family
    }
    if args.one is not None:
        (work,) = [w for w in chosen[args.family[0]] if w.name == args.one]
        result = {
            "ceilings": measure.ceilings(args.device),
            "rows": compare(work, args.device, args.seconds, args.autotune),
        }
        args.one_to.write_text(json.dumps(result))
        return 0

    env = measure.environment(args.device) | {"ceilings": {}}
    best: dict[str, float] = env["ceilings"]
    print(f"{env['device']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}", flush=True)
    results: dict[str, Rows] = {}
    for family, todo in chosen.items():
        path = (args.out or measure.RESULTS / measure.slug(env)) / f"{family}.json"
        results[family] = earlier(path, {work.name for work in todo}, best) if args.keep else []
        for work in todo:
            result = in_its_own_process(work, args.device, args.seconds, args.autotune)
            results[family] += result["rows"]
            best |= {name: max(rate, best.get(name, 0)) for name, rate in result["ceilings"].items()}
            for name in [name for name in results if results[name]]:  # a later ceiling changes earlier shares
                set_shares(results[name], best)
                measure.write(path.with_name(f"{name}.json"), env, results[name])
            print(f"  {work.name}", flush=True)
    print("ceilings: " + ", ".join(f"{name} {rate:.3g}" for name, rate in best.items()))
    everything = [row for rows in results.values() for row in rows]
    measured = {row["work"] for row in everything}
    todo = [w for f in chosen for w in works.works(f, torch.device(args.device).type, dtypes) if w.name in measured]
    print(table.every_row(everything) if args.all else table.against_targets(todo, everything))
    return 0 if all(row["ok"] for row in everything) else 1


if __name__ == "__main__":
    sys.exit(main())
