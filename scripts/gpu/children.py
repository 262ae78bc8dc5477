"""Run tasks in child processes, so that a crash, a hang or a broken device costs one task and not those after it."""

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

FORK = multiprocessing.get_context("fork")  # what this process has imported is imported; it must not use the GPU itself
LINES_OF_TRACE = 12
JOIN_SECONDS = 5
"""How long a killed process is waited for: one that the GPU's driver holds may never end."""


@dataclass
class _Child(Generic[T]):
    """A process with its tasks; the first of them runs once the process has reported that it begins."""

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
        """Kill it and what it has started, for example a compiler."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()  # it has not yet made a group of its own
        self.process.join(JOIN_SECONDS)
        self.connection.close()

    def stuck_at(self) -> list[str]:
        """Return its Python frames, innermost first."""
        try:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.3)
        except ProcessLookupError:  # it has just ended
            pass
        return self.trace()

    def trace(self) -> list[str]:
        self.traces.seek(0)
        text = self.traces.read().decode(errors="replace")
        return text.splitlines()[:LINES_OF_TRACE]


def run_all(
    groups: Sequence[Sequence[T]],
    run: Callable[[T], Row],
    *,
    jobs: int,
    limit: float,
    deadline: float,
    broken: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[T, Row]]:
    """Yield each task with its row as it ends, ``run(task)`` with "seconds", or "ok": False and the "error".

    Args:
        groups: tasks that share a process, one after the other; ``jobs`` groups run at a time.
        run: what a task is; called in a child.
        limit: seconds after which a task is killed.
        deadline: when (``time.monotonic()``) all that still run are killed; tasks not begun by then are not yielded.
        broken: whether this process can do no more after a task that failed: the others go on in a fresh one.
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
                yield _failed(child, "stopped: the time for all checks was over", child.stuck_at())
    finally:
        for child in alive:
            child.kill()


def _received(child: _Child[T]) -> Iterator[tuple[T, Row]]:
    """Handle a child's message; the generator's value is whether the process is over."""
    try:
        message = child.connection.recv()
    except (EOFError, ConnectionError):
        child.process.join(JOIN_SECONDS)
        if child.tasks:
            code = child.process.exitcode
            how = f"signal {signal.Signals(-code).name}" if (code or 0) < 0 else f"exit status {code}"
            yield _failed(child, f"the process ended: {how}", child.trace())
            child.tasks.popleft()  # whether or not it had begun: a process that dies before must not be started forever
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
    """Run the tasks in the child; send None before each, then its row and whether another process must go on."""
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
            row = {"ok": False} | described(error)
        row["seconds"] = round(time.monotonic() - begin, 2)
        over = not row["ok"] and broken()
        connection.send((row, over))
        if over:
            break
    sys.stdout.flush()
    os._exit(0)  # without tearing down what a broken device would hang in


def described(error: Exception) -> Row:
    """Return an exception's part of a row: type and message, and the last lines of its traceback."""
    trace = "".join(traceback.format_tb(error.__traceback__)).splitlines()
    text = f"{type(error).__name__}: {error}".strip()
    return {"error": text[:4000], "trace": trace[-LINES_OF_TRACE:]}
