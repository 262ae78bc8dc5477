"""Select the backend of a call: the "auto" policy, and errors for an unusable backend requested by name.

Every operator starts with :func:`choose`. Nothing is imported or compiled before a call needs it. A backend is tested
once per family and device (:mod:`fastkd.ops.availability`); a failure is cached, warned about once and shown by
``fastkd.info()``.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fastkd.errors import BackendUnavailable, FastKDWarning
from fastkd.ops.availability import TransientReason, UntestedReason, in_self_test, probe
from fastkd.ops.backends import BACKENDS, KERNEL_DTYPES
from fastkd.ops.torch_state import constant_result, is_transformed, wrapper_class_name

FAMILIES = ("softmax_kl", "relation", "pixel_word", "attention_kl")
"""The kernel families; a backend computes all of them except its ``families_without_kernels``."""

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
"""The backends that "auto" tries on each device type, in order; other devices use the reference."""

FAMILY_ORDER: dict[tuple[str, str], tuple[str, ...]] = {("relation", "cuda"): ("cuda", "triton", "reference")}
"""(family, device type) -> the order of a family that differs from ``AUTO_ORDER``.

Not measured on a GPU yet. The CUDA kernels of ``relation`` compute half of each symmetric matrix also where a matrix
takes several launches, and split the sum of a product that would not fill the GPU; the Triton kernels do neither.
"""

MIN_ELEMENTS: dict[tuple[str, str], int] = {("softmax_kl", "cpu"): 4096}
"""(family, device type) -> number of elements of ``student`` below which the reference was measured faster.

Measured with AVX2 and with AVX-512, in fp32 and bf16: ``avx2/sweep.json`` and ``avx512/sweep.json`` in
benchmarks/results/amd-epyc-family-25-model-17-2-cores. ``relation`` and ``pixel_word`` are in them, and are faster at
every size. Not measured: AMX (docs/decisions.md).
"""

TRANSFORM = "transform"
"""Marks a call inside vmap, torch.func or forward mode, which no kernel supports."""

_lock = threading.RLock()
_reasons: dict[tuple[str, str | None, str | None], str | None] = {}  # (backend, family, device) -> reason or None
_testing: set[tuple[str, str | None, str | None]] = set()
_warned: set[str] = set()


def _after_fork() -> None:
    """Replace the lock in a forked child, where the thread that held it does not exist."""
    global _lock
    _lock = threading.RLock()
    _testing.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def choose(family: str, backend: str, student: Tensor, *others: Tensor, masks: Sequence[Tensor | None] = ()) -> str:
    """Return the name of the backend that computes this call.

    Args:
        family: one of ``FAMILIES``.
        backend: the caller's argument. "auto" uses ``FASTKD_BACKEND`` if it is set, else the first that works of
            :func:`auto_order`; any other name is used or raises an error, and is never replaced.
        student: the tensor whose device, dtype and size determine the choice.
        others: further inputs. "auto" skips a backend that does not support one of their dtypes, and uses the reference
            inside vmap, torch.func transforms and forward mode and for wrapper classes such as DTensor.
        masks: boolean inputs, which may be wrapper classes too.

    Raises:
        ValueError: ``backend`` (or ``FASTKD_BACKEND``) is not the name of a backend.
        BackendUnavailable: a backend requested by name cannot compute this call here; gives the reason and the fix.
    """
    small = False
    if backend == "auto":
        limit = MIN_ELEMENTS.get((family, student.device.type), 0)
        if student.numel() < limit:  # as a branch, torch.compile guards on the comparison, not on the size
            small = True
    dtype_class, known = "", None
    for x in (student, *others):  # loops, as generators would double the time
        dtype = x.dtype
        if dtype == known:
            continue
        if dtype not in KERNEL_DTYPES:
            dtype_class = "other"
            break
        if dtype == torch.float64:
            dtype_class = "fp64"
        known = dtype
    obstacle = TRANSFORM if is_transformed(student, *others) else wrapper_class_name(student, *others, *masks)
    device = student.device
    return _resolve(family, backend, device.type, device.index, dtype_class, small, obstacle)


def unavailable_reason(backend: str, family: str | None = None, device: str | torch.device | None = None) -> str | None:
    """Return why ``backend`` is unavailable here, or None if it works.

    With ``family`` and ``device`` (for example "softmax_kl", "cuda:0"), the family's kernels also run there once on a
    tiny input and are compared with the reference. The answer is cached for the life of the process.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return None
    if family in BACKENDS[backend].families_without_kernels:
        return f"it has no {family} kernels; use backend='auto'"
    key = (backend, family, device if device is None or isinstance(device, str) else str(device))
    if key in _reasons:
        return _reasons[key]
    # A self-test's caller holds the lock while it waits for the self-test's thread.
    with nullcontext() if in_self_test() else _lock:
        if key in _reasons or key in _testing:  # a self-test may ask about the backend under test
            return _reasons.get(key)
        _testing.add(key)
        try:
            reason = probe(BACKENDS[backend], family, None if device is None else torch.device(device))
        finally:
            _testing.discard(key)
        if not isinstance(reason, TransientReason):
            _reasons[key] = reason
    return reason


