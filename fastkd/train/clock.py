"""Measure training time, excluding evaluation and checkpoints."""

from __future__ import annotations

import time

import torch


class Clock:
    """A wall clock that can be paused, and that continues from ``elapsed`` seconds."""

    def __init__(self, device: torch.device, elapsed: float = 0.0) -> None:
        self._device = device
        self._elapsed = elapsed
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Return the seconds elapsed, excluding pauses."""
        return self._elapsed + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def start(self) -> None:
        """Start or resume the clock."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Wait for the device to finish its queued work, then pause."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._elapsed, self._started = self.seconds, None
