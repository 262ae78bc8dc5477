"""Processors and memory available to this process, given its affinity and its container's limits.

Uses the standard library only: setup.py and scripts run this file before fastkd is installed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as the largest multiple of the page size


def cores(root: Path = Path("/")) -> int:
    """Return the number of processors available to this process, at least 1; a fractional quota is rounded up."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups(root, "cpu"):
        v1_quota = (*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us"))  # -1: no quota
        for quota in (_numbers(folder / "cpu.max"), v1_quota):
            if len(quota) == 2 and min(quota) > 0:  # (quota, period): 200000 of 100000 is two processors
                found = min(found, math.ceil(quota[0] / quota[1]))
    return max(1, found)


def memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process can allocate without swapping, or None if unknown."""
    known = _fields(root / "proc/meminfo").get("MemAvailable:")
    free = [known * 1024] if known is not None else []
    for folder in _groups(root, "memory"):
        limits = [*_numbers(folder / "memory.max"), *_numbers(folder / "memory.limit_in_bytes")]
        used = [*_numbers(folder / "memory.current"), *_numbers(folder / "memory.usage_in_bytes"), 0][0]
        # The page cache counts as used, but is freed when memory is needed.
        stat = _fields(folder / "memory.stat")
        cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        free += [max(0, limit - max(0, used - cache)) for limit in limits if limit < _UNLIMITED]
    return min(free, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups (cgroup v1 and v2), innermost first."""
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:  # v2, alone or in addition to v1
            tops = [mounts, mounts / "unified"]
        elif controller in names.split(","):
            tops = [mounts / names, mounts / controller]
        else:
            continue
        # In a container the path may be the host's, of which only the container's own part is mounted, at the top.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in dict.fromkeys(tops):
            yield from (top.joinpath(*parts[:length]) for length in range(len(parts), -1, -1))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _numbers(path: Path) -> tuple[int, ...]:
    """Return the numbers in a file; an empty tuple for "max" and for a missing file."""
    words = " ".join(_lines(path)).split()
    return tuple(map(int, words)) if words and all(word.lstrip("-").isdecimal() for word in words) else ()


def _fields(path: Path) -> dict[str, int]:
    """Return a file with a name and a number on each line as a dict."""
    pairs = (line.split()[:2] for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
