"""Makes the benchmarks' own modules importable, whatever folder pytest was started from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
