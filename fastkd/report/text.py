"""Format numbers for the page and the terminal."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 1) -> str:
    """Format as ``52.9``; None is a dash, and NaN and Inf are ``NaN``."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else "NaN"


def signed(value: float, digits: int = 1) -> str:
    """Format as ``+3.2`` or ``−0.4``, with a typographic minus sign."""
    return f"{value:+.{digits}f}".replace("-", "−") if math.isfinite(value) else "NaN"


def count(value: int | None) -> str:
    """Format a number of parameters: ``3.06 M``, ``315 k``, ``118.9 M``."""
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 or unit != 'k' else 0}f} {unit}"
    return str(value)


def milliseconds(seconds: float | None) -> str:
    """Format a latency as ``3.2 ms`` or ``140 ms``."""
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.{1 if seconds < 0.01 else 0}f} ms"


def duration(seconds: float | None) -> str:
    """Format as ``48 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
