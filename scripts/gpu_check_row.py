"""Write how one part of scripts/gpu_check.sh ended, in the format of benchmarks/results.

python scripts/gpu_check_row.py FILE PART STATUS SECONDS LOG
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(file: str, part: str, status: str, seconds: str, log: str) -> None:
    device, _, driver = ask("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition(", ")
    environment = {
        "device": device or None,
        "driver": driver or None,
        "cores": os.cpu_count(),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "python": platform.python_version(),
        "commit": ask("git", "rev-parse", "HEAD") or None,
    }
    words = {"0": "", "124": "stopped at its time limit; ", "137": "stopped at its time limit; "}
    lines = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    milliseconds = int(seconds) * 1000
    row = {
        "work": part,
        "ms": {"p20": milliseconds, "median": milliseconds, "p80": milliseconds},
        "ok": status == "0",
        "note": words.get(status, f"exit status {status}; ") + " | ".join(line.strip() for line in lines[-5:])[:1000],
    }
    Path(file).write_text(json.dumps({"environment": environment, "rows": [row]}, indent=1) + "\n", encoding="utf-8")


def ask(*command: str) -> str:
    """The first line a command prints, or nothing."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return lines[0].strip() if lines else ""


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])
