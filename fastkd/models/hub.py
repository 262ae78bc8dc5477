"""Turn the many exceptions of the hub and the network into one reason."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from pathlib import Path

_CLIENTS = ("httpx", "requests.", "urllib3.")  # httpx or httpx2, by the version of huggingface_hub
_OFFLINE = "HF_HUB_OFFLINE is set and the cache does not hold it: unset it where there is a network"


def is_hub_name(name: str) -> bool:
    """Return whether a text reads as "owner/name" and not as a path of this machine."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).parent.exists()


def reason(error: BaseException) -> str | None:
    """Return why something was not fetched and what to do, or None for an error that is not about fetching."""
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    known: tuple[tuple[type[BaseException], str], ...] = (
        (errors.GatedRepoError, "its licence must be accepted on the hub first, and a token given (hf auth login)"),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such name, or it is private and wants a token (hf auth login)",
        ),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.RemoteEntryNotFoundError, "it lacks a file that is needed"),
        (errors.HFValidationError, "the hub cannot have such a name"),
    )
    for kind, text in known:
        if any(isinstance(one, kind) for one in chain):
            return text
    unreached = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, urllib.error.URLError)
    network = (*unreached, ConnectionError, TimeoutError)
    if any(isinstance(one, network) or type(one).__module__.startswith(_CLIENTS) for one in chain):
        if constants.HF_HUB_OFFLINE:
            return _OFFLINE
        return "the network does not reach the hub and the cache does not hold it"
    if any(isinstance(one, errors.HfHubHTTPError) for one in chain):
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def not_fetched(name: str, error: BaseException, *, causes_kept: bool = True) -> ValueError:
    """Return one error for a name that could not be fetched; ``causes_kept``: by whoever raised ``error``."""
    from huggingface_hub import constants

    why = reason(error)
    if why is None and not causes_kept and constants.HF_HUB_OFFLINE:
        why = _OFFLINE
    why = why or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ValueError(
        f"{name!r} is not a folder here, and could not be fetched from the hub ({why}): give the path of a folder, or "
        "look at the name, the network and the licence that may have to be accepted"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
