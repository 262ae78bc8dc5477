"""Print to consoles whose encoding lacks some characters, substituting plain ones."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterator

# One-to-one substitutions keep the width of frames and table columns.
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
    """Return ``text`` with plain characters in place of those that the encoding lacks.

    Example:
        >>> plain("34.1 ± 0.2, −3", "ascii")
        '34.1 +- 0.2, -3'
    """
    return text.encode(encoding, _HANDLER).decode(encoding, "replace")


def decode_argument(text: str) -> str:
    """Return a command-line argument decoded as UTF-8 where the locale (``LC_ALL=C``) left surrogate escapes.

    Do not apply it to file names: the escaped form is the one that the file system finds.
    """
    try:
        return text.encode("ascii", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


@contextlib.contextmanager
def plain_characters() -> Iterator[None]:
    """Substitute plain characters on standard output and error instead of failing on unencodable ones.

    An error handler that the user chose (``PYTHONIOENCODING=ascii:replace``) is kept.
    """
    changed: list[tuple[io.TextIOWrapper, str]] = []
    for stream in (sys.stdout, sys.stderr):
        # None without a console; streams of other classes (in a notebook) take any text.
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            errors = stream.errors
            if errors in ("strict", "surrogateescape", "backslashreplace"):  # Python's defaults, not a user's choice
                stream.reconfigure(errors=_HANDLER)
                changed.append((stream, errors))
    try:
        yield
    finally:
        for stream, errors in changed:
            if not stream.closed:
                with contextlib.suppress(OSError):  # the reader of a pipe may have closed it
                    stream.reconfigure(errors=errors)


def show(text: str) -> None:
    """Print text that a run also writes to files; warn if standard output cannot be written, instead of failing."""
    try:
        print(text, flush=True)
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError) and sys.stderr is not None:
            with contextlib.suppress(OSError):
                print(f"fastkd: warning: standard output cannot be written: {error}", file=sys.stderr)


def drop_output() -> None:
    """Discard this process's standard output from now on, including its buffer."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a file descriptor
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return the substitute for an unencodable character: an error handler for `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that the locale could not decode
        return bytes([ord(character) - 0xDC00]), error.start + 1
    replacement = _PLAIN.get(character)
    if replacement is None:  # "é" decomposes into "e" and an accent
        replacement = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    if not replacement and not unicodedata.combining(character):
        replacement = "?"
    return replacement, error.start + 1


_HANDLER = "fastkd.plain"
codecs.register_error(_HANDLER, _replace)
