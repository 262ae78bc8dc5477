"""fastkd's exceptions and warnings."""

import signal


class BackendUnavailable(RuntimeError):
    """A backend requested by name cannot run here; the message gives the reason and the fix."""


class FastKDWarning(UserWarning):
    """A warning from fastkd, for example about an unavailable backend or a truncated sentence."""


class Terminated(SystemExit):
    """SIGTERM ended the training, after the student was saved; the process exits with status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "SIGTERM"
