"""``fastkd info``: versions, backends, and why a backend is not in use."""

from __future__ import annotations

import json as json_module


def info(json: bool = False) -> None:
    """Show versions, backends, and for each backend that is not in use, why.

    Args:
        json: print JSON instead of text.
    """
    from fastkd._info import info as collect

    found = collect()
    print(json_module.dumps(found, indent=2, default=str) if json else found)
