"""Run sanitize.py under each tool of compute-sanitizer; skip tools that finished without findings before.

    python scripts/gpu/sanitizer.py OUT.jsonl [--seconds 100] [--id TEXT]

Appends a line per finished call ({"tool", ...} and the row of sanitize.py) and one per tool ({"tool", "ok", "status",
"text"}).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import processes  # noqa: E402
from records import Tail, append, read  # noqa: E402

TOOLS = ("memcheck", "racecheck")
FINDINGS_STATUS = 9  # exit status of the tools after a finding
MIN_SECONDS = 5  # do not start a tool with less time left


def watch(tool: str, args: argparse.Namespace, seconds: float, folder: Path) -> bool:
    """Run one tool, copying the row of each call at once; return whether it finished without findings.

    Calls that passed in an earlier run of the same tool are skipped, if that run had no findings and only timed out.
    """
    calls = folder / f"{tool}.jsonl"
    before = [row for row in read(args.out) if row["tool"] == tool and row["run"] == args.id]
    if all(row.get("status") in (None, 0, processes.TIMED_OUT) and not row.get("found") for row in before):
        for row in before:
            if "case" in row and row["ok"]:
                append(calls, {key: value for key, value in row.items() if key not in ("tool", "run")})
    tail, lines = Tail(calls), []

    def copy() -> None:
        for row in tail.rows():
            append(args.out, {"tool": tool, "run": args.id} | row)

    def on_line(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    options = [
        "--kernel-name",
        "kernel_substring=fastkd",
        "--error-exitcode",
        str(FINDINGS_STATUS),
        "--target-processes",
        "all",
    ]
    command = ["compute-sanitizer", "--tool", tool, *options, sys.executable, str(HERE / "sanitize.py"), str(calls)]
    # Disable torch's caching allocator, so that an access beyond a tensor is beyond its allocation.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = processes.run(command, seconds, on_line=on_line, env=env, on_tick=copy)
    result = "stopped at the limit" if status == processes.TIMED_OUT else f"exit {status}"
    print(f"{tool}: {result}", flush=True)
    found = any(re.match(r"=========     (Invalid|Warning|Error|Potential|Race)", line) for line in lines)
    text = "" if status == 0 else "\n".join(lines if len(lines) <= 100 else [*lines[:70], "...", *lines[-30:]])
    row = {"tool": tool, "run": args.id, "ok": status == 0, "status": status, "found": found, "text": text}
    append(args.out, row)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--id", default="")
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed (it comes with CUDA)")
        return 1
    end = time.monotonic() + args.seconds
    clean = {r["tool"] for r in read(args.out) if r.get("status") == 0 and r.get("run") == args.id}
    failed = False
    processes.end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        todo = [tool for tool in TOOLS if tool not in clean]
        for i, tool in enumerate(todo):
            seconds = (end - time.monotonic()) / (len(todo) - i)
            if seconds < MIN_SECONDS:
                print(f"{tool}: not run: no time was left")
                failed = True
            else:
                failed |= not watch(tool, args, seconds, Path(folder))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
