"""Type of an ahead-of-time case, and the chips to compile for."""

from __future__ import annotations

from typing import Any

TARGETS = (80, 90, 100, 120)
"""Compute capability × 10 of each chip."""

Case = tuple[Any, ...]
"""(name, kernel, argument types, constants, warps) and optional compiler options; "but" lists the chips that do not
use the case. A type ending in ":16" marks an argument divisible by 16."""
