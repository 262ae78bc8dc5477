"""End a run on SIGTERM, which cluster schedulers send, as on Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from fastkd.data._loading import WorkerExited
from fastkd.errors import Terminated

_SIGNAL_TIMEOUT = 2.0  # seconds: SIGTERM may reach a loading process before this one


class Termination:
    """Raise `Terminated` on SIGTERM inside the block and restore the default handler afterwards.

    Active only in the main thread, where Python handles signals, and only if no other handler is installed: the
    handler of the caller or a cluster library stays in place. Forked processes keep the default behaviour.
    """

    def __init__(self) -> None:
        self.received = False
        self._settling = False
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
            if number == signal.SIGTERM or not self.received:  # torch's SIGCHLD handler would raise at exit
                signal.signal(number, handler)

    def settle(self, error: BaseException) -> BaseException:
        """Return the exception to raise for a run that ended with ``error``, and ignore further signals.

        A scheduler often sends SIGTERM to the loading processes as well. Their end may be noticed first, so this waits
        for the signal before blaming them.
        """
        self._settling = True
        if not self._before:
            return error
        if (child := getattr(signal, "SIGCHLD", None)) is not None and child not in self._before:
            self._replace(child, signal.SIG_DFL)  # torch's handler raises if a loading process was killed
        if isinstance(error, WorkerExited) and error.exitcode == -signal.SIGTERM:
            deadline = time.monotonic() + _SIGNAL_TIMEOUT
            while not self.received and time.monotonic() < deadline:
                time.sleep(0.02)
        return Terminated() if self.received and not isinstance(error, KeyboardInterrupt | Terminated) else error

    def _replace(self, number: int, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked process: restore the default and resend
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = True
        if not self._settling:
            raise Terminated
