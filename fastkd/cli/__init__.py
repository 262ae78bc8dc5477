"""The ``fastkd`` command: data sets, training, distillation, evaluation, prediction, export and the demo."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fastkd.errors import FastKDWarning

_SAID_WELL = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, KeyError)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line on stderr and status 2 (``FASTKD_TRACEBACK=1`` shows more)."""
    from fastkd.cli._app import build_app

    plain = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if issubclass(category, FastKDWarning):
            return f"fastkd: warning: {message}\n"  # where in the code it arose helps nobody here
        return plain(message, category, *where, **line)

    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        build_app().cli(prog="fastkd", args=args)
    except KeyboardInterrupt:
        print("fastkd: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("FASTKD_TRACEBACK", "0") not in ("", "0"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of one quotes itself
        kind = "" if isinstance(error, _SAID_WELL) else f"{type(error).__name__}: "
        print(f"fastkd: error: {kind}{message}", *getattr(error, "__notes__", ()), sep="\n  ", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = plain
    return 0


if __name__ == "__main__":
    sys.exit(main())
