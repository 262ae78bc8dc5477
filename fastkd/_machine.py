"""Processors and memory available to this process, within its affinity and its container's limits.

Uses the standard library only: setup.py and scripts run this file before fastkd is installed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as the largest multiple of a page


def cores(root: Path = Path("/")) -> int:
    """Return the number of processors available to this process, at least 1; a fraction counts as one."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups(root, "cpu"):
        older = (*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us"))  # -1: no quota
        for share in (_numbers(folder / "cpu.max"), older):
            if len(share) == 2 and min(share) > 0:  # 200000 of 100000: two processors
                found = min(found, math.ceil(share[0] / share[1]))
    return max(1, found)


def memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process can allocate without swapping, or None if unknown."""
    known = _fields(root / "proc/meminfo").get("MemAvailable:")
    free = [known * 1024] if known is not None else []
    for folder in _groups(root, "memory"):
        limits = [*_numbers(folder / "memory.max"), *_numbers(folder / "memory.limit_in_bytes")]
        used = [*_numbers(folder / "memory.current"), *_numbers(folder / "memory.usage_in_bytes"), 0][0]
        # The page cache counts as used, but is freed when memory is needed.
        facts = _fields(folder / "memory.stat")
        kept = facts.get("total_inactive_file", facts.get("inactive_file", 0))
        free += [max(0, limit - max(0, used - kept)) for limit in limits if limit < _UNLIMITED]
    return min(free, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, of versions 1 and 2, innermost first."""
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:  # version 2, alone or in addition to version 1
            tops = [mounts, mounts / "unified"]
        elif controller in names.split(","):
            tops = [mounts / names, mounts / controller]
        else:
            continue
        # In a container the path may be the host's; only the container's own part of it is mounted, at the top.
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
    """Return the contents of a file with a name and a number on each line."""
    pairs = (line.split()[:2] for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
