"""Test a backend on this machine: import it, look for its device, run its self-test, and return why it failed.

The test runs in a separate thread, because the caller may be under inference mode, functional transforms, fake tensors,
saved-tensor hooks, a default device or a tracer. All of these are per-thread state.
"""

from __future__ import annotations

import errno
import importlib
import re
import threading
from contextlib import nullcontext
from typing import Protocol

import torch

from fastkd.ops.launch import default_workspace_limit

_thread = threading.local()  # .active is True in a self-test's thread


class Probed(Protocol):
    """The parts of a `Backend` that a probe uses."""

    @property
    def name(self) -> str:
        """Value of ``backend=``."""

    def machine_reason(self) -> str | None:
        """Return why no device of this machine can run the backend, or None."""

    def device_reason(self, device: torch.device, /) -> str | None:
        """Return why a device of this machine cannot run the backend, or None."""


class TransientReason(str):
    """A reason that may not apply to the next call, such as a lack of memory; it is not cached."""


class UntestedReason(TransientReason):
    """The reason while a CUDA graph is captured: nothing can be loaded or read back, so no test can run."""


def in_self_test() -> bool:
    """Return whether this thread is running a self-test."""
    return getattr(_thread, "active", False)


def is_capturing(device: str | torch.device | None) -> bool:
    """Return whether a CUDA graph is being captured on a GPU's stream, so that no result can be read back."""
    return device is not None and torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing()


def probe(backend: Probed, family: str | None, device: torch.device | None) -> str | None:
    """Return why ``backend`` cannot be used, or None. The self-test needs a family and a device."""
    if is_capturing(device):
        return backend.machine_reason() or UntestedReason(
            "its kernels have not run in this process, and cannot be loaded and tested while a CUDA graph is captured: "
            "call the loss once, with its backward, before the capture"
        )
    if in_self_test():
        return _probe_here(backend, family, device)
    answers: list[str | None] = []

    def work() -> None:
        _thread.active = True
        # A new thread starts on device 0. A caller with a CUDA tensor has initialised CUDA.
        on_gpu = device is not None and device.type == "cuda" and torch.cuda.is_initialized()
        try:
            with torch.cuda.device(device) if on_gpu else nullcontext(), default_workspace_limit():
                answers.append(_probe_here(backend, family, device))
        except BaseException as error:  # even SystemExit would end the thread without an answer
            answers.append(failure_reason(error, f"it could not be tested on {device}: "))

    thread = threading.Thread(target=work, name="fastkd self-test", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no more threads
        return TransientReason(f"its self-test cannot run now: {first_line(error)}")
    thread.join()
    return answers[0]


def _probe_here(backend: Probed, family: str | None, device: torch.device | None) -> str | None:
    """Run :func:`probe` in the current thread."""
    reason = backend.machine_reason()
    if reason is not None or family is None or device is None:
        return reason
    reason = backend.device_reason(device)
    if reason is not None:
        return reason
    try:
        with torch.no_grad():
            return importlib.import_module(f"fastkd.ops.{family}").self_test(backend.name, device)
    except Exception as error:  # anything that a broken installation raises
        return failure_reason(error, f"its self-test failed on {device}: ")


def compare(results: dict[str, tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> str | None:
    """Return which of a self-test's results, name to (result, fp64 oracle), differs from its oracle, or None."""
    for name, (result, oracle) in results.items():
        error = (result.cpu().double() - oracle.detach()).abs().max().item()
        if not error < 1e-5:
            return f"its self-test on {device} computed a wrong {name} (off by {error:.1e})"
    return None


def failure_reason(error: BaseException, prefix: str) -> str:
    """Return an exception as a reason, a transient one if it reports a lack of memory."""
    reason = f"{prefix}{type(error).__name__}: {first_line(error)}"
    return TransientReason(reason) if is_out_of_memory(error) else reason


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether this exception, or one it was raised from, reports a lack of memory or threads."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN):
            return True
        # torch's CPU allocator and the native modules raise plain RuntimeErrors.
        if re.search(r"out of memory|not enough memory|can't allocate memory|cannot allocate memory", str(error), re.I):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
