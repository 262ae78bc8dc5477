"""Refs that cannot be used: an error, or on request skipped and counted."""

from __future__ import annotations

import warnings
from collections import Counter

from fastkd.errors import FastKDWarning

SKIP_HINT = "; or skip and count what cannot be used: skip_unusable=True (--skip-unusable)"


class Skips:
    """Count what is skipped, by reason; raise instead unless ``wanted``."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, reason: str, message: str) -> None:
        """Count one.

        Raises:
            ValueError: ``message``, unless skipping is wanted.
        """
        if not self.wanted:
            raise ValueError(message + SKIP_HINT)
        self.counts[reason] += 1
        self._examples.setdefault(reason, message)

    def report(self, what: str, left: int) -> None:
        """Warn once of everything that was skipped.

        Raises:
            ValueError: nothing is ``left``.
        """
        if not self.counts:
            return
        lines = [f"{count} × {reason} (such as: {self._examples[reason]})" for reason, count in self.counts.items()]
        if not left:
            raise ValueError(f"{what}: nothing is left after skipping {'; '.join(lines)}")
        warnings.warn(f"{what}: {left} refs are used; skipped {'; '.join(lines)}", FastKDWarning, stacklevel=4)
