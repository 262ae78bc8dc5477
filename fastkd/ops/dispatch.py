"""Which backend computes a call: the table of what exists, what works here, and what ``"auto"`` prefers.

Every operator in this package starts with :func:`choose`. Nothing is imported or compiled before a call needs it. A
backend is tried once per device with a tiny self-test against the reference, in its own thread, which has none of
the caller's torch state; a failure is remembered, warned of once and shown by ``fastkd.info()``.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
import threading
import warnings
from contextlib import nullcontext

import torch
from torch import Tensor

from fastkd._compile import constant_result
from fastkd.errors import BackendUnavailable, FastKDWarning
from fastkd.ops import workspace
from fastkd.ops.torch_state import transformed, wrapper

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""Every backend's name: plain torch, C++, Triton, CUDA C++."""

IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "softmax_kl": ("reference", "cpu", "triton", "cuda"),
    "relation": ("reference", "cpu", "triton", "cuda"),
    "pixel_word": ("reference", "cpu", "triton", "cuda"),
}
"""The backends each family has. A family gains one by a row here and the files of the same name on the lower floors."""

PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
"""What ``"auto"`` tries on each device type, the fastest measured first; other devices use the reference."""

MIN_ELEMENTS: dict[tuple[str, str], int] = {("softmax_kl", "cpu"): 2048, ("pixel_word", "cpu"): 1024}
"""(family, device type) -> number of elements of ``student`` below which the reference was measured faster."""

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What the compiled kernels accept; under ``"auto"`` any other floating dtype goes to the reference."""

OLDEST_TRITON = (3, 6)
"""That of the oldest torch supported, 2.11; the kernels were never run with an older one."""

WITHOUT_FP64 = {("relation", "triton"), ("relation", "cuda"), ("pixel_word", "triton")}
"""(family, backend) without fp64: a GPU's matrix units have none worth having. "auto" goes on to the next backend."""

TRANSFORM = "transform"
"""Stands for a call inside vmap, torch.func or forward mode, which no kernel has rules for."""

_lock = threading.RLock()
_reasons: dict[tuple[str, str | None, str | None], str | None] = {}  # (backend, family, device) -> reason, None = works
_testing: set[tuple[str, str | None, str | None]] = set()
_warned: set[str] = set()
_prober = threading.local()  # .active is True in the thread of a self-test


class _Passing(str):
    """A reason that may be gone at the next call, such as a lack of memory: not remembered."""


def _after_fork() -> None:
    """Replace the lock in a forked child, where the thread that held it does not exist."""
    global _lock
    _lock = threading.RLock()
    _testing.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def choose(family: str, backend: str, student: Tensor, *others: Tensor, masks: tuple[Tensor | None, ...] = ()) -> str:
    """Return the backend that computes this call: "reference", "cpu", "triton" or "cuda".

    Args:
        family: "softmax_kl", "relation" or "pixel_word".
        backend: what the caller asked for. "auto" takes ``FASTKD_BACKEND`` if it is set (and the family has it), else
            the fastest for the device, dtype and size of ``student``; another name is used or refused, never replaced.
        student: the tensor whose device, dtype and size decide.
        others: further inputs; a dtype that a backend does not know sends "auto" to the next one. Inside vmap,
            torch.func transforms and forward mode, and for wrapper classes such as DTensor, it takes the reference.
        masks: boolean inputs, of which the class alone counts.

    Raises:
        ValueError: ``backend`` (or ``FASTKD_BACKEND``) is not a backend's name.
        BackendUnavailable: the backend asked for by name cannot compute this call here; says why, and what would.
    """
    small = False
    if backend == "auto":
        limit = MIN_ELEMENTS.get((family, student.device.type), 0)
        if student.numel() < limit:  # a branch: torch.compile guards on the comparison, not on the size
            small = True
    dtypes = [x.dtype for x in (student, *others)]
    kind = "" if all(dtype in KERNEL_DTYPES for dtype in dtypes) else "other"
    if not kind and torch.float64 in dtypes:
        kind = "fp64"
    around = TRANSFORM if transformed(student, *others) else wrapper(student, *others, *masks)
    return _resolve(family, backend, student.device.type, student.device.index, kind, small, around)


