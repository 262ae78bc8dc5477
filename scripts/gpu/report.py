"""Record the result of each part of scripts/gpu_check.sh, in the format of benchmarks/results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from processes import TIMED_OUT
from records import Row, write_json

MAX_NOTE = 2000


class Rows:
    """The results file: one row per part, rewritten when a part ends."""

    def __init__(self, path: Path, run: str, gpu: dict[str, str]) -> None:
        self.path, self.run = path, run
        self.environment = {
            "device": gpu["name"],
            "driver": gpu["driver"] or None,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "commit": first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD") or None,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        try:
            self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError):
            self.rows = []

    def add(self, part: str, status: int | None, seconds: float, lines: list[str]) -> None:
        """Add the row of a part; ``status`` is None if it was not run."""
        milliseconds = round(1000 * seconds)
        prefixes = {None: "", 0: "", TIMED_OUT: "stopped at its time limit; "}
        last = [line.strip() for line in lines if line.strip()][-8:]
        row = {
            "work": part,
            "id": self.run,
            "ms": {"p20": milliseconds, "median": milliseconds, "p80": milliseconds},
            "ok": status == 0,
            "note": prefixes.get(status, f"exit status {status}; ") + " | ".join(last)[-MAX_NOTE:],
        }
        self.rows = [old for old in self.rows if old["work"] != part] + [row]
        write_json(self.path, {"environment": self.environment, "rows": self.rows})


def versions(python: str, env: Mapping[str, str]) -> list[str]:
    """Return the versions of torch and Triton, as parts of a run's id."""
    code = "import importlib.metadata as m; print(*(f'{p}{m.version(p)}' for p in ('torch', 'triton')))"
    return first_line(python, "-c", code, env=env).split()


def first_line(*command: str, **options: Any) -> str:
    """Return the first line printed by a command, or "" if it fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return lines[0].strip() if lines else ""
