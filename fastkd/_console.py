"""Text on consoles whose encoding lacks some of its characters: plain ones are shown for them."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterator

# Where single characters stand for single ones, the frames and columns of tables keep their width.
_PLAIN = {
    **dict.fromkeys("‐‑‒–—−─━╌╍┄┅┈┉═╴╶╸╺", "-"),
    **dict.fromkeys("│┃┆┇┊┋║╎╏", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┣┫┳┻╋╔╗╚╝╠╣╦╩╬", "+"),
    **dict.fromkeys("█▉▊▋▌▍▎▏■▓▒░", "#"),
    **dict.fromkeys("‘’‚′", "'"),
    **dict.fromkeys("“”„″", '"'),
    **dict.fromkeys("•·⋅", "*"),
    **{"×": "x", "±": "+-", "…": "...", "→": "->", "←": "<-", "≥": ">=", "≤": "<=", "≠": "!=", "µ": "u", "μ": "u"},
    **{
        "²": "^2",
        "³": "^3",
        "√": "sqrt",
        "∞": "inf",
        "τ": "tau",
        "Σ": "sum",
        "‖": "||",
        "°": " deg",
        "ß": "ss",
        "ø": "o",
        "æ": "ae",
        "œ": "oe",
    },
}


def plain(text: str, encoding: str) -> str:
    """Return the text with plain characters for those that the encoding lacks.

    Example:
        >>> plain("34.1 ± 0.2, −3", "ascii")
        '34.1 +- 0.2, -3'
    """
    return text.encode(encoding, _HANDLER).decode(encoding, "replace")


def typed(text: str) -> str:
    """Return an argument of the command line as text, where the locale (``LC_ALL=C``) left it as bytes: UTF-8's.

    Names of files stay as they are: that form is the one that finds them.
    """
    try:
        return text.encode("ascii", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


@contextlib.contextmanager
def plain_characters() -> Iterator[None]:
    """Let standard output and error show plain characters, rather than fail, for those that their encoding lacks.

    What the user chose for such characters (``PYTHONIOENCODING=ascii:replace``) stays.
    """
    changed: list[tuple[io.TextIOWrapper, str]] = []
    for stream in (sys.stdout, sys.stderr):
        # None without a console; other types (a notebook's) take any text. Python's own choices are these three.
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            errors = stream.errors
            if errors in ("strict", "surrogateescape", "backslashreplace"):
                stream.reconfigure(errors=_HANDLER)
                changed.append((stream, errors))
    try:
        yield
    finally:
        for stream, errors in changed:
            if not stream.closed:
                with contextlib.suppress(OSError):  # the reader of a pipe may be gone
                    stream.reconfigure(errors=errors)


def show(text: str) -> None:
    """Print what a run also keeps in files: an output that cannot be written (any more) does not make the run fail."""
    try:
        print(text, flush=True)
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError) and sys.stderr is not None:
            with contextlib.suppress(OSError):
                print(f"fastkd: warning: standard output cannot be written: {error}", file=sys.stderr)


def drop_output() -> None:
    """Send this process's standard output nowhere from now on, also what waits in its buffer."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a file descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handle an error of encoding; see `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that the locale could not decode
        return bytes([ord(character) - 0xDC00]), error.start + 1
    replacement = _PLAIN.get(character)
    if replacement is None:  # "é" is "e" and an accent
        replacement = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    if not replacement and not unicodedata.combining(character):
        replacement = "?"
    return replacement, error.start + 1


_HANDLER = "fastkd.plain"
codecs.register_error(_HANDLER, _replace)
