"""The ``fastkd`` command: data sets, training, distillation, evaluation, prediction, export and the demo."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fastkd._console import drop_output, plain_characters
from fastkd.errors import FastKDWarning

_SAID_WELL = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, KeyError)


@plain_characters()
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
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is an error now, not after this function's answer
    except KeyboardInterrupt:
        print("fastkd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        drop_output()
        return 141
    except Exception as error:
        if os.environ.get("FASTKD_TRACEBACK", "0") not in ("", "0"):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of one quotes itself
        kind = "" if isinstance(error, _SAID_WELL) else f"{type(error).__name__}: "
        notes = list(getattr(error, "__notes__", ()))
        if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
            notes.append(f"this locale names files in {error.encoding} alone: set PYTHONUTF8=1, or a UTF-8 locale")
        print(f"fastkd: error: {kind}{message}", *notes, sep="\n  ", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = plain
    return 0


if __name__ == "__main__":
    sys.exit(main())
