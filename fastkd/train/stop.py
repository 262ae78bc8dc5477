"""End a run cleanly on Ctrl-C and on the signals of cluster schedulers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from fastkd.data._loading import WorkerExited
from fastkd.errors import Terminated

_SIGNAL_TIMEOUT = 2.0  # seconds: a signal may reach a loading process before this one
_DEFAULTS: dict[int, Any] = {  # signal: the handler that it has if nobody installed one
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    **({signal.SIGUSR1: signal.SIG_DFL} if hasattr(signal, "SIGUSR1") else {}),  # a batch system's warning
}


class Termination:
    """Raise `KeyboardInterrupt` on SIGINT and `Terminated` on SIGTERM or SIGUSR1 inside the block.

    Active only in the main thread, where Python handles signals, and only for signals without another handler: that of
    the caller or of a cluster library stays in place. All handlers are restored at the end. Forked processes keep the
    default behaviour.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the first signal
        self._delayed: int | None = None
        self._settling = False
        self._shields = 0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number, default in _DEFAULTS.items():
                if signal.getsignal(number) is default:
                    self._replace(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if number in _DEFAULTS or self.received is None:  # torch's SIGCHLD handler would raise at exit
                signal.signal(number, handler)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Delay signals to the end of the block, for changes that must not be left half-done."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._delayed is not None and not self._shields:
            number, self._delayed = self._delayed, None
            raise self._exception(number)

    def check(self) -> None:
        """Raise again for a signal that was received: Python ignores exceptions in some callbacks (in a fork, say)."""
        if self.received is not None:
            raise self._exception(self.received)

    def settle(self, error: BaseException) -> BaseException:
        """Return the exception to raise for a run that ended with ``error``, and ignore further signals.

        A scheduler or terminal often signals the loading processes as well. Their end may be noticed first, so this
        waits for the signal before blaming them.
        """
        self._settling, self._delayed = True, None
        if not self._before:
            return error
        if (child := getattr(signal, "SIGCHLD", None)) is not None and child not in self._before:
            self._replace(child, signal.SIG_DFL)  # torch's handler raises if a loading process was killed
        if isinstance(error, WorkerExited) and -error.exitcode in self._before:
            deadline = time.monotonic() + _SIGNAL_TIMEOUT
            while self.received is None and time.monotonic() < deadline:
                time.sleep(0.02)
        if self.received is None or isinstance(error, KeyboardInterrupt | Terminated):
            return error
        return self._exception(self.received)

    def _replace(self, number: int, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked process: restore the default and resend
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received is None:
            self.received = number
        if self._settling:
            return
        if self._shields:
            self._delayed = number
        else:
            raise self._exception(number)

    @staticmethod
    def _exception(number: int) -> BaseException:
        return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
