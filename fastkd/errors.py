"""fastkd's exceptions and warnings."""

import signal


class BackendUnavailable(RuntimeError):
    """A backend requested by name cannot run here; the message gives the reason and the fix."""


class FastKDWarning(UserWarning):
    """A warning from fastkd, for example about an unavailable backend or a truncated sentence."""


class Terminated(SystemExit):
    """A signal ended the training, after its state was saved; the process exits with status 128 + the signal's number.

    Args:
        number: the signal, SIGTERM or SIGUSR1.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)

    def __str__(self) -> str:
        return signal.Signals(int(self.code or 0) - 128).name
