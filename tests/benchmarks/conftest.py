"""Make ``benchmarks`` importable. The root comes last, so that its sources don't hide an installed fastkd."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
