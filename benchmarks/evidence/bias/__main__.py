"""Measure how much of a teacher's bias each loss hands on.

    python -m benchmarks.evidence.bias run --jobs 2                 # make what is missing, two runs side by side
    python -m benchmarks.evidence.bias page                         # print the tables
    python -m benchmarks.evidence.bias page --write docs/evidence.md   # between its markers, and evidence-bias.svg

Sets, teachers, caches and students are written to runs/bias, results to benchmarks/evidence/bias/results.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.bias.figure import bias_figure
from benchmarks.evidence.bias.measure import ALONE, BIASED, CONTROL, TEACHER, group
from benchmarks.evidence.bias.study import load_grids, make_sets, make_teachers, run_missing
from benchmarks.evidence.bias.tables import matched_table, models_table, shares_table
from benchmarks.table import write_between
from fastkd._atomic import replace_files
from fastkd._console import plain_characters
from fastkd.cli._grid.grid import check_rows
from fastkd.cli._grid.records import Record, read_records

FOLDER = Path(__file__).resolve().parent
MARKERS = ("<!-- bias: begin (written by benchmarks/evidence/bias) -->", "<!-- bias: end -->")


def digest_of(path: Path) -> str:
    """Return a digest of the results, which the page states."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def page(records: list[Record], digest: str, resamples: int = 10_000) -> str:
    """Return the generated part of the page."""
    found = group(records)
    needed = ((BIASED, TEACHER), (CONTROL, TEACHER), (BIASED, ALONE))
    if lacking := [f"{row} of {setting}" for setting, row in needed if (setting, row, 1.0) not in found]:
        raise SystemExit(f"no results of {', '.join(lacking)}: run `python -m benchmarks.evidence.bias run`")
    runs = [r for r in records if r["row"] != TEACHER]
    made = {name: ", ".join(sorted({str(r[name]) for r in runs})) for name in ("steps", "processor", "torch", "commit")}
    parts = [
        f"Made from results with digest `{digest}`. Intervals: 95 %, [paired bootstrap](#intervals) over seeds, then"
        " images; with one seed, over images only. Bold: two seeds or more, and 0 is outside.",
        "Models on sentences that no bias touches, and their biases:",
        models_table(found),
        "Gain over the student alone on untouched sentences, and the share of the teacher's bias handed on (%):",
        shares_table(found, resamples),
    ]
    if matched := matched_table(found, resamples):
        parts += ["Difference in the share handed on, at a gain that both rows have (points between factors):", matched]
    parts += [
        "![Share of the teacher's bias handed on by each loss, over its gain](evidence-bias.svg)",
        f"Steps: {made['steps']}. Processor: {made['processor']}; torch {made['torch']}; one thread; commit"
        f" {made['commit']}.",
    ]
    return "\n\n".join(parts)


@plain_characters()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--rows", nargs="+", default=[], help="run only these rows, and the student alone")
    parser.add_argument("--runs", type=int, help="run at most so many")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, with one thread each")
    parser.add_argument("--results", type=Path, default=FOLDER / "results.jsonl", help="file of the results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page with the markers; its figure is next to it")
    parser.add_argument("--resamples", type=int, default=10_000)
    args = parser.parse_args(argv)
    if args.what == "run":
        return run(args.rows, args.runs, args.jobs, args.results)
    records = read_records(args.results)
    text = page(records, digest_of(args.results) if records else "", args.resamples)
    if args.write is None:
        print(text)
        return 0
    with replace_files(args.write.with_name("evidence-bias.svg")) as (partial,):
        partial.write_text(bias_figure(group(records), args.resamples), encoding="utf-8")
    write_between(args.write, *MARKERS, text)
    return 0


def run(rows: Sequence[str], limit: int | None, jobs: int, results: Path) -> int:
    """Make sets, teachers and caches, then the runs of some rows, or of all, that the results lack."""
    grids = [replace(grid, results=results.resolve()) for grid in load_grids()]
    check_rows(rows, grids[0].rows, "--rows")
    work = grids[0].work
    make_sets(work / "data")
    make_teachers(work / "teachers", work / "data")
    run_missing(grids, rows, limit, jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
