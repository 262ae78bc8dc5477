"""Iterate over a DataLoader and shorten its workers' error messages."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

_EXIT_TIMEOUT = 1.0  # seconds to wait for a worker's exit status after its connection broke


class WorkerExited(RuntimeError):
    """A data-loading worker process exited unexpectedly.

    Attributes:
        exitcode: As in `multiprocessing.Process`; the negative signal number if it was killed.
    """

    def __init__(self, exitcode: int, workers: int) -> None:
        how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exited with status {exitcode}"
        super().__init__(
            f"a data-loading worker {how}, most often because memory ran out: lower workers={workers} or the batch "
            "size, give a container more shared memory (--shm-size), or debug with workers=0"
        )
        self.exitcode = exitcode


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a DataLoader.

    A worker's error is raised with its original message; the worker's traceback is its cause. Datasets create tensors
    on the CPU regardless of the default device, because workers cannot use another.

    Raises:
        ValueError: Samples cannot be stacked.
        WorkerExited: A worker was killed or exited with an error status.
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
            explained = _explain(error, iterator)
            if explained is error:
                raise
            raise explained from error
        yield batch


def _on_cpu() -> AbstractContextManager[Any]:
    """Return a context in which tensors are created on the CPU."""
    is_cpu = torch.get_default_device().type == "cpu"
    return nullcontext() if is_cpu else torch.device("cpu")  # a device context slows down every torch call


def _explain(error: Exception, iterator: Any) -> Exception:
    """Return a clearer exception for an error of the loader or a worker, or the error itself."""
    text = str(error)
    sizes = re.search(r"stack expects each tensor to be equal size, but (got .*)", text)
    if sizes or "resize storage that is not resizable" in text:  # the latter when a worker stacks into shared memory
        return ValueError(
            "samples of different sizes cannot be batched "
            f"({sizes.group(1) if sizes else 'found by a worker'}): use one size for all datasets, or resize and pad "
            "in the collate function"
        )
    if text.startswith("Caught ") and "Original Traceback" in text:
        return _unwrap_worker_error(error, text)
    workers = getattr(iterator, "_workers", [])
    if workers and (isinstance(error, OSError | EOFError) or "DataLoader worker" in text):
        code = _exit_code(workers)
        return error if code is None else WorkerExited(code, len(workers))
    return error


def _exit_code(workers: list[Any]) -> int | None:
    """Return the exit status of a failed worker, whose connection may break before it exits."""
    deadline = time.monotonic() + _EXIT_TIMEOUT
    while time.monotonic() < deadline:
        try:
            if codes := [worker.exitcode for worker in workers if worker.exitcode]:
                return int(codes[0])
            time.sleep(0.02)
        except RuntimeError:  # from torch's SIGCHLD handler, at any time
            continue
    return None


def _unwrap_worker_error(error: Exception, text: str) -> Exception:
    """Return a worker's error with its original message, followed by its notes."""
    lines = text.splitlines()
    kind = text.split()[1]
    starts = [n for n, line in enumerate(lines) if re.match(rf"([\w.]+\.)?{re.escape(kind)}(: |$)", line)]
    if not starts:
        return error
    message = "\n".join([lines[starts[-1]].partition(": ")[2], *lines[starts[-1] + 1 :]])
    if type(error).__name__ != kind:  # torch could not reconstruct it
        return RuntimeError(f"{kind}: {message}")
    if isinstance(error, KeyError):
        message = message.strip("'\"")  # added by str() of a KeyError
    try:
        return type(error)(message)
    except Exception:
        return error