def unavailable_reason(backend: str, family: str | None = None, device: str | torch.device | None = None) -> str | None:
    """Return why ``backend`` is not in use here, or None if it is.

    With ``family`` and ``device`` (for example "softmax_kl", "cuda:0") the family's kernels are also run once there on
    a tiny input and compared with the reference. The answer is remembered for the life of the process.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return None
    key = (backend, family, None if device is None else str(device))
    if key in _reasons:
        return _reasons[key]
    # The thread of a self-test works for a caller that holds the lock and waits for it.
    with nullcontext() if getattr(_prober, "active", False) else _lock:
        if key in _reasons or key in _testing:  # a self-test asks about the backend it is testing
            return _reasons.get(key)
        _testing.add(key)
        try:
            reason = _probe(backend, family, None if device is None else torch.device(device))
        finally:
            _testing.discard(key)
        # While a CUDA graph is recorded nothing may be launched and read back, so that answer is not remembered.
        if not isinstance(reason, _Passing) and not _capturing(device):
            _reasons[key] = reason
    return reason


@constant_result
def backend_from_env(family: str) -> str:
    """What ``FASTKD_BACKEND`` makes of "auto" for this family: a backend, or "auto" if none that the family has."""
    wish = os.environ.get("FASTKD_BACKEND", "auto") or "auto"
    if wish not in ("auto", *BACKENDS):
        raise ValueError(f"FASTKD_BACKEND: expected one of auto, {', '.join(BACKENDS)}, got {wish!r}")
    return wish if wish in IMPLEMENTED[family] else "auto"  # a family without that backend goes on as usual


@constant_result
def _resolve(
    family: str,
    backend: str,
    device_type: str,
    device_index: int | None,
    dtypes: str,
    small: bool,
    around: str = "",
) -> str:
    """:func:`choose` on plain values: under torch.compile its answer is a constant of the compiled graph.

    ``dtypes`` is "other" if a kernel knows not all of the inputs' dtypes, "fp64" if one is that, else empty. ``around``
    is what keeps kernels from this call on any machine: TRANSFORM, the name of a wrapper class, else empty.
    """
    exist = IMPLEMENTED[family]
    device = device_type if device_index is None else f"{device_type}:{device_index}"
    asked = backend
    said = f"backend={backend!r}"
    if backend == "auto":
        asked = backend_from_env(family)
        said = f"FASTKD_BACKEND={asked}"
    if asked == "auto":
        return _auto_backend(family, device_type, device, dtypes, small or bool(around))
    if asked not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if asked not in exist:
        raise BackendUnavailable(
            f"{said}: {family} has no {asked} backend yet; it has {', '.join(exist)}. Use backend='auto'."
        )
    if asked == "reference":
        return asked
    if around == TRANSFORM:
        raise BackendUnavailable(
            f"{said}: {family}'s kernels have no rules for vmap, torch.func transforms and forward-mode AD, and the "
            "derivative would be 0; use backend='auto' or 'reference' there"
        )
    if around:
        raise BackendUnavailable(
            f"{said}: {family}'s kernels take plain tensors, got {around}, whose values lie in other tensors; pass "
            "those (for a DTensor x.to_local() or x.full_tensor()), or use backend='auto' or 'reference'"
        )
    if dtypes == "other":
        names = ", ".join(str(d).removeprefix("torch.") for d in KERNEL_DTYPES)
        raise BackendUnavailable(f"{said}: the kernels take {names}; convert the inputs or use backend='reference'")
    if dtypes == "fp64" and (family, asked) in WITHOUT_FP64:
        raise BackendUnavailable(
            f"{said}: its {family} kernels take no float64; convert the inputs, or use backend='auto' or 'reference'"
        )
    reason = _misplaced(asked, device_type) or unavailable_reason(asked, family, device)
    if reason is not None:
        raise BackendUnavailable(f"{said} cannot run {family} on {device}: {reason}. backend='reference' always works.")
    return asked


def _auto_backend(family: str, device_type: str, device: str, dtypes: str, plain: bool) -> str:
    """What "auto" means: the first preferred backend that works; one warning for each that ought to and doesn't.

    ``plain`` asks for plain torch: the input is small, or not for kernels.
    """
    if plain or dtypes == "other":
        return "reference"
    for name in PREFERENCE.get(device_type, ()):
        if name not in IMPLEMENTED[family] or (dtypes == "fp64" and (family, name) in WITHOUT_FP64):
            continue
        reason = unavailable_reason(name, family, device)
        if reason is None:
            return name
        # A passing reason is warned of once too, and does not silence a later, lasting one.
        passing = isinstance(reason, _Passing)
        if name not in _warned and not (passing and f"{name}, passing" in _warned):
            _warned.add(f"{name}, passing" if passing else name)
            warnings.warn(
                f"fastkd: the {name} backend is left out, slower ones are used on {device}: {reason}. "
                + ("It is tried again at the next call; " if passing else "Said once; fastkd.info() shows it again, ")
                + "backend=... or FASTKD_BACKEND=... picks another.",
                FastKDWarning,
                stacklevel=4,
            )
    return "reference"


def _misplaced(backend: str, device_type: str) -> str | None:
    """Why ``backend`` has no business on tensors of this device type, or None."""
    if backend == "cpu" and device_type != "cpu":
        return "it takes CPU tensors; use backend='auto', or move the inputs with .cpu()"
    if backend == "cuda" and device_type != "cuda" and not (device_type == "cpu" and _emulated()):
        return "it takes CUDA tensors; use backend='auto', or move the inputs with .cuda()"
    if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return (
            "Triton takes CUDA tensors; use backend='auto', or move the inputs with .cuda() "
            "(for tests, TRITON_INTERPRET=1 set before Triton is imported interprets the kernels on CPU tensors)"
        )
    if backend == "triton" and device_type not in ("cpu", "cuda"):
        return f"Triton kernels were not tried on {device_type}; use backend='auto'"
    return None


def _capturing(device: str | torch.device | None) -> bool:
    return device is not None and torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing()


def _probe(backend: str, family: str | None, device: torch.device | None) -> str | None:
    """Import ``backend``, look for a device it can use and, given a family and a device, run its self-test there.

    All of it runs in a new thread: the caller may be under inference mode, functional transforms, fake tensors, hooks
    for saved tensors, a default device or a tracer, and each of these belongs to a thread.
    """
    if _capturing(device):  # asked of the caller's stream
        family = None
    if getattr(_prober, "active", False):
        return _examine(backend, family, device)
    answers: list[str | None] = []

    def work() -> None:
        _prober.active = True
        # A caller whose first call comes on a GPU has initialised CUDA; a new thread starts on device 0.
        on_gpu = device is not None and device.type == "cuda" and torch.cuda.is_initialized()
        try:
            with torch.cuda.device(device) if on_gpu else nullcontext(), workspace.default_limit():
                answers.append(_examine(backend, family, device))
        except BaseException as error:  # SystemExit too would end the thread without an answer
            answers.append(_failure(error, f"it cannot be tried on {device}: "))

    thread = threading.Thread(target=work, name="fastkd self-test", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no more threads
        return _Passing(f"its self-test cannot run now: {_first_line(error)}")
    thread.join()
    return answers[0]


def _examine(backend: str, family: str | None, device: torch.device | None) -> str | None:
    """Do the work of :func:`_probe`, in the thread that this runs in."""
    reason = _absent(backend)
    if reason is not None or family is None or device is None:
        return reason
    if backend == "triton" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return (
                f"the Triton kernels need compute capability 8.0 or newer, {device} "
                f"({torch.cuda.get_device_name(device)}) has {capability[0]}.{capability[1]}"
            )
    if backend == "cuda" and device.type == "cuda":
        targets = importlib.import_module("fastkd._native").load(backend).targets()
        lacks = _no_code(targets, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
        if lacks is not None:
            return lacks
    try:
        with torch.no_grad():
            return importlib.import_module(f"fastkd.ops.{family}").self_test(backend, device)
    except Exception as error:  # whatever a broken installation raises is a reason, and the program goes on
        return _failure(error, f"its self-test failed on {device}: ")


def _failure(error: BaseException, prefix: str) -> str:
    """Return the reason that an exception makes: a passing one if it reports that memory is short."""
    reason = f"{prefix}{type(error).__name__}: {_first_line(error)}"
    return _Passing(reason) if _out_of_memory(error) else reason


def _out_of_memory(error: BaseException | None) -> bool:
    """Return whether this exception, or one that it was raised from, says that memory (or a thread) was short."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EAGAIN):
            return True
        # torch's CPU allocator and the native modules raise plain RuntimeErrors
        if re.search(r"out of memory|not enough memory|can't allocate memory|cannot allocate memory", str(error), re.I):
            return True
        error = error.__cause__ or error.__context__
    return False


