"""Seconds of the parts of a step, and peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("data", "student", "teacher", "losses", "backward", "update")


class StepTimer:
    """Sum the seconds of the parts of steps, without waiting for the device.

    On a GPU, events in its queue measure its own time; "data" is always the host's time. On other devices all is.

    Args:
        device: the device of the networks.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        if not self._events or name == "data":
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._pending.append((name, first, last))

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the previous call; call it when the device has done all its work."""
        for name, first, last in self._pending:
            if last.query():
                self._seconds[name] += first.elapsed_time(last) / 1000
        self._pending.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes used so far: of a GPU's memory by torch, else by this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
