"""Check values that come from a dataset, and quote them in messages."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from typing import Any

_INT64 = 2**63
LONGEST_SENTENCE = 10_000  # characters; the longest published sentences have a few hundred

_NOT_TEXT = re.compile(r"[\0\ud800-\udfff]")
_WORD = re.compile(r"\w")
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 3, 6, 6, 6
_REPR.maxstring, _REPR.maxlong, _REPR.maxother = 120, 40, 120


def brief(value: Any) -> str:
    """Return a short ``repr``; that of nested data can be exponentially larger than the file it was read from."""
    try:
        return _REPR.repr(value)
    except Exception:  # an integer of more than 4300 digits, for example
        return f"a value of type {type(value).__name__}"


def is_int(value: Any) -> bool:
    """Return whether a value is an integer of at most 64 bits; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and -_INT64 <= value < _INT64


def sentence_fault(text: str) -> str | None:
    """Return what makes a sentence unusable, or None."""
    if not text.strip():
        return "is empty"
    if len(text) > LONGEST_SENTENCE:
        return f"has {len(text)} characters, more than {LONGEST_SENTENCE}"
    if found := _NOT_TEXT.search(text):
        what = "a NUL character" if found[0] == "\0" else "half of a surrogate pair, which is not text"
        return f"holds {what} ({brief(text)})"
    # A zero-width space, for example, which tokenizers remove.
    if not _WORD.search(text) and all(unicodedata.category(character)[0] in "CMZ" for character in text):
        return f"holds no visible character ({text!a:.60})"
    return None
