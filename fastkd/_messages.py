"""Parts of messages: shortened lists, close matches and numbers of bytes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def shortened(names: Sequence[str], limit: int = 3) -> str:
    """Return the first ``limit`` names as text, with the number of the others.

    Example:
        >>> shortened(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def with_unit(count: float) -> str:
    """Return a number of bytes with a unit.

    Example:
        >>> with_unit(3 * 2**20)
        '3 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def close_matches(name: object, known: Iterable[object], limit: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return the known names that ``name`` may be a misspelling of, the closest first."""
    return difflib.get_close_matches(str(name), [str(one) for one in known], n=limit, cutoff=cutoff)


def suggestion(name: object, known: Iterable[object], limit: int = 12) -> str:
    """Return a sentence to append to an error: the close matches, or else the known names; "" if there are none.

    Example:
        >>> suggestion("stage", ["stages", "logits"])
        " Did you mean 'stages'?"
        >>> suggestion("x", ["stages", "logits"])
        " Available: 'stages', 'logits'."
    """
    names = [str(one) for one in known]
    close = close_matches(name, names)
    if close:
        return f" Did you mean {' or '.join(map(repr, close))}?"
    if not names:
        return ""
    return f" Available: {', '.join(map(repr, names[:limit]))}{', ...' if len(names) > limit else ''}."
