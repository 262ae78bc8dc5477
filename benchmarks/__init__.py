"""Benchmarks of fastkd: run ``python -m benchmarks`` from a checkout with fastkd installed."""

import os
import sys
from pathlib import Path

# `python -m` puts the checkout first on sys.path; move it last, behind an installed fastkd with its compiled modules.
ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [*(path for path in sys.path if os.path.realpath(path) != ROOT), ROOT]
