"""Measure the benchmark workloads, in order of priority, within a time limit; skip those already measured.

    python scripts/gpu/measure_workloads.py OUT.jsonl [--limit 400] [--id TEXT] [--sweeps own compile]
        [--workloads SUBSTRING]
    python scripts/gpu/measure_workloads.py OUT.jsonl --fold FOLDER     # write FAMILY.json as in benchmarks/results

The first sweep times fastkd's kernels and eager on all workloads; the second times torch.compile, the reference and
eager again. Each workload runs in its own process, as in benchmarks/run.py: a crash or hang affects only that workload.
Appends a line per measured mode ({"id", "family", "work", "sweep", "rows"}), one per finished workload ({"ended"})
and, once per run, the environment and the ceilings.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parents[1]))  # behind an installed fastkd
import processes  # noqa: E402
import torch  # noqa: E402
from records import Row, Tail, append, read  # noqa: E402

from benchmarks import measure, providers, run, table, workloads  # noqa: E402

LIMITS = {"own": 60, "compile": 150, "autotune": 300}  # seconds per workload and sweep
MIN_SECONDS = 8  # do not start a workload with less time left


class Session:
    """The workloads of one call and the lines of the results file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.end = time.monotonic() + args.limit
        self.kind = torch.device(args.device).type
        dtypes = tuple(getattr(torch, name) for name in args.dtype) if args.dtype else None
        self.workloads = [w for w in workloads.by_value(self.kind, dtypes) if args.workloads in w.name]
        self.lines = [line for line in read(args.out) if line.get("id") == args.id]

    @property
    def left(self) -> float:
        """Return the seconds left until the limit."""
        return self.end - time.monotonic()

    def add(self, line: Row) -> None:
        """Append a line with this run's id."""
        line = {"id": self.args.id} | line
        self.lines.append(line)
        append(self.args.out, line)

    def todo(self) -> list[tuple[str, workloads.Workload]]:
        """Return the unfinished workloads, sweep by sweep; within a sweep, earlier failures come last."""
        ended = {(line["sweep"], line["work"]): line["ended"] for line in self.lines if "ended" in line}
        every = [(sweep, workload) for sweep in self.args.sweeps for workload in self.workloads]
        left = [(sweep, workload) for sweep, workload in every if not ended.get((sweep, workload.name))]
        return sorted(left, key=lambda x: (self.args.sweeps.index(x[0]), (x[0], x[1].name) in ended))

    def child(self, workload: workloads.Workload | None, names: list[str], about: Row, limit: float) -> int:
        """Measure one workload, or the ceilings, in a child process, appending its lines; return its exit status."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lines.jsonl"
            tail = Tail(path)

            def copy() -> None:
                for line in tail.rows():
                    self.add(about | line)

            command = run.child_command(workload, self.args.device, self.args.seconds, names, path, workload is None)
            return processes.run(command, limit, on_tick=copy, on_line=lambda line: print(line, flush=True))

    def measure(self, sweep: str, workload: workloads.Workload) -> bool:
        """Measure one workload in one sweep; return whether all of fastkd's backends succeeded."""
        names = providers.in_sweep(workload, self.kind, sweep)
        about = {"family": workload.family, "work": workload.name, "sweep": sweep}
        full_limit = self.args.workload_seconds or LIMITS[sweep]
        limit, first, begin = min(self.left, full_limit), len(self.lines), time.monotonic()
        status = self.child(workload, names, about, limit)
        rows = [row for line in self.lines[first:] for row in line.get("rows", [])]
        print(f"{sweep}: {workload.name} ({time.monotonic() - begin:.0f} s): {short_times(workload, rows)}", flush=True)
        if status == processes.TIMED_OUT and limit < full_limit:
            return False  # out of time for the whole call: the next call measures this workload
        reason = f"timed out after {limit:.0f} s" if status == processes.TIMED_OUT else f"exited with status {status}"
        note = {} if status == 0 else {"note": f"the process {reason}"}
        if note:
            print(f"  {note['note']}", flush=True)
            self.add(about | {"rows": run.missing_rows(workload, names, rows, note["note"])})
        self.add(about | {"ended": status == 0, "seconds": round(time.monotonic() - begin, 1)} | note)
        required = providers.fastkd_backends(workload.family, self.kind)
        for row in [row for row in rows if not row["ok"]]:
            print(f"  {row['provider']} {row['mode']}: {row['note']}", flush=True)
        return status == 0 and all(row["ok"] for row in rows if row["provider"] in required)

    def run_all(self) -> int:
        """Measure the unfinished workloads until the limit; return the exit status."""
        if self.todo():
            self.add({"environment": measure.environment(self.args.device)})
            if not any("ceilings" in line for line in self.lines):
                self.child(None, [], {}, min(self.left, LIMITS["own"]))
        good = True
        for sweep, workload in self.todo():
            if self.left < MIN_SECONDS:
                break
            good &= self.measure(sweep, workload)
        left = self.todo()
        print(summary(self.lines, self.workloads))
        if left:
            print(f"not measured: {len(left)} of {len(self.args.sweeps) * len(self.workloads)} workloads and sweeps")
        return 0 if good and not left else 1


