"""Measure the benchmarks' works in order of value, within a limit; what has been measured is not measured again.

    python scripts/gpu/measure_works.py OUT.jsonl [--limit 400] [--id TEXT] [--sweeps own compile] [--works SUBSTRING]
    python scripts/gpu/measure_works.py OUT.jsonl --fold FOLDER     # as FAMILY.json, the format of benchmarks/results

The first sweep measures fastkd's kernels and eager for all works, the second torch.compile, the reference and eager
again. Each work has its own process, as in benchmarks/run.py; one that dies or hangs costs its own limit. Adds a
line as each mode of a work is measured: {"id", "family", "work", "sweep", "rows"}, one as a work ends ({"ended"}), and
one with the environment and one with the ceilings per run.
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
sys.path.append(str(HERE.parents[1]))  # after an installed fastkd
import processes  # noqa: E402
import torch  # noqa: E402
from records import Row, Tail, append, read  # noqa: E402

from benchmarks import measure, run, table, workloads  # noqa: E402

LIMITS = {"own": 60, "compile": 150, "autotune": 300}  # seconds that one work has in a sweep
LEAST = 8  # seconds with which a work is not worth starting


class Session:
    """The works of one call, and the lines of the file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.end = time.monotonic() + args.limit
        self.kind = torch.device(args.device).type
        dtypes = tuple(getattr(torch, name) for name in args.dtype) if args.dtype else None
        self.works = [w for w in workloads.by_value(self.kind, dtypes) if args.works in w.name]
        self.lines = [line for line in read(args.out) if line.get("id") == args.id]

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, line: Row) -> None:
        line = {"id": self.args.id} | line
        self.lines.append(line)
        append(self.args.out, line)

    def todo(self) -> list[tuple[str, workloads.Work]]:
        """Return what has not ended yet, sweep by sweep; in each, what has failed before comes last."""
        ended = {(line["sweep"], line["work"]): line["ended"] for line in self.lines if "ended" in line}
        every = [(sweep, work) for sweep in self.args.sweeps for work in self.works]
        left = [(sweep, work) for sweep, work in every if not ended.get((sweep, work.name))]
        return sorted(left, key=lambda x: (self.args.sweeps.index(x[0]), (x[0], x[1].name) in ended))

    def child(self, work: workloads.Work | None, names: list[str], about: Row, limit: float) -> int:
        """Measure one work, or the ceilings, in its own process; add its lines as they come; return its status."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lines.jsonl"
            tail = Tail(path)

            def copy() -> None:
                for line in tail.rows():
                    self.add(about | line)

            command = run.child_command(work, self.args.device, self.args.seconds, names, path, work is None)
            return processes.run(command, limit, tick=copy, on_line=lambda line: print(line, flush=True))

    def measure(self, sweep: str, work: workloads.Work) -> bool:
        """Measure one work in one sweep; return whether it ended well."""
        names = workloads.swept(work, self.kind, sweep)
        about = {"family": work.family, "work": work.name, "sweep": sweep}
        most = self.args.work_seconds or LIMITS[sweep]
        limit, first, begin = min(self.left, most), len(self.lines), time.monotonic()
        status = self.child(work, names, about, limit)
        rows = [row for line in self.lines[first:] for row in line.get("rows", [])]
        print(f"{sweep}: {work.name} ({time.monotonic() - begin:.0f} s): {in_short(work, rows)}", flush=True)
        if status == processes.TIMED_OUT and limit < most:
            return False  # the call's limit, not the work's: the next call measures it
        why = f"no end after {limit:.0f} s" if status == processes.TIMED_OUT else f"ended with status {status}"
        note = {} if status == 0 else {"note": f"its process: {why}"}
        if note:
            print(f"  {note['note']}", flush=True)
            self.add(about | {"rows": run.missing(work, names, rows, note["note"])})
        self.add(about | {"ended": status == 0, "seconds": round(time.monotonic() - begin, 1)} | note)
        own = workloads.own(work.family, self.kind)
        for row in [row for row in rows if not row["ok"]]:
            print(f"  {row['provider']} {row['mode']}: {row['note']}", flush=True)
        return status == 0 and all(row["ok"] for row in rows if row["provider"] in own)

    def all(self) -> int:
        if self.todo():
            self.add({"environment": measure.environment(self.args.device)})
            if not any("ceilings" in line for line in self.lines):
                self.child(None, [], {}, min(self.left, LIMITS["own"]))
        good = True
        for sweep, work in self.todo():
            if self.left < LEAST:
                break
            good &= self.measure(sweep, work)
        left = self.todo()
        print(summary(self.lines, self.works))
        if left:
            print(f"not measured: {len(left)} of {len(self.args.sweeps) * len(self.works)} works and sweeps")
        return 0 if good and not left else 1


def in_short(work: workloads.Work, rows: list[Row]) -> str:
    shown = [r for r in rows if r["mode"] == work.judged and r["ok"]]
    return ", ".join(f"{r['provider']} {r['ms']['median']:.3f} ms" for r in shown) or "no times"


def folded(lines: list[Row]) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """Return the environment with the best ceilings, and the rows of each family: of each, the one measured last."""
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


def summary(lines: list[Row], todo: list[workloads.Work]) -> str:
    rows = [row for found in folded(lines)[1].values() for row in found]
    measured = {row["work"] for row in rows}
    return table.against_targets([work for work in todo if work.name in measured], rows)


def fold(path: Path, folder: Path, run_id: str | None) -> int:
    """Write FAMILY.json of the last run in the file, or of the run that is named."""
    lines = read(path)
    last = run_id or next((line["id"] for line in reversed(lines) if "rows" in line), None)
    environment, families = folded([line for line in lines if line.get("id") == last])
    for family, rows in families.items():
        measure.write(folder / f"{family}.json", environment, rows)
        print(f"{folder / family}.json: {len(rows)} rows")
    return 0 if families else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", help="default: what the device trains in")
    parser.add_argument("--works", default="", metavar="SUBSTRING", help="only works whose name has it")
    parser.add_argument("--sweeps", nargs="+", default=["own", "compile"], choices=workloads.SWEEPS)
    parser.add_argument("--limit", type=float, default=400, help="seconds of the whole call")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on a work, once it is warm")
    parser.add_argument("--work-seconds", type=float, help="limit of one work's process")
    parser.add_argument("--id", help="what is measured; what has ended with the same is skipped")
    parser.add_argument("--fold", type=Path, metavar="FOLDER", help="measure nothing: write the results files")
    args = parser.parse_args()
    if args.fold is not None:
        return fold(args.out, args.fold, args.id)
    args.id = args.id or ""
    processes.end_on_sigterm()
    return Session(args).all()


if __name__ == "__main__":
    sys.exit(main())
