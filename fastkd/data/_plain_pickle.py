"""Read pickles of plain data: lists, dicts, strings and numbers; reject everything else before it is constructed.

The reader is the Python implementation in the standard library, restricted to the opcodes of plain data. The C
implementation has no hook for two attacks that kill the process: a memo index of 2**32 - 1, which allocates 64 GiB, and
a deeply nested tuple as a dict key, whose hash overflows the C stack.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from fastkd.data._values import brief

_ALLOWED = {  # the last three call find_class, which rejects the name
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.NONE, pickle.NEWTRUE,
    pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1,
    pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING,
    pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES,
    pickle.SHORT_BINBYTES, pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT,
    pickle.DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
    pickle.TUPLE3, pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT,
    pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.INST,
}  # fmt: skip
_CONSTRUCTING = {
    getattr(pickle, name)[0]: name
    for name in (
        "REDUCE", "BUILD", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID",
        "BYTEARRAY8", "EMPTY_SET", "FROZENSET", "NEXT_BUFFER",
    )
}  # fmt: skip
_KEYS = (str, int, bytes)


class Damaged(pickle.UnpicklingError, ValueError):
    """The content is not a complete pickle of plain data."""


class Rejected(Damaged):
    """The content names a class or a function, or constructs an object."""


def loads(content: bytes, path: Path, encoding: str = "utf-8") -> Any:
    """Return the plain data in a pickle.

    Args:
        content: The pickle, of protocol 0 to 5.
        path: Its file, for messages.
        encoding: How to decode the byte strings of Python 2.

    Raises:
        Rejected: It names a class or a function, or constructs an object.
        Damaged: It is not a complete pickle, or a key of a dict is neither a string nor an integer.
        UnicodeDecodeError: A byte string of Python 2 is not in ``encoding``.
    """
    reader = _PlainUnpickler(io.BytesIO(content), encoding=encoding)
    reader.path = path
    try:
        return reader.load()
    except (Rejected, UnicodeDecodeError):
        raise
    except KeyError as error:
        operation = error.args[0]
        if isinstance(operation, int) and operation in _CONSTRUCTING:
            raise Rejected(_untrusted(path, f"constructs an object (opcode {_CONSTRUCTING[operation]})")) from None
        raise Damaged(f"{path} can't be read as a pickle (opcode {operation!r}): download it again") from error
    except Exception as error:  # damaged pickles raise many types
        raise Damaged(f"{path} can't be read as a pickle ({_shortened(error)}): download it again") from error


_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _PlainUnpickler(_Unpickler):
    """Load plain data; other opcodes are unknown to it."""

    path: Path
    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        operation: load for operation, load in _Unpickler.dispatch.items() if bytes([operation]) in _ALLOWED
    }

    def find_class(self, module: str, name: str) -> Any:
        raise Rejected(_untrusted(self.path, f"names {brief(f'{module}.{name}')[1:-1]}"))

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])  # (key, value, key, value, …) since the last mark
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }


def _check_keys(keys: list[Any]) -> None:
    for key in keys:
        if not isinstance(key, _KEYS):
            raise ValueError(f"a dict has a key of type {type(key).__name__}, not a string or an integer")


def _untrusted(path: Path, content: str) -> str:
    return (
        f"{path} {content}: a refs file holds only lists, dicts, strings and integers, so this file is not trusted and "
        "nothing in it was run. Download the refs file from its original source"
    )


def _shortened(error: Exception) -> str:
    return f"{error}"[:200] or type(error).__name__
