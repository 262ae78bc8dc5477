"""Run tasks in child processes, so that a crash, a hang or a broken device fails only one task."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from processes import end_with_parent

T = TypeVar("T")
Row = dict[str, Any]

FORK = multiprocessing.get_context("fork")  # children inherit imports; the parent must not initialise CUDA
MAX_TRACE_LINES = 12
JOIN_SECONDS = 5
"""Time to wait for a killed process; one that is stuck in the GPU driver may never exit."""


@dataclass
class _Child(Generic[T]):
    """A process and its tasks. The first task is running while ``begun`` is set."""

    tasks: deque[T]
    process: Any = None
    connection: Any = None
    traces: Any = field(default_factory=tempfile.TemporaryFile)
    begun: float | None = None

    def start(self, run: Callable[[T], Row], broken: Callable[[], bool]) -> None:
        self.connection, far = FORK.Pipe()
        arguments = (list(self.tasks), run, broken, far, self.traces)
        self.process = FORK.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        far.close()

    def kill(self) -> None:
        """Kill the process and its children, such as a compiler."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()  # not yet a process group leader
        self.process.join(JOIN_SECONDS)
        self.connection.close()

    def stuck_at(self) -> list[str]:
        """Return the Python frames of the running process, innermost first."""
        try:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.3)
        except ProcessLookupError:  # it has just exited
            pass
        return self.trace()

    def trace(self) -> list[str]:
        """Return the frames written by faulthandler."""
        self.traces.seek(0)
        text = self.traces.read().decode(errors="replace")
        return text.splitlines()[:MAX_TRACE_LINES]


def run_all(
    groups: Sequence[Sequence[T]],
    run: Callable[[T], Row],
    *,
    jobs: int,
    limit: float,
    deadline: float,
    broken: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[T, Row]]:
    """Yield each finished task with its row: ``run(task)`` plus "seconds", or "ok": False and an "error".

    Args:
        groups: lists of tasks; the tasks of a group share a process, and ``jobs`` groups run at a time.
        run: function that runs a task, called in a child.
        limit: seconds after which a task is killed.
        deadline: time (``time.monotonic()``) at which running tasks are killed; tasks not begun are not yielded.
        broken: called in the child after a failed task; if it returns True, the other tasks continue in a new process.
    """
    waiting = deque(_Child(deque(group)) for group in groups if group)
    alive: list[_Child[T]] = []
    try:
        while (waiting or alive) and time.monotonic() < deadline:
            while waiting and len(alive) < jobs:
                alive.append(waiting.popleft())
                alive[-1].start(run, broken)
            ends = [child.begun + limit for child in alive if child.begun is not None]
            timeout = max(0.0, min([deadline, *ends]) - time.monotonic())
            ready = wait([child.connection for child in alive], timeout)
            for child in list(alive):
                over = None
                if child.connection in ready:
                    over = yield from _received(child)
                elif child.begun is not None and time.monotonic() >= child.begun + limit:
                    yield _failed(child, f"hung: killed after {limit:g} s", child.stuck_at())
                    child.tasks.popleft()
                    over = True
                if over:
                    child.kill()
                    alive.remove(child)
                    if child.tasks:
                        waiting.appendleft(_Child(child.tasks))
        for child in alive:
            if child.begun is not None:
                yield _failed(child, "stopped: the time limit of all checks was reached", child.stuck_at())
    finally:
        for child in alive:
            child.kill()


def _received(child: _Child[T]) -> Iterator[tuple[T, Row]]:
    """Handle a message from a child: yield its finished task, if any, and return whether the process is finished."""
    try:
        message = child.connection.recv()
    except (EOFError, ConnectionError):
        child.process.join(JOIN_SECONDS)
        if child.tasks:
            code = child.process.exitcode
            status = f"signal {signal.Signals(-code).name}" if (code or 0) < 0 else f"exit status {code}"
            yield _failed(child, f"the process ended: {status}", child.trace())
            child.tasks.popleft()  # even if not begun: do not keep restarting a process that dies early
        return True
    if message is None:
        child.begun = time.monotonic()
        return False
    row, is_broken = message
    child.begun = None
    yield child.tasks.popleft(), row
    return is_broken or not child.tasks


def _failed(child: _Child[T], error: str, trace: list[str]) -> tuple[T, Row]:
    seconds = 0.0 if child.begun is None else time.monotonic() - child.begun
    return child.tasks[0], {"ok": False, "seconds": round(seconds, 2), "error": error, "trace": trace}


def _work(
    tasks: list[T], run: Callable[[T], Row], broken: Callable[[], bool], connection: Connection, traces: Any
) -> None:
    """Run the tasks in the child; send None before each, then its row and whether a new process must take over."""
    os.setsid()
    end_with_parent()
    faulthandler.enable(traces, all_threads=False)
    faulthandler.register(signal.SIGUSR1, traces, all_threads=True)
    for task in tasks:
        connection.send(None)
        begin = time.monotonic()
        try:
            row = run(task)
        except Exception as error:
            row = {"ok": False} | describe_error(error)
        row["seconds"] = round(time.monotonic() - begin, 2)
        over = not row["ok"] and broken()
        connection.send((row, over))
        if over:
            break
    sys.stdout.flush()
    os._exit(0)  # skip teardown, which hangs on a broken device


def describe_error(error: Exception) -> Row:
    """Return an exception as part of a row: type, message and the last lines of its traceback."""
    trace = "".join(traceback.format_tb(error.__traceback__)).splitlines()
    text = f"{type(error).__name__}: {error}".strip()
    return {"error": text[:4000], "trace": trace[-MAX_TRACE_LINES:]}
