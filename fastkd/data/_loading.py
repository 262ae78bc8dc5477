"""Batches of a DataLoader, and one error in plain words for what its workers raise."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

_PATIENCE = 1.0  # seconds between a broken connection to a worker and the news of its end


class WorkerEnded(RuntimeError):
    """A process that loads data came to an early end.

    Attributes:
        exitcode: as in `multiprocessing.Process`, minus the signal for one that was killed.
    """

    def __init__(self, exitcode: int, workers: int) -> None:
        how = f"was ended by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with status {exitcode}"
        super().__init__(
            f"a process that loads data {how}: most often memory ran out; lower workers={workers} or the batch size, "
            "give a container more shared memory (--shm-size), or find the cause with workers=0"
        )
        self.exitcode = exitcode


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a DataLoader.

    An error of a worker is raised with its own message alone, the worker's traceback as its cause. Tensors that data
    sets make lie on the CPU, whatever the default device: workers cannot use another.

    Raises:
        ValueError: samples that cannot be stacked.
        WorkerEnded: a worker was killed; the message names the likely cause and the fix.
    """
    with _on_cpu():
        iterator = iter(loader)
    while True:
        try:
            with _on_cpu():
                batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            plain = _explained(error, iterator)
            if plain is error:
                raise
            raise plain from error
        yield batch


def _on_cpu() -> AbstractContextManager[Any]:
    is_cpu = torch.get_default_device().type == "cpu"
    return nullcontext() if is_cpu else torch.device("cpu")  # which slows every call of torch a little


def _explained(error: Exception, iterator: Any) -> Exception:
    text = str(error)
    sizes = re.search(r"stack expects each tensor to be equal size, but (got .*)", text)
    if sizes or "resize storage that is not resizable" in text:  # the latter where a worker stacks into shared memory
        return ValueError(
            f"samples of different sizes do not make a batch ({sizes.group(1) if sizes else 'seen by a worker'}): give "
            "all sets one size, or resize and pad them in the collate function"
        )
    if text.startswith("Caught ") and "Original Traceback" in text:
        return _own(error, text)
    workers = getattr(iterator, "_workers", [])
    if workers and (isinstance(error, OSError | EOFError) or "DataLoader worker" in text):
        code = _exit_code(workers)
        return error if code is None else WorkerEnded(code, len(workers))
    return error


def _exit_code(workers: list[Any]) -> int | None:
    """Return the status of a worker that failed; its connections may break before it has ended."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            if codes := [worker.exitcode for worker in workers if worker.exitcode]:
                return int(codes[0])
            time.sleep(0.02)
        except RuntimeError:  # of torch's handler of SIGCHLD, which may come at any time
            continue
    return None


def _own(error: Exception, text: str) -> Exception:
    """Return a worker's error with the message that it was raised with there, its notes as further lines."""
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
