"""The ``fastkd`` command: ``info``, ``data make-shapes``, ``train``, ``distill``, ``evaluate`` and ``demo``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line on stderr and status 2 (``FASTKD_TRACEBACK=1`` shows more)."""
    from fastkd.cli._app import build_app

    try:
        build_app().cli(prog="fastkd", args=args)
    except KeyboardInterrupt:
        print("fastkd: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("FASTKD_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"fastkd: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
