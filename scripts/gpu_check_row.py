"""Write how one part of scripts/gpu_check.sh ended, in the format of benchmarks/results.

python scripts/gpu_check_row.py FILE PART STATUS SECONDS LOG
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path


def main(file: str, part: str, status: str, seconds: str, log: str) -> None:
    import torch

    gpu = torch.cuda.is_available()
    environment = {
        "device": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
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


if __name__ == "__main__":
    main(*sys.argv[1:])
