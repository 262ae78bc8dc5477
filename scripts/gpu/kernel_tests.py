"""Run the kernel tests on a GPU in several processes, with a time limit; skip tests that have passed before.

    python scripts/gpu/kernel_tests.py OUT.jsonl [--seconds 300] [--id TEXT] [--jobs 14] [--files FILE...]

Appends one line per finished test ({"test", "outcome", "seconds", "text", "id"}) and prints each failure at once. A
test that hangs or crashes its process is recorded and the process replaced. Exit status: 0 all passed, 1 some failed,
124 stopped at the limit.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import wheels  # noqa: E402
from processes import TIMED_OUT, cores, end_on_sigterm, start, stop  # noqa: E402
from records import Row, Tail, append  # noqa: E402

ROOT = HERE.parents[1]
KERNEL_TESTS = [
    *("tests/ops/test_relation_cuda.py", "tests/ops/test_pixel_word_cuda.py", "tests/ops/test_pixel_word_kernels.py"),
    *("tests/ops/test_softmax_kl.py", "tests/ops/test_relation_triton.py", "tests/ops/test_pixel_word_triton.py"),
    *(
        "tests/contract/test_backends_agree.py",
        "tests/contract/test_determinism.py",
        "tests/contract/test_contract_errors.py",
    ),
    *("tests/contract/test_gradients.py", "tests/contract/test_memory.py", "tests/contract/test_random_inputs.py"),
    *("tests/contract/test_torch_integration.py", "tests/contract/test_special_values.py"),
]
"""Tests that launch kernels. They do not need the packages of the trainer and datasets, which may be missing."""

MAX_RESTARTS = 30
MAX_FULL_TEXTS = 50  # number of failures printed in full; the results file has all texts
UNAVAILABLE = "backend is not in use"  # such a skip counts as a failure: kernels were not built or do not load


def pytest_command(files: list[str], select: str, *options: str) -> list[str]:
    """Return the command that collects or runs the kernel tests."""
    plugins = ["-p", "record_tests", "-p", "no:cacheprovider"]
    return [sys.executable, "-P", "-m", "pytest", "-q", "-m", select, *plugins, *options, *files]


def environment() -> dict[str, str]:
    """Return the environment of the pytest processes, with this folder's plugin and no installed ones."""
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), str(HERE)) if p)
    return os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Worker:
    """A pytest process."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    at: str = ""  # the running test
    since: float = field(default_factory=time.monotonic)


class Pool:
    """The pytest processes and the results so far."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.tail = Tail(args.out)
        self.counts: collections.Counter[str] = collections.Counter()
        self.skips: collections.Counter[str] = collections.Counter()
        self.finished: set[str] = set()
        self.workers: list[Worker] = []
        self.started = self.restarts = self.failures = 0
        self.broken = False  # pytest itself failed

    def start(self) -> None:
        """Start a worker."""
        name = str(self.started)
        self.started += 1
        log = self.folder / f"log-{name}"
        options = ["--record", str(self.args.out), "--record-id", self.args.id, "--claims", str(self.folder)]
        command = pytest_command(self.args.files, self.args.select, *options, "--worker", name, "--tb=short")
        with log.open("w", encoding="utf-8") as file:
            process = start(command, stdout=file, env=environment(), cwd=self.args.root)
        self.workers.append(Worker(name, process, log))

    def collect_results(self) -> None:
        """Count the results since the last call, and print failures."""
        for row in self.tail.rows():
            self.counts[row["outcome"]] += 1
            self.finished.add(row["test"])
            text = row.get("text", "")
            if row["outcome"] == "skipped":
                self.skips[text] += 1
            elif row["outcome"] != "passed":
                self.failures += 1
                shown = f"{text}\n" if self.failures <= MAX_FULL_TEXTS else "".join(text.splitlines()[-1:])
                print(f"{row['outcome']}: {row['test']} ({row['seconds']:.1f} s)\n{shown}", flush=True)

    def check_workers(self) -> None:
        """Replace crashed processes, and kill and replace hanging ones."""
        for worker in list(self.workers):
            running = self.folder / f"running-{worker.name}"
            at = running.read_text(encoding="utf-8") if running.exists() else ""
            if at != worker.at:
                worker.at, worker.since = at, time.monotonic()
            status = worker.process.poll()
            seconds = time.monotonic() - worker.since
            if status is None and not (at and seconds > self.args.test_seconds):
                continue
            self.workers.remove(worker)
            if status is None:
                stop(worker.process, patience=1)
                self.replace_worker(worker, "hung", f"timed out after {seconds:.0f} s", seconds)
            elif status not in (0, 1, 5):  # 5: no tests left to run
                self.replace_worker(worker, "crashed", f"the process exited with status {status}", seconds)

    def replace_worker(self, worker: Worker, outcome: str, reason: str, seconds: float) -> None:
        """Record the test that ended a worker, release the worker's other claims, and start another worker."""
        self.collect_results()
        tail = worker.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        if worker.at and worker.at not in self.finished:
            row: Row = {
                "test": worker.at,
                "outcome": outcome,
                "seconds": round(seconds, 3),
                "text": f"{reason}\n{tail}",
            }
            append(self.args.out, row | {"id": self.args.id})
            self.collect_results()
        elif not worker.at:
            self.broken = True
            print(f"pytest: {reason}\n{tail}", flush=True)
            return
        for claim in self.folder.glob("claim-*"):
            try:
                held = json.loads(claim.read_text(encoding="utf-8"))
            except ValueError:  # being written
                continue
            if held["worker"] == worker.name and held["test"] not in self.finished:
                claim.unlink()
        self.restarts += 1
        if self.restarts <= MAX_RESTARTS:
            self.start()
        else:
            self.broken = True

    def selection(self) -> tuple[int, int]:
        """Return the number of selected tests, and of tests that had passed before."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("selected-*")]
        # Workers that collect later also exclude tests that ran in the meantime: use the first worker's numbers.
        return max((data["selected"] for data in found), default=0), min((data["before"] for data in found), default=0)


def run(args: argparse.Namespace, folder: Path) -> int:
    """Run the tests until the limit; return the exit status."""
    end = time.monotonic() + args.seconds
    pool = Pool(args, folder)
    try:
        for _ in range(args.jobs):
            pool.start()
        shown = time.monotonic()
        while pool.workers and time.monotonic() < end:
            time.sleep(0.1)
            pool.collect_results()
            pool.check_workers()
            if time.monotonic() - shown > 15:
                shown = time.monotonic()
                print(f"{sum(pool.counts.values())} of {pool.selection()[0]} tests", flush=True)
    finally:
        for worker in pool.workers:
            stop(worker.process, patience=1)
        pool.collect_results()
    selected, before = pool.selection()
    ran = sum(pool.counts.values())
    for reason, count in pool.skips.most_common(5):
        print(f"skipped {count}: {reason}")
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(pool.counts.items())) or "none"
    print(f"tests: {outcomes}; {ran} of {selected} ran, {before} had passed before", flush=True)
    failed = any(pool.counts[outcome] for outcome in ("failed", "error", "crashed", "hung"))
    unavailable = any(UNAVAILABLE in reason for reason in pool.skips) or not (pool.counts["passed"] or before)
    if pool.workers and (ran < selected or not selected):
        print(f"stopped at the limit of {args.seconds:.0f} s; the next call continues here")
        return TIMED_OUT
    return 1 if failed or unavailable or pool.broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", nargs="+", default=KERNEL_TESTS, help="default: the kernel tests")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--test-seconds", type=float, default=120, help="limit of one test")
    parser.add_argument("--id", default="", help="build under test; tests that passed with the same id are skipped")
    parser.add_argument("--jobs", type=int, default=min(cores(), 14))
    parser.add_argument("--select", default="gpu", help="pytest's -m")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the tests")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if missing := wheels.find_missing(wheels.requirements()[1]):
        print("missing packages of the tests:", *(f"  {lack}" for lack in missing), sep="\n", flush=True)
        if wheels.installed("pytest") is None:
            return 1
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        return run(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
