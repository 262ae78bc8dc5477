"""Batches of a DataLoader, and one error in plain words for what its workers raise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a DataLoader.

    An error of a worker is raised with its own message alone, the worker's traceback as its cause. Tensors that data
    sets make lie on the CPU, whatever the default device: workers cannot use another.

    Raises:
        RuntimeError: a worker was killed; the message names the likely cause and the fix.
    """
    try:
        with torch.device("cpu"):
            iterator = iter(loader)
    except Exception as error:
        raise _explained(error, loader) from error
    while True:
        try:
            with torch.device("cpu"):
                batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            plain = _explained(error, loader)
            if plain is error:
                raise
            raise plain from error
        yield batch


def _explained(error: Exception, loader: DataLoader[Any]) -> Exception:
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        return _own(error, text)
    if re.search(r"DataLoader worker \(pid\(?s?\)? .*(killed by signal|exited unexpectedly)", text):
        signal = re.search(r"killed by signal: (\w[\w ]*)", text)
        return RuntimeError(
            f"a process that loads data ended ({signal.group(1).strip() if signal else 'without a message'}): most "
            f"often memory ran out; lower workers={loader.num_workers} or the batch size, give a container more shared "
            "memory (--shm-size), or find the cause with workers=0"
        )
    return error


def _own(error: Exception, text: str) -> Exception:
    """Return a worker's error with the message that it was raised with there; notes stay notes."""
    lines = text.splitlines()
    kind = text.split()[1]
    starts = [n for n, line in enumerate(lines) if re.match(rf"([\w.]+\.)?{re.escape(kind)}(: |$)", line)]
    if not starts:
        return error
    message = "\n".join([lines[starts[-1]].partition(": ")[2], *lines[starts[-1] + 1 :]])
    if type(error).__name__ != kind:  # torch could not make one
        return RuntimeError(f"{kind}: {message}")
    if isinstance(error, KeyError):
        message = message.strip("'\"")  # quotes that str() of a KeyError adds
    try:
        return type(error)(message)
    except Exception:
        return error
