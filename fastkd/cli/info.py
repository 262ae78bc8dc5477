"""``fastkd info``: versions, devices and backends."""

from __future__ import annotations

import json as json_module


def info(json: bool = False) -> None:
    """Show versions, devices and backends, and why a backend is not in use.

    Args:
        json: print JSON instead of text.
    """
    from fastkd._info import info as collect

    found = collect()
    print(json_module.dumps(found, indent=2, default=str) if json else found)
