"""Raise an error for unusable refs, or skip and count them."""

from __future__ import annotations

import warnings
from collections import Counter

from fastkd.errors import FastKDWarning

SKIP_HINT = "; or skip and count unusable refs: skip_unusable=True (--skip-unusable)"


class Skips:
    """Count skipped refs and sentences by reason; raise instead unless ``enabled``."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, reason: str, message: str) -> None:
        """Count one skipped item.

        Raises:
            ValueError: Skipping is not enabled.
        """
        if not self.enabled:
            raise ValueError(message + SKIP_HINT)
        self.counts[reason] += 1
        self._examples.setdefault(reason, message)

    def report(self, source: str, left: int) -> None:
        """Issue one warning about all skipped items; ``left`` is the number of usable refs.

        Raises:
            ValueError: No ref is left.
        """
        if not self.counts:
            return
        lines = [f"{count} × {reason} (e.g. {self._examples[reason]})" for reason, count in self.counts.items()]
        if not left:
            raise ValueError(f"{source}: no refs are left after skipping {'; '.join(lines)}")
        warnings.warn(f"{source}: {left} refs are used; skipped {'; '.join(lines)}", FastKDWarning, stacklevel=4)