def short_times(workload: workloads.Workload, rows: list[Row]) -> str:
    """Return each provider's median in the mode of the targets, as text."""
    shown = [r for r in rows if r["mode"] == workload.target_mode and r["ok"]]
    return ", ".join(f"{r['provider']} {r['ms']['median']:.3f} ms" for r in shown) or "no times"


def merge_lines(lines: list[Row]) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """Return the environment with the best ceilings, and each family's rows, keeping the latest of each."""
    environment: dict[str, Any] = {}
    ceilings: dict[str, float] = {}
    rows: dict[tuple[str, ...], Row] = {}
    for line in lines:
        environment = line.get("environment", environment)
        ceilings |= {name: max(rate, ceilings.get(name, 0)) for name, rate in line.get("ceilings", {}).items()}
        for row in line.get("rows", []):
            rows[line["family"], row["work"], row["mode"], row["provider"], line["sweep"]] = row | {
                "sweep": line["sweep"]
            }
    families: dict[str, list[Row]] = {}
    for (family, *_), row in rows.items():
        families.setdefault(family, []).append(row)
    for found in families.values():
        run.set_shares(found, ceilings)
    return environment | {"ceilings": ceilings}, families


def summary(lines: list[Row], todo: list[workloads.Workload]) -> str:
    rows = [row for found in merge_lines(lines)[1].values() for row in found]
    measured = {row["work"] for row in rows}
    return table.against_targets([workload for workload in todo if workload.name in measured], rows)


def fold(path: Path, folder: Path, run_id: str | None) -> int:
    """Write FAMILY.json of the last run in the file, or of the given run."""
    lines = read(path)
    last = run_id or next((line["id"] for line in reversed(lines) if "rows" in line), None)
    environment, families = merge_lines([line for line in lines if line.get("id") == last])
    for family, rows in families.items():
        measure.write_results(folder / f"{family}.json", environment, rows)
        print(f"{folder / family}.json: {len(rows)} rows")
    return 0 if families else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", help="default: the dtype used for training on the device")
    parser.add_argument("--workloads", default="", metavar="SUBSTRING", help="only workloads whose name contains it")
    parser.add_argument("--sweeps", nargs="+", default=["own", "compile"], choices=workloads.SWEEPS)
    parser.add_argument("--limit", type=float, default=400, help="seconds of the whole call")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per workload after warm-up")
    parser.add_argument("--workload-seconds", type=float, help="limit of one workload's process")
    parser.add_argument("--id", help="identifies the build under test; workloads finished with the same id are skipped")
    parser.add_argument("--fold", type=Path, metavar="FOLDER", help="only write the results files")
    args = parser.parse_args()
    if args.fold is not None:
        return fold(args.out, args.fold, args.id)
    args.id = args.id or ""
    processes.end_on_sigterm()
    return Session(args).run_all()


if __name__ == "__main__":
    sys.exit(main())
