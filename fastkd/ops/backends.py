"""The backends: one object each, with its devices, its dtypes, and the reasons why it cannot run on a machine.

To add a backend, add its object to ``BACKENDS``; to the folder of each family that it computes add the file that
``module`` names, with the same functions as the family's ``native.py``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastkd.ops.availability import TransientReason, failure_reason, first_line, is_out_of_memory

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes that the kernels support; for any other floating dtype "auto" uses the reference."""

OLDEST_TRITON = (3, 6)
"""The Triton that torch 2.11, the oldest supported, installs. The kernels were never run with an older one."""


@dataclass
class Backend:
    """One implementation of the kernel families. The ``..._reason`` functions return None where it can run."""

    name: str
    """The value of ``backend=``."""

    module: str
    """The file in each family's folder that calls the kernels; empty for plain torch."""

    device_type_reason: Callable[[str], str | None]
    """Given a device type, returns why the backend does not accept its tensors."""

    machine_reason: Callable[[], str | None]
    """Imports the backend and returns why no device of this machine can run it."""

    device_reason: Callable[[torch.device], str | None]
    """Returns why a device of this machine cannot run it."""

    families_without_fp64: frozenset[str] = frozenset()
    """Families whose kernels do not support float64, because a GPU's matrix units are slow in fp64 or lack it."""

    families_without_kernels: frozenset[str] = frozenset()
    """Families that the backend does not compute."""


def _no_reason(*_: object) -> None:
    """Return None: nothing prevents the backend from running."""


# --- cpu: C++ kernels (csrc/cpu) --------------------------------------------------------------------------------------


def _cpu_device_type_reason(device_type: str) -> str | None:
    if device_type != "cpu":
        return "it takes CPU tensors; use backend='auto', or move the inputs with .cpu()"
    return None


def _cpu_machine_reason() -> str | None:
    return _native_reason("cpu")


def _native_reason(name: str) -> str | None:
    """Return why the compiled module ``fastkd._<name>`` cannot be loaded, or None."""
    try:
        importlib.import_module("fastkd._native").load(name)
    except ImportError as error:
        return TransientReason(first_line(error)) if is_out_of_memory(error) else first_line(error)
    return None


# --- triton: Triton kernels (kernels); for tests, TRITON_INTERPRET=1 runs them on CPU tensors -----------------------


def _triton_device_type_reason(device_type: str) -> str | None:
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return (
            "Triton takes CUDA tensors; use backend='auto', or move the inputs with .cuda() "
            "(for tests, TRITON_INTERPRET=1 set before Triton is imported interprets the kernels on CPU tensors)"
        )
    if device_type not in ("cpu", "cuda"):
        return f"Triton kernels are untested on {device_type}; use backend='auto'"
    return None


def _triton_machine_reason() -> str | None:
    try:
        triton_version = importlib.import_module("triton").__version__
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"Triton cannot be imported ({first_line(error)}); pip install triton"
    if _major_minor(triton_version) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return (
            f"Triton {triton_version} is older than {oldest}; pip install --upgrade torch, which installs the "
            "Triton it needs"
        )
    try:
        common = importlib.import_module("fastkd.kernels.common")
    except ModuleNotFoundError as error:
        if error.name != "fastkd.kernels":
            return failure_reason(error, "fastkd.kernels cannot be imported: ")
        return importlib.import_module("fastkd._native").not_installed("fastkd.kernels")
    except Exception as error:
        return failure_reason(error, "fastkd.kernels cannot be imported: ")
    if not common.INTERPRETED:
        return None if torch.cuda.is_available() else _no_gpu_reason()
    numpy_version = importlib.import_module("numpy").__version__
    if _major_minor(triton_version) < (3, 7) and _major_minor(numpy_version) >= (2, 4):
        return (
            f"the interpreter of Triton {triton_version} needs numpy below 2.4, found {numpy_version}; "
            "pip install 'numpy<2.4'"
        )
    return None


def _triton_device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 0):
        return None
    return (
        f"the Triton kernels need compute capability 8.0 or newer, {device} "
        f"({torch.cuda.get_device_name(device)}) has {major}.{minor}"
    )


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


# --- cuda: CUDA C++ kernels (csrc/cuda) -------------------------------------------------------------------------------


def _cuda_device_type_reason(device_type: str) -> str | None:
    if device_type != "cuda" and not (device_type == "cpu" and _is_emulated()):
        return "it takes CUDA tensors; use backend='auto', or move the inputs with .cuda()"
    return None


def _cuda_machine_reason() -> str | None:
    reason = _native_reason("cuda")
    if reason is not None or _is_emulated():
        return reason
    if not torch.cuda.is_available():
        return _no_gpu_reason()
    module = importlib.import_module("fastkd._native").load("cuda")
    if module.device_count() > 0:
        return None
    return _driver_reason(module.driver_version(), module.runtime_version())


def _cuda_device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    targets = importlib.import_module("fastkd._native").load("cuda").targets()
    return _target_reason(targets, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


def _is_emulated() -> bool:
    """Return whether ``fastkd._cuda`` is the module that tests build for the host, which takes CPU tensors."""
    return getattr(sys.modules.get("fastkd._cuda"), "EMULATED", False)


def _no_gpu_reason() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install a CUDA build of torch"
    return "no NVIDIA GPU is visible (torch.cuda.is_available() is False)"


def _driver_reason(driver: int, runtime: int) -> str:
    """Return why the CUDA runtime in ``fastkd._cuda`` sees no device although torch does.

    Versions are CUDA's integers, such as 12080 for 12.8.
    """
    if driver // 1000 >= runtime // 1000:
        return (
            "the CUDA runtime in fastkd._cuda sees no device, though torch does; was CUDA_VISIBLE_DEVICES set after "
            "torch initialised CUDA?"
        )
    supported, needed = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime // 1000 * 1000))
    return (
        f"the NVIDIA driver supports CUDA {supported}, fastkd._cuda needs one that supports {needed}: update the "
        f"driver, or reinstall fastkd from the sources with a CUDA {driver // 1000} toolkit"
    )


def _target_reason(targets: list[str], capability: tuple[int, int], device_name: str) -> str | None:
    """Return why code for ``targets`` ("sm_80", ..., "compute_120") does not run on this GPU, or None."""
    required = 10 * capability[0] + capability[1]
    for target in targets:
        kind, _, number = target.partition("_")
        # Machine code runs on later minor revisions of the same generation, PTX on every later GPU.
        if int(number) <= required and (kind == "compute" or int(number) // 10 == required // 10):
            return None
    return (
        f"fastkd._cuda was compiled for {', '.join(targets)} and has no code for {device_name} (compute capability "
        f"{capability[0]}.{capability[1]}); reinstall fastkd from the sources with a CUDA toolkit that supports it"
    )


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", "", _no_reason, _no_reason, _no_reason),
        Backend("cpu", "native", _cpu_device_type_reason, _cpu_machine_reason, _no_reason),
        Backend(
            "triton",
            "triton",
            _triton_device_type_reason,
            _triton_machine_reason,
            _triton_device_reason,
            families_without_fp64=frozenset({"relation", "pixel_word"}),
            families_without_kernels=frozenset({"attention_kl"}),
        ),
        Backend(
            "cuda",
            "native",
            _cuda_device_type_reason,
            _cuda_machine_reason,
            _cuda_device_reason,
            families_without_fp64=frozenset({"relation"}),
            families_without_kernels=frozenset({"attention_kl"}),
        ),
    )
}
"""All backends, by name."""
