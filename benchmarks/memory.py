"""Peak memory that a call allocates, including its result, on top of the memory in use before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_extra_bytes(call: Callable[[], Any], device: str) -> int:
    """Return the peak according to torch's allocator, which includes the workspaces of fastkd's kernels."""
    call()  # allocate whatever is cached across calls
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = call()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident_bytes(call: Callable[[], Any]) -> int | None:
    """Return the peak of resident pages (Linux with glibc), or None elsewhere; a check on :func:`peak_extra_bytes`.

    This includes memory that libraries allocate outside torch, but not pages that they reuse from earlier calls.
    """
    call()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise memory cached by malloc would hide this call's allocations
        CLEAR.write_text("5", encoding="ascii")  # reset the high-water mark
        before = _status("VmRSS")
        result = call()
        del result
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s*(\d+) kB", STATUS.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise OSError(f"{STATUS} has no field {name}")
    return int(found[1]) * 1024
