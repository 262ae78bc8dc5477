"""Seconds of the parts of a step, and peak memory."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("data", "student", "teacher", "losses", "backward", "update")
_PENDING = 256  # events kept before looking which are complete


class StepTimer:
    """Sum the seconds of the parts of steps, without waiting for the device.

    On a GPU, events in its queue measure its own time; "data" is always the host's time. On other devices all is.

    Args:
        device: the device of the networks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._events = device, device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        if not self._events or name == "data":
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        first.record(stream)
        yield
        last.record(stream)
        self._pending.append((name, first, last))
        if len(self._pending) > _PENDING:
            self._collect()

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the previous call; call it when the device has done all its work."""
        self._collect()
        self._pending.clear()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def _collect(self) -> None:
        """Add the times that the device has measured so far; parts end in the order in which they began."""
        while self._pending and self._pending[0][2].query():
            name, first, last = self._pending.popleft()
            self._seconds[name] += first.elapsed_time(last) / 1000


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
