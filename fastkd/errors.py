"""The exceptions and warnings that fastkd adds to Python's own."""

import signal


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run here; the message says why and what would mend it."""


class FastKDWarning(UserWarning):
    """A fastkd warning: a backend that failed and was left out, a sentence that was cut, ..."""


class Terminated(SystemExit):
    """Training was ended by SIGTERM, after the student was kept; the process ends with status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "SIGTERM"
