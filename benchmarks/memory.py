"""What a call allocates at most, its result included, beyond what lived before it."""

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
    """By torch's own allocator: every tensor of the call, the workspaces of fastkd's kernels among them."""
    call()  # what is made once and kept is not the call's
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
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_resident_bytes(call: Callable[[], Any]) -> int | None:
    """By the pages the process holds (Linux with glibc): what libraries allocate beside torch counts too, and
    pages they keep for later don't. To check :func:`peak_extra_bytes` with."""
    call()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what malloc kept from earlier calls would hide what this one takes
        CLEAR.write_text("5", encoding="ascii")  # the highest mark starts again from here
        before = _status("VmRSS")
        result = call()
        del result
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", STATUS.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise OSError(f"{STATUS} has no {name}")
    return int(found[1]) * 1024
