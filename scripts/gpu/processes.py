"""Run commands with a time limit, and end them together with their child processes."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TIMED_OUT = 124
LIBC = ctypes.CDLL(None)  # loaded here because little is safe between fork and exec
PR_SET_PDEATHSIG = 1
cores: Callable[[], int] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "fastkd" / "_machine.py"))["cores"]
"""Number of processors available to this process; loaded from the sources, because fastkd may not be installed yet."""


def run(
    command: Sequence[str],
    seconds: float,
    *,
    on_line: Callable[[str], None] = print,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    on_tick: Callable[[], None] = lambda: None,
) -> int:
    """Run a command, passing each printed line to ``on_line``; return its exit status, or ``TIMED_OUT``.

    At the limit, or when this process is interrupted, the command's process group receives SIGTERM, and SIGKILL 5
    seconds later. ``on_tick`` is called about ten times per second.
    """
    process = start(command, stdout=subprocess.PIPE, env=env, cwd=cwd)
    assert process.stdout is not None
    reader = threading.Thread(target=_forward_lines, args=(process.stdout, on_line), daemon=True)
    reader.start()
    end = time.monotonic() + seconds
    try:
        while (status := process.poll()) is None:
            if time.monotonic() > end:
                return TIMED_OUT
            on_tick()
            time.sleep(0.1)
        return status
    finally:
        stop(process)
        reader.join(timeout=2)
        on_tick()


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command in a new process group that ends with this process, even if this process is killed."""
    defaults = {"stderr": subprocess.STDOUT, "text": True, "errors": "replace", "process_group": 0}
    return subprocess.Popen(command, preexec_fn=end_with_parent, **defaults | options)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    if hasattr(LIBC, "prctl"):  # Linux
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_on_sigterm() -> None:
    """Turn SIGTERM into an exception, so that child processes are ended too."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def stop(process: subprocess.Popen[str], patience: float = 5) -> None:
    """End a process and its process group."""
    for sign, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            break
        if process.poll() is not None and sign == signal.SIGTERM:
            continue  # already exited: do not wait for its children
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def _forward_lines(lines: Iterable[str], on_line: Callable[[str], None]) -> None:
    for line in lines:
        on_line(line.rstrip("\n"))
