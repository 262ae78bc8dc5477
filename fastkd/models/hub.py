"""Turn the exceptions of the Hugging Face Hub and its HTTP clients into one reason."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from pathlib import Path

_HTTP_CLIENTS = ("httpx", "requests.", "urllib3.")  # httpx or httpx2, depending on huggingface_hub's version
_OFFLINE = "HF_HUB_OFFLINE is set and it is not cached: unset it if you are online"


def is_hub_name(name: str) -> bool:
    """Return whether a string is "owner/name" rather than a local path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).parent.exists()


def fetch_failure(error: BaseException) -> str | None:
    """Return why a download failed and how to fix it; None if the error is not about downloading."""
    from huggingface_hub import constants, errors

    chain = list(_causes(error))
    known: tuple[tuple[type[BaseException], str], ...] = (
        (errors.GatedRepoError, "its licence must be accepted on the hub first, and a token is needed (hf auth login)"),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such name, or it is private and needs a token (hf auth login)",
        ),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.RemoteEntryNotFoundError, "it lacks a required file"),
        (errors.HFValidationError, "it is not a valid hub name"),
    )
    for kind, text in known:
        if any(isinstance(cause, kind) for cause in chain):
            return text
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, urllib.error.URLError)
    network = (*unreachable, ConnectionError, TimeoutError)
    if any(isinstance(cause, network) or type(cause).__module__.startswith(_HTTP_CLIENTS) for cause in chain):
        if constants.HF_HUB_OFFLINE:
            return _OFFLINE
        return "the hub is unreachable and it is not cached"
    if any(isinstance(cause, errors.HfHubHTTPError) for cause in chain):
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def fetch_error(name: str, error: BaseException, *, causes_kept: bool = True) -> ValueError:
    """Return the error to raise for a name that could not be fetched.

    Args:
        name: The hub name.
        error: The library's exception.
        causes_kept: False if the library discards the exception's causes, so that the reason has to be guessed.
    """
    from huggingface_hub import constants

    reason = fetch_failure(error)
    if reason is None and not causes_kept and constants.HF_HUB_OFFLINE:
        reason = _OFFLINE
    reason = reason or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ValueError(
        f"{name!r} is not a local folder and could not be fetched from the hub ({reason}): pass the path of a folder, "
        "or check the name, the connection and whether a licence must be accepted"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause's cause, ..."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