@constant_result
def backend_from_env() -> str:
    """Return the backend that ``FASTKD_BACKEND`` substitutes for "auto", or "auto" if it is not set."""
    name = os.environ.get("FASTKD_BACKEND", "auto") or "auto"
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"FASTKD_BACKEND: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


@constant_result
def _resolve(
    family: str,
    backend: str,
    device_type: str,
    device_index: int | None,
    dtype_class: str,
    small: bool,
    obstacle: str = "",
) -> str:
    """Implement :func:`choose` on plain values; under torch.compile the result is a constant of the graph.

    ``dtype_class`` is "other" if a dtype is not one of ``KERNEL_DTYPES``, "fp64" if one is float64, else empty.
    ``obstacle`` is TRANSFORM or the name of a wrapper class where no kernel can compute the call, else empty.
    """
    device = device_type if device_index is None else f"{device_type}:{device_index}"
    requested = backend_from_env() if backend == "auto" else backend
    if requested == "auto":
        return _auto_backend(family, device_type, device, dtype_class, small or bool(obstacle))
    if requested not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if requested == "reference":
        return requested
    reason = _unusable(family, requested, device_type, device, dtype_class, obstacle)
    if reason is None:
        return requested
    source = f"FASTKD_BACKEND={requested}" if backend == "auto" else f"backend={backend!r}"
    raise BackendUnavailable(f"{source}{reason}")


def _unusable(family: str, name: str, device_type: str, device: str, dtype_class: str, obstacle: str) -> str | None:
    """Return the rest of the error for a backend requested by name that cannot compute the call, or None."""
    if obstacle == TRANSFORM:
        return (
            f": {family}'s kernels have no rules for vmap, torch.func transforms and forward-mode AD, and the "
            "derivative would be 0; use backend='auto' or 'reference' there"
        )
    if obstacle:
        return (
            f": {family}'s kernels take plain tensors, got {obstacle}, which wraps other tensors; pass "
            "those (for a DTensor x.to_local() or x.full_tensor()), or use backend='auto' or 'reference'"
        )
    if dtype_class == "other":
        names = ", ".join(str(d).removeprefix("torch.") for d in KERNEL_DTYPES)
        return f": the kernels take {names}; convert the inputs or use backend='reference'"
    chosen = BACKENDS[name]
    if dtype_class == "fp64" and family in chosen.families_without_fp64:
        return (
            f": its {family} kernels have no float64 version; convert the inputs, or use backend='auto' or 'reference'"
        )
    reason = chosen.device_type_reason(device_type) or unavailable_reason(name, family, device)
    return reason and f" cannot run {family} on {device}: {reason}. backend='reference' always works."


def auto_order(family: str, device_type: str) -> tuple[str, ...]:
    """Return the backends that "auto" tries for a family on a device type, in order."""
    order = FAMILY_ORDER.get((family, device_type)) or AUTO_ORDER.get(device_type, ())
    return tuple(name for name in order if family not in BACKENDS[name].families_without_kernels)


def _auto_backend(family: str, device_type: str, device: str, dtype_class: str, plain: bool) -> str:
    """Return the first backend of :func:`auto_order` that works; warn once about each unavailable one.

    ``plain`` requests plain torch, for a small input or one that no kernel supports.
    """
    if plain or dtype_class == "other":
        return "reference"
    for name in auto_order(family, device_type):
        if dtype_class == "fp64" and family in BACKENDS[name].families_without_fp64:
            continue
        reason = unavailable_reason(name, family, device)
        if reason is None:
            return name
        if isinstance(reason, UntestedReason):  # falling back would leave a slower backend in the graph for good
            raise BackendUnavailable(f"{family} on {device}: {name}: {reason}, or use backend='reference'")
        # A transient reason is also warned about once, without silencing a later permanent one.
        transient = isinstance(reason, TransientReason)
        if name not in _warned and not (transient and f"{name}, transient" in _warned):
            _warned.add(f"{name}, transient" if transient else name)
            warnings.warn(
                f"fastkd: the {name} backend is unavailable on {device} ({reason}); falling back to a slower one. "
                + ("It is tried again at the next call" if transient else "Shown once; see fastkd.info()")
                + ". Select another with backend=... or FASTKD_BACKEND=...",
                FastKDWarning,
                stacklevel=4,
            )
    return "reference"
