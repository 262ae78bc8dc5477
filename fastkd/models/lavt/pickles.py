"""What a pickle names, read off its operations: nothing in it is run or made."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

_PLAIN = {
    "collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.bytearray", "builtins.complex",
    "_codecs.encode", "argparse.Namespace",
}  # fmt: skip
_OF_TENSORS = ("torch._utils._rebuild_", "torch._tensor.", "torch.nn.parameter.", "torch.storage.")
_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
_GET = ("GET", "BINGET", "LONG_BINGET")


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
    """Whether a name is one of those that tensors and plain containers are saved with."""
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
