"""The exceptions and warnings that fastkd adds to Python's own."""


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot run here; the message says why and what would mend it."""


class FastKDWarning(UserWarning):
    """A fastkd warning: a backend that failed and was left out, a sentence that was cut, ..."""
