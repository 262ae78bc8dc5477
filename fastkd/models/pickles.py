"""Checkpoints that are pickles: what one names, read off its operations, and its tensors, read without running any."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

_ALLOWED = "tensors, plain containers and argparse.Namespace"
_PLAIN = {
    "collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.bytearray", "builtins.complex",
    "_codecs.encode", "argparse.Namespace",
}  # fmt: skip
_OF_TENSORS = ("torch._utils._rebuild_", "torch._tensor.", "torch.nn.parameter.", "torch.storage.")
_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
_GET = ("GET", "BINGET", "LONG_BINGET")


def load(path: Path) -> Any:
    """Read a file of ``torch.save``: tensors, plain containers and ``argparse.Namespace``, every other object refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or other objects in it; all are named, none is made.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder, no checkpoint; give the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, on pickle protocols that torch.save doesn't use
        if foreign := _foreign_objects(path):
            raise _refusal(path, foreign)
        # torch maps no file whose name the locale could not decode (lone surrogates stand for its bytes).
        decoded = not any("\ud800" <= character <= "\udfff" for character in str(path))
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=decoded and zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:  # torch's message advises to run the code in the file: it is not shown
            names, protocol = contents(path)
            if foreign := [name for name in names if not of_tensors(name)]:
                raise _refusal(path, foreign) from None
            if protocol > 2:
                raise ValueError(
                    f"{path} was pickled with protocol {protocol}; without running code torch reads protocol 2, "
                    "torch.save's default: save it again with that"
                ) from None
            raise ValueError(_damaged(path, error)) from None
        except Exception as error:  # a damaged file raises almost anything; all mean that it gives no weights
            raise ValueError(_damaged(path, error)) from error


def contents(path: Path) -> tuple[list[str], int]:
    """Every class and function named in a checkpoint's pickles, in their order, and the highest protocol.

    For torch's zip archives and for files of one pickle after the other (torch before 1.6, or not torch's); for files
    that hold no pickle the list is empty.
    """
    names: dict[str, None] = {}
    protocol = 0
    for file in _streams(path):
        memo: dict[int, str | None] = {}
        texts = ["", ""]  # the last two strings, which is where STACK_GLOBAL finds module and name
        last: str | None = None
        for operation, argument in _operations(file):
            if operation == "PROTO":
                protocol = max(protocol, argument)
            elif operation in ("GLOBAL", "INST"):
                names[str(argument).replace(" ", ".", 1)] = last = None
            elif operation == "STACK_GLOBAL":
                names[".".join(texts)] = last = None
            elif operation == "MEMOIZE":
                memo[len(memo)] = last
            elif operation in _PUT:
                memo[argument] = last
            elif operation == "STOP":
                memo = {}
            elif operation != "FRAME":
                last = memo.get(argument) if operation in _GET else argument if isinstance(argument, str) else None
                texts = texts if last is None else [texts[1], last]
    return list(names), protocol


def of_tensors(name: str) -> bool:
    """Return whether a name is one of those that tensors and plain containers are saved with."""
    module, _, own = name.replace("__builtin__", "builtins").rpartition(".")
    if module == "torch":  # storages, dtypes, Size; functions are not
        return isinstance(getattr(torch, own, None), type | torch.dtype | torch.layout)
    return f"{module}.{own}" in _PLAIN or name.startswith(_OF_TENSORS)


def _streams(path: Path) -> Iterator[IO[bytes]]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith("data.pkl"):
                with archive.open(member) as file:
                    yield file


def _operations(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    try:
        while True:
            for operation, argument, _ in pickletools.genops(file):
                yield operation.name, argument
    except Exception:  # the end, or bytes that are no pickle
        return


def _foreign_objects(path: Path) -> list[str]:
    """Names of classes and functions in the pickle that are not allowed, found by reading it, not by running it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no zip archive (torch before 1.6), another protocol, or a damaged file: torch.load tells
        return []


def _refusal(path: Path, names: list[str]) -> ValueError:
    return ValueError(
        f"{path} holds objects other than {_ALLOWED}: {', '.join(names)}. Such a file can run code when it is read, so "
        "it was refused and nothing was run; fetch it from its source, or save it without them"
    )


def _damaged(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        why = "it is empty"
    elif isinstance(error, RuntimeError | EOFError | OSError) and str(error).strip():
        why = re.split(r"(?<=\w)\. ", str(error).strip().splitlines()[0])[0]  # torch's first sentence
    else:
        why = "it is not a pickle of tensors"
    return f"{path} can't be read as a checkpoint ({why}): cut off while downloading, or no torch file"
