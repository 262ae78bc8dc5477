"""Benchmarks of fastkd on this machine: ``python -m benchmarks``, run from a checkout."""

import os
import sys
from pathlib import Path

# `python -m` puts the checkout first on the path. An installed fastkd, with its compiled modules, comes before it.
ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [*(path for path in sys.path if os.path.realpath(path) != ROOT), ROOT]
