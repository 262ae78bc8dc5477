"""``fastkd.info()``: versions, devices, backends, and why a backend is not in use."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OPTIONAL = (
    "accelerate",
    "huggingface_hub",
    "matplotlib",
    "pycocotools",
    "safetensors",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
)
"""Packages of the ``[ris]`` extra that matter in a bug report."""

VARIABLES = ("CUDA_CACHE_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR")
"""Environment variables of other software that change what fastkd does, in addition to Triton's."""


class Info(dict[str, Any]):
    """A dict of JSON values that prints as a short text."""

    def __str__(self) -> str:
        lines = ["fastkd " + self["versions"]["fastkd"]]
        if self["hides"] is not None:
            lines.append(f"  {self['package']} hides the installed {self['hides']}: start Python in another folder")
            lines.append("  or with `python -P` to use the installed one")
        lines += ["", "versions"]
        lines += [f"  {name:16} {value}" for name, value in self["versions"].items() if name != "fastkd"]
        lines += ["", "devices"]
        lines += [f"  {device['name']:16} {_joined(device, 'name')}" for device in self["devices"]]
        lines += ["", "backends"]
        for name, row in self["backends"].items():
            lines.append(f"  {name:16} {'in use' if row['in_use'] else 'not in use: ' + row['why_not']}")
        lines += ["", "built with this installation"]
        for name, row in self["build"].items():
            lines.append(f"  {name:16} {_joined(row) if isinstance(row, dict) else row}")
        if not self["build"]:
            lines.append("  nothing: a source tree that was not installed; run `pip install -e .` in it")
        if self["environment"]:
            lines += ["", "environment"]
            lines += [f"  {name}={value}" for name, value in self["environment"].items()]
        missing = [name for name, value in self["optional"].items() if value is None]
        lines += ["", "optional packages"]
        lines += [f"  {name:16} {value}" for name, value in self["optional"].items() if value is not None]
        if missing:
            lines.append(f"  not installed: {', '.join(missing)} (pip install 'fastkd[ris]' installs them all)")
        return "\n".join(lines)


def info() -> Info:
    """Return the facts for a bug report: versions, devices, backends, and why a backend is not in use.

    Returns:
        A dict of plain values with the keys ``package`` (its folder), ``hides`` (the folder of an installed fastkd that
        it shadows, or None), ``versions``, ``devices``, ``backends`` (name to ``in_use`` and ``why_not``), ``build``,
        ``environment`` and ``optional``; ``print`` shows it as text.

    Example:
        >>> import fastkd
        >>> fastkd.info()["backends"]["reference"]
        {'in_use': True, 'why_not': None}
    """
    import fastkd
    from fastkd import _native

    hides = _native.hidden()
    return Info(
        package=str(_native.HERE),
        hides=None if hides is None else str(hides),
        versions=_versions(fastkd.__version__),
        devices=_devices(),
        backends=_backends(),
        build=_build(),
        environment={
            k: v for k, v in sorted(os.environ.items()) if k in VARIABLES or k.startswith(("FASTKD_", "TRITON_"))
        },
        optional={name: _version(name) for name in OPTIONAL},
    )


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return the versions and hardware that a result depends on, as plain values: for logs, reports and benchmarks."""
    import torch

    import fastkd
    from fastkd._machine import cores

    gpu = torch.device(device).type == "cuda"
    return {
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver_version() if gpu else None,
        "device": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name with its family and model, or its architecture where the system reports no name.

    Virtual machines often report only "AMD EPYC" or "Intel Xeon"; family and model identify the processor.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    # Lines such as "model name	: AMD EPYC"; the first processor's are kept.
    fields = dict(reversed(re.findall(r"^([\w ]+?)\s*:[ \t]*(.*?)\s*$", text, re.MULTILINE)))
    if not fields.get("model name"):
        return platform.processor() or platform.machine()
    name, family, model = (fields.get(key) for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})" if family and model else str(name)


def _driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as "580.65.06", or None where nvidia-smi does not report it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _versions(fastkd_version: str) -> dict[str, str | None]:
    import torch

    return {
        "fastkd": fastkd_version,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "driver": _driver(),
        "triton": _version("triton"),
    }


def _driver() -> str | None:
    """Return the newest CUDA version that the driver supports, such as "CUDA 13.0"; None without a driver."""
    import torch

    get_version = getattr(torch._C, "_cuda_getDriverVersion", None)
    try:
        number = get_version() if get_version is not None else 0
    except RuntimeError:
        return None
    return f"CUDA {number // 1000}.{number % 1000 // 10}" if number else None


def _devices() -> list[dict[str, Any]]:
    import torch

    from fastkd._machine import cores

    found: list[dict[str, Any]] = [
        {"name": "cpu", "machine": platform.machine(), "cores": cores(), "threads": torch.get_num_threads()}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "name": f"cuda:{index}",
                    "model": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory": f"{properties.total_memory / 2**30:.0f} GiB",
                }
            )
    return found


def _backends() -> dict[str, dict[str, Any]]:
    import torch

    from fastkd.ops import dispatch

    found = {}
    for name in dispatch.BACKENDS:
        reason = dispatch.unavailable_reason(name)
        places = {"cpu": "cpu", "cuda": "cuda:0", "triton": "cuda:0"}
        if reason is None and name in places and (name == "cpu" or torch.cuda.is_available()):
            reason = dispatch.unavailable_reason(name, "softmax_kl", places[name])  # also runs its self-test
        found[name] = {"in_use": reason is None, "why_not": reason}
    return found


def _build() -> dict[str, Any]:
    from fastkd import _native

    return dict(_native.build_info())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _joined(row: dict[str, Any], *omitted: str) -> str:
    return ", ".join(
        f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in row.items()
        if key not in omitted
    )
