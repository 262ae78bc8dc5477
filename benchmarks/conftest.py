"""Make ``benchmarks`` importable, whatever folder pytest was started from."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
