"""Run commands that end at a limit, together with whatever they started."""

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
LIBC = ctypes.CDLL(None)  # loaded here: little may be done between fork and exec
PR_SET_PDEATHSIG = 1
cores: Callable[[], int] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "fastkd" / "_machine.py"))["cores"]
"""How many processors this process may keep busy; read from the sources, as fastkd may not be installed yet."""


def run(
    command: Sequence[str],
    seconds: float,
    *,
    on_line: Callable[[str], None] = print,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Run a command, handing on each line that it prints at once; return its status, or ``TIMED_OUT``.

    At the limit, or when this process is interrupted, the command's whole process group gets SIGTERM, and SIGKILL 5
    seconds later. ``tick`` is called a few times a second meanwhile.
    """
    process = start(command, stdout=subprocess.PIPE, env=env, cwd=cwd)
    assert process.stdout is not None
    reader = threading.Thread(target=_hand_on, args=(process.stdout, on_line), daemon=True)
    reader.start()
    end = time.monotonic() + seconds
    try:
        while (status := process.poll()) is None:
            if time.monotonic() > end:
                return TIMED_OUT
            tick()
            time.sleep(0.1)
        return status
    finally:
        stop(process)
        reader.join(timeout=2)
        tick()


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process group, which ends with this process, even if that is killed."""
    together = {"stderr": subprocess.STDOUT, "text": True, "errors": "replace", "process_group": 0}
    return subprocess.Popen(command, preexec_fn=end_with_parent, **together | options)


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends."""
    if hasattr(LIBC, "prctl"):  # Linux
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does: what it has started is ended too."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def stop(process: subprocess.Popen[str], patience: float = 5) -> None:
    """End a process and those of its group."""
    for sign, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            break
        if process.poll() is not None and sign == signal.SIGTERM:
            continue  # it has ended by itself: what it left behind is not waited for
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def _hand_on(lines: Iterable[str], on_line: Callable[[str], None]) -> None:
    for line in lines:
        on_line(line.rstrip("\n"))
