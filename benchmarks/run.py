"""Compare every provider of a family on this machine and write the figures with their environment.

    python benchmarks/run.py [--family softmax_kl] [--device cpu] [--seconds 10] [--out FOLDER]

All providers of a work are timed in turn, round after round, and compared by medians. The machine's ceilings (bytes
copied, products, exponentials per second) are measured in the same run; ``share_of_limit`` is the time that the least
possible bytes and exponentials would take at those rates over the time taken.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import measure
import torch
import works
from torch import Tensor

MODES = ("forward", "both")


def compare(work: works.Work, device: str, seconds: float, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """One row per provider and mode; a provider that cannot run is a row with ``ok: false`` and a note."""
    student, teacher = work.inputs(device)
    exact = gradient(works.FORMULAS[work.loss][0], student.detach().double(), teacher.double())
    names = works.providers(work.family, torch.device(device).type)
    failed = {name: reason for name in names if (reason := works.unavailable(name, work.family, device)) is not None}
    errors = {}
    for name in [name for name in names if name not in failed]:
        try:
            got = gradient(works.loss_of(work, name), student.detach(), teacher).double()
            errors[name] = ((got - exact).norm() / exact.norm()).item()
        except Exception as error:  # out of memory, a compiler that is missing, ...: a row that says so
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    del exact
    rows = []
    for mode in MODES:
        steps = {name: works.step_of(work, name, mode, student, teacher) for name in names if name not in failed}
        times = measure.alternate(steps, device, seconds / len(MODES))
        least = work.minimum(mode)
        limit = 1e3 * max(least["bytes"] / ceilings["copy_bytes_per_s"], least["exp"] / ceilings["exp_per_s"])
        for name in names:
            row: dict[str, Any] = {
                "work": work.name,
                "loss": work.loss,
                "shape": list(work.shape),
                "dtype": str(work.dtype).removeprefix("torch."),
                "mode": mode,
                "provider": name,
                "ms": None,
                "peak_extra_bytes": None,
                "min_bytes": least["bytes"],
                "min_flop": least["flop"],
                "min_exp": least["exp"],
                "share_of_limit": None,
                "error_vs_fp64": errors.get(name),
                "ok": name not in failed,
                "note": failed.get(name, ""),
            }
            if name not in failed:
                row["ms"] = measure.summary(times[name])
                row["share_of_limit"] = round(limit / row["ms"]["median"], 3)
                row["peak_extra_bytes"] = measure.peak_extra_bytes(steps[name], device)
            rows.append(row)
    return rows


def gradient(loss: Any, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.requires_grad_()
    return torch.autograd.grad(loss(student, teacher), student)[0]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: medians, and how many times faster than eager and torch.compile."""
    lines = [
        f"{'work':48} {'mode':8} {'provider':10} {'ms':>9} {'/eager':>7} {'/compile':>8} {'limit':>6} {'error':>8}"
    ]
    medians = {(r["work"], r["mode"], r["provider"]): r["ms"]["median"] for r in rows if r["ok"]}
    for r in rows:
        head = f"{r['work']:48} {r['mode']:8} {r['provider']:10}"
        if not r["ok"]:
            lines.append(f"{head} not measured: {r['note']}")
            continue
        ratios = [medians.get((r["work"], r["mode"], base)) for base in ("eager", "compile")]
        eager, compiled = ("-" if base is None else f"{base / r['ms']['median']:.2f}x" for base in ratios)
        lines.append(
            f"{head} {r['ms']['median']:>9.3f} {eager:>7} {compiled:>8} {r['share_of_limit']:>6.0%} "
            f"{r['error_vs_fp64']:>8.1e}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=list(works.SHAPES), choices=list(works.SHAPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", help="float32, bfloat16, float16; default: what the device trains in")
    parser.add_argument("--seconds", type=float, default=8.0, help="time to spend on each work")
    parser.add_argument("--shapes", type=int, help="only the first so many shapes")
    parser.add_argument("--out", type=Path, help="folder for FAMILY.json; default: benchmarks/results/DEVICE")
    args = parser.parse_args(argv)
    dtypes = tuple(getattr(torch, name) for name in args.dtype) if args.dtype else None
    env = measure.environment(args.device)
    print(f"{env['device']}, torch {env['torch']}: {env['ceilings']}")
    ok = True
    for family in args.family:
        rows: list[dict[str, Any]] = []
        path = (args.out or measure.RESULTS / measure.slug(env)) / f"{family}.json"
        for work in works.works(family, torch.device(args.device).type, dtypes)[: args.shapes]:
            rows += compare(work, args.device, args.seconds, env["ceilings"])
            measure.write(path, env, rows)  # after each work: a run that is cut short leaves what it has
        print(table(rows))
        print(f"written to {path}")
        ok = ok and all(row["ok"] for row in rows)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
