"""Measure training time, excluding evaluation and checkpoints."""

from __future__ import annotations

import time

import torch


class Clock:
    """A clock that can be paused, and that continues from ``elapsed`` wall-clock seconds and ``cpu`` CPU seconds."""

    def __init__(self, device: torch.device, elapsed: float = 0.0, cpu: float = 0.0) -> None:
        self._device = device
        self._elapsed, self._cpu = elapsed, cpu
        self._started: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """Return the wall-clock seconds elapsed, excluding pauses."""
        return self._elapsed + (time.perf_counter() - self._started[0] if self._started is not None else 0.0)

    @property
    def cpu_seconds(self) -> float:
        """Return the CPU seconds of this process, all threads together, excluding pauses."""
        return self._cpu + (time.process_time() - self._started[1] if self._started is not None else 0.0)

    def start(self) -> None:
        """Start or resume the clock."""
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Wait for the device to finish its queued work, then pause."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._elapsed, self._cpu, self._started = self.seconds, self.cpu_seconds, None
