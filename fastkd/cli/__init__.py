"""The ``fastkd`` command: datasets, training, distillation, evaluation, prediction, export and the demo."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fastkd._console import drop_output, plain_characters
from fastkd.errors import FastKDWarning, Terminated

_EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, KeyError)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours in other packages' messages
_MAX_LENGTH = 600


@plain_characters()
def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    An error is printed to stderr as one line, with status 2; ``FASTKD_TRACEBACK=1`` raises it instead.
    """
    from fastkd.cli._app import build_app
    from fastkd.cli._arguments import PATHS

    format_warning = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if issubclass(category, FastKDWarning):
            return f"fastkd: warning: {message}\n"  # without the source line that issued it
        return format_warning(message, category, *where, **line)

    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        build_app(sys.argv[1:] if args is None else args).cli(prog="fastkd", args=args, registry=PATHS)
        if sys.stdout is not None:
            sys.stdout.flush()  # report a full disk before returning a status
    except KeyboardInterrupt:
        print("fastkd: interrupted", file=sys.stderr)
        return 130
    except Terminated as error:
        print(f"fastkd: ended by {error}", file=sys.stderr)
        return int(error.code or 0)
    except BrokenPipeError:  # the reader of the pipe has exited, as `head` does
        drop_output()
        return 141
    except Exception as error:
        if os.environ.get("FASTKD_TRACEBACK", "0") not in ("", "0"):
            raise
        notes = list(getattr(error, "__notes__", ()))
        if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
            notes.append(f"this locale encodes file names in {error.encoding}: set PYTHONUTF8=1, or a UTF-8 locale")
        print(f"fastkd: error: {_text(error)}", *notes, sep="\n  ", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = format_warning
    return 0


def _text(error: Exception) -> str:
    """Return an error's message, shortened to its first line if another package raised it."""
    # str() of a KeyError would add quotes.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    message = _ESCAPES.sub("", message).strip()
    kind = "" if isinstance(error, _EXPECTED_ERRORS) and message else f"{type(error).__name__}: "
    if not _is_ours(error):
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        if len(lines) > 1 or len(message) > _MAX_LENGTH:
            return f"{kind}{lines[0][:_MAX_LENGTH]} ... (FASTKD_TRACEBACK=1 shows all)"
    return f"{kind}{message}"


def _is_ours(error: BaseException) -> bool:
    """Return whether fastkd itself raised an error; its messages are short and shown whole."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "fastkd"


if __name__ == "__main__":
    sys.exit(main())
