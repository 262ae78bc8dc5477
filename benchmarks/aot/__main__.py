"""Run ``python -m benchmarks.aot`` from a checkout, or ``python PATH/benchmarks/aot`` from anywhere."""

import sys
from pathlib import Path

if not __package__:  # run by path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.aot.cli import main

if __name__ == "__main__":
    sys.exit(main())
