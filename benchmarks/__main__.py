"""Run ``python -m benchmarks`` from a checkout, or ``python PATH/benchmarks`` from anywhere; see ``run.py``."""

import sys
from pathlib import Path

if not __package__:  # run by path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.run import main

if __name__ == "__main__":
    sys.exit(main())