def _absent(backend: str) -> str | None:
    """Why ``backend`` cannot be used on any device of this machine, or None."""
    if backend == "triton":
        try:
            found = importlib.import_module("triton").__version__
        except Exception as error:
            if _out_of_memory(error):
                raise
            return f"Triton cannot be imported ({_first_line(error)}); pip install triton"
        if _numbers(found) < OLDEST_TRITON:
            oldest = ".".join(map(str, OLDEST_TRITON))
            return f"Triton {found} is older than {oldest}; pip install --upgrade torch, which brings the one it wants"
        try:
            kernels = importlib.import_module("fastkd.kernels.common")
        except ModuleNotFoundError as error:
            if error.name != "fastkd.kernels":
                return _failure(error, "fastkd.kernels cannot be imported: ")
            return importlib.import_module("fastkd._native").not_installed("fastkd.kernels")
        except Exception as error:
            return _failure(error, "fastkd.kernels cannot be imported: ")
        if kernels.INTERPRETED:
            numpy = importlib.import_module("numpy").__version__
            if _numbers(found) < (3, 7) and _numbers(numpy) >= (2, 4):
                return (
                    f"the interpreter of Triton {found} needs numpy below 2.4, found {numpy}; pip install 'numpy<2.4'"
                )
            return None
        return None if torch.cuda.is_available() else _no_gpu()
    try:
        module = importlib.import_module("fastkd._native").load(backend)
    except ImportError as error:
        return _Passing(_first_line(error)) if _out_of_memory(error) else _first_line(error)
    if backend == "cuda" and not _emulated():
        if not torch.cuda.is_available():
            return _no_gpu()
        if module.device_count() == 0:
            return _no_device(module.driver_version(), module.runtime_version())
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the major and the minor version."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _no_device(driver: int, runtime: int) -> str:
    """Why CUDA's runtime in ``fastkd._cuda`` sees no device where torch sees one; versions as CUDA counts them."""
    if driver // 1000 >= runtime // 1000:
        return "the CUDA runtime in fastkd._cuda sees no device, though torch does; is CUDA_VISIBLE_DEVICES set late?"
    mine, needed = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime // 1000 * 1000))
    return (
        f"the NVIDIA driver supports CUDA {mine}, fastkd._cuda needs one that supports {needed}: update the driver, or "
        f"reinstall fastkd from the sources with a CUDA {driver // 1000} toolkit"
    )


def _no_code(targets: list[str], capability: tuple[int, int], name: str) -> str | None:
    """Why code for ``targets`` ("sm_80", ..., "compute_120") does not run on a device of this capability, or None."""
    has = 10 * capability[0] + capability[1]
    for target in targets:
        kind, _, number = target.partition("_")
        # Machine code serves its own generation from its own revision on, PTX everything newer.
        if int(number) <= has and (kind == "compute" or int(number) // 10 == has // 10):
            return None
    return (
        f"fastkd._cuda was compiled for {', '.join(targets)} and has no code for {name} (compute capability "
        f"{capability[0]}.{capability[1]}); reinstall fastkd from the sources with a CUDA toolkit that knows it"
    )


def _emulated() -> bool:
    """Whether tests put the CUDA kernels built for the host, which take CPU tensors, in place of ``fastkd._cuda``."""
    return getattr(sys.modules.get("fastkd._cuda"), "EMULATED", False)


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install a CUDA build of torch"
    return "no NVIDIA GPU is visible (torch.cuda.is_available() is False)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
