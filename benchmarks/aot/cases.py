"""What the lists of cases of ``aot.py`` share."""

from __future__ import annotations

from typing import Any

TARGETS = (80, 90, 100, 120)
"""Compute capabilities × 10."""

Case = tuple[Any, ...]
"""(name, kernel, argument types, constants, warps), and further options of the compiler, if any; of these "but" names
chips on which the case is not used. A type that ends in ":16" is of a number that 16 divides."""
