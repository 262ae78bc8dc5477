"""SIGTERM, by which clusters end jobs, ends a run as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from fastkd.data._loading import WorkerExited
from fastkd.errors import Terminated

_PATIENCE = 2.0  # seconds between a loading process that was sent SIGTERM and this one, in one group


class Termination:
    """Raise `Terminated` on SIGTERM within the block, then put the signal's handler back.

    In the main thread only, where Python handles signals, and only where nobody else handles this one: a handler of the
    caller's, or of a cluster's library, stays in charge. Forked processes end as they would have.
    """

    def __init__(self) -> None:
        self.received = False
        self._holding = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._replace(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if number == signal.SIGTERM or not self.received:  # torch's would raise while the process ends
                signal.signal(number, handler)

    def settle(self, error: BaseException) -> BaseException:
        """Return what ended the run, and let no further signal interrupt the block.

        Loading processes are often sent SIGTERM together with this one, and their end is noticed first.
        """
        self._holding = True
        if not self._before:
            return error
        if (child := getattr(signal, "SIGCHLD", None)) is not None and child not in self._before:
            self._replace(child, signal.SIG_DFL)  # torch's handler raises when a loading process was killed
        if isinstance(error, WorkerExited) and error.exitcode == -signal.SIGTERM:
            until = time.monotonic() + _PATIENCE
            while not self.received and time.monotonic() < until:
                time.sleep(0.02)
        return Terminated() if self.received and not isinstance(error, KeyboardInterrupt | Terminated) else error

    def _replace(self, number: int, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked process that has not set its own
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = True
        if not self._holding:
            raise Terminated
