"""Compile what the GPU workloads and the contract's cases launch, without a GPU, and print its resources on each chip.

    python -m benchmarks.aot [--json FILE] [--targets 80 90 100 120] [--dtypes fp32 bf16]

Registers, spills, shared memory and matrix instruction counts come from ``cuobjdump``, which ships with Triton. Rows
that FILE already has for the same code are not recompiled. ``benchmarks.aot.versions`` does this for every supported
version of Triton.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.aot import facts
from benchmarks.aot.cases import TARGETS

DTYPES = ("fp32", "fp16", "bf16", "fp64")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--families", nargs="+", default=facts.FAMILIES, choices=facts.FAMILIES)
    parser.add_argument(
        "--match", default="", help="only kernels and block shapes, as printed, that match this regular expression"
    )
    parser.add_argument("--jobs", type=int, help="number of compiler processes; default: one per processor")
    parser.add_argument("--sample", action="store_true", help="only one block shape of some kernels, for one chip")
    parser.add_argument("--all", action="store_true", help="recompile the rows that FILE already has")
    parser.add_argument("--list", action="store_true", help="print what would be compiled, one JSON object per line")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    selected = {
        family: list(facts.select(family, tuple(args.targets), tuple(args.dtypes), args.match))
        for family in args.families
    }
    if args.sample:
        selected = {family: facts.sample(entries) for family, entries in selected.items()}
    if args.list:
        for entries in selected.values():
            for _, _, target, case in entries:
                print(json.dumps(facts.identity(case, target)))
        return 0
    print(
        f"{'kernel':22} {'method':10} {'dtype':5} {'block':>13} {'warps':>5} {'chip':>6} {'regs':>5} {'shared':>7} "
        f"{'spills':>6} matrix instructions"
    )
    known = {} if args.all or not args.json else facts.known_rows(args.json)
    rows = []
    for entries in selected.values():
        rows += print_rows(facts.rows(entries, known, args.jobs))
    if args.json:
        facts.write_table(args.json, {"triton": version("triton")}, rows)
    return 0 if all(row["ok"] for row in rows) else 1


def print_rows(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Print each row as soon as it is compiled, and yield it."""
    for row in rows:
        matrix = ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
        print(
            f"{row['kernel']:22} {row.get('DISTANCE', ''):10} {row['dtype']:5} {facts.block_label(row):>13} "
            f"{row['warps']:>5} {row['target']:>6} {row['registers']:>5} {row['shared']:>7} {row['spills']:>6} {matrix}"
            f"{'' if row['ok'] else '  <- spills, too much shared memory, or inexact'}",
            flush=True,
        )
        yield row
