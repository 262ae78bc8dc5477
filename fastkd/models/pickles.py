"""Read pickled checkpoints without running code: load tensors only, and list the classes and functions in a pickle."""

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
_TENSOR_PREFIXES = ("torch._utils._rebuild_", "torch._tensor.", "torch.nn.parameter.", "torch.storage.")
_PUT = ("PUT", "BINPUT", "LONG_BINPUT")
_GET = ("GET", "BINGET", "LONG_BINGET")


def load(path: Path) -> Any:
    """Read a file of ``torch.save``; reject objects other than tensors, plain containers and ``argparse.Namespace``.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or holds other objects; all are listed, none is constructed.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder, not a checkpoint; pass the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about pickle protocols other than torch.save's
        if disallowed := _disallowed_names(path):
            raise _rejection(path, disallowed)
        # torch cannot memory-map a file whose name is not decodable in the locale (lone surrogates encode its bytes).
        decodable = not any("\ud800" <= character <= "\udfff" for character in str(path))
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=decodable and zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:  # not chained: torch's message suggests running the code
            names, protocol = referenced_names(path)
            if disallowed := [name for name in names if not is_allowed(name)]:
                raise _rejection(path, disallowed) from None
            if protocol > 2:
                raise ValueError(
                    f"{path} was pickled with protocol {protocol}, but torch's safe loader reads only protocol 2, "
                    "torch.save's default: save it again with protocol 2"
                ) from None
            raise ValueError(_damaged(path, error)) from None
        except Exception as error:  # damaged files raise many types
            raise ValueError(_damaged(path, error)) from error


def referenced_names(path: Path) -> tuple[list[str], int]:
    """Return the classes and functions that a checkpoint's pickles name, in order, and the highest protocol.

    Reads torch's zip archives and files of consecutive pickles (torch before 1.6, or not written by torch). The list is
    empty for files that hold no pickle.
    """
    names: dict[str, None] = {}
    protocol = 0
    for file in _streams(path):
        memo: dict[int, str | None] = {}
        texts = ["", ""]  # the last two strings: STACK_GLOBAL's module and name
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


def is_allowed(name: str) -> bool:
    """Return whether a name belongs to the pickled form of tensors, plain containers or ``argparse.Namespace``."""
    module, _, own = name.replace("__builtin__", "builtins").rpartition(".")
    if module == "torch":  # storages, dtypes, Size; not functions
        return isinstance(getattr(torch, own, None), type | torch.dtype | torch.layout)
    return f"{module}.{own}" in _PLAIN or name.startswith(_TENSOR_PREFIXES)


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
    except Exception:  # end of file, or not a pickle
        return


def _disallowed_names(path: Path) -> list[str]:
    """Return disallowed classes and functions in a pickle, without running it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip archive (torch before 1.6), another protocol, or damaged: torch.load reports it
        return []


def _rejection(path: Path, names: list[str]) -> ValueError:
    return ValueError(
        f"{path} holds objects other than {_ALLOWED}: {', '.join(names)}. Such a file can run code when it is "
        "loaded, so it was rejected and nothing was run; download it from its source, or save it without them"
    )


def _damaged(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        reason = "it is empty"
    elif isinstance(error, RuntimeError | EOFError | OSError) and str(error).strip():
        reason = re.split(r"(?<=\w)\. ", str(error).strip().splitlines()[0])[0]  # torch's first sentence
    else:
        reason = "it is not a pickle of tensors"
    return f"{path} can't be read as a checkpoint ({reason}): the download was incomplete, or it is not a torch file"
